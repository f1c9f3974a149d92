"""Gradients of a metric of the logits with respect to the codes of all selected layers.

With the error of every layer kept, the replaced model is the plain one, written as a sum over
active latents and one error per layer and token. To first order a latent contributes its act times
its gradient, and an error h − x̂ its product with the gradient of the stream
(attribution patching; sparse feature circuits, arXiv 2403.19647).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resae.choices import KeptError, Loop
from resae.models.hooked import HookedLM
from resae.replacements.context import replacement
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode


class LatentGradients(NamedTuple):
    """Gradients at one selected layer."""

    hook_point: str
    code: SparseCode
    """`[B, T, k]`"""
    gradient: Tensor
    """`[B, T, k]`, of the metric with respect to the acts; 0 at special and sink tokens."""
    error_attribution: Tensor
    """`[B, T]`, ⟨h − x̂, gradient of the stream⟩; 0 at special and sink tokens."""

    @property
    def attribution(self) -> Tensor:
        """`[B, T, k]`, acts times gradients: to first order the change of the metric if the latent
        were ablated, with the opposite sign."""
        return self.code.acts * self.gradient


def latent_gradients(
    lm: HookedLM,
    stack: ReSAE,
    input_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    loop: Loop | str = "closed",
    keep_error: KeptError | str = "detached",
) -> list[LatentGradients]:
    """Gradients of `metric(logits)` with respect to every active latent of every selected layer, in
    one forward and one backward pass, by sparse sums.

    Args:
        input_ids: `[B, T]`, without padding.
        metric: logits `[B, T, V]` → scalar, for example a difference of two logits.
        loop: as of `replacement`.
        keep_error: `detached`: a latent's gradient is that of its direct effect and of its effects
            through latents of later layers. `pass_through`: that of its direction in the plain
            model, whatever later latents read of it.

    Returns:
        One `LatentGradients` per selected layer, detached.

    Raises:
        TypeError: a metric that is no scalar tensor.
        ValueError: as of `replacement`.
    """
    input_ids = input_ids.to(lm.device)
    KeptError.check(keep_error, "latent_gradients: keep_error")
    points = lm.hook_points(stack.hook_points)
    codes: dict[str, SparseCode] = {}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def read(name: str, code: SparseCode) -> SparseCode | None:
        codes[name] = code
        if code.acts.requires_grad:
            return None
        # The first acts of frozen autoencoders in a frozen model become what has a gradient.
        codes[name] = SparseCode(code.acts.detach().requires_grad_(), code.indices)
        return codes[name]

    def keep(name: str, new: Tensor) -> None:
        after[name] = new

    with (
        torch.enable_grad(),
        lm.hooked({p: partial(before.__setitem__, p.name) for p in points}),
        replacement(lm, stack, loop=loop, keep_error=keep_error, gradient=True, on_codes=read),
        lm.hooked({p: partial(keep, p.name) for p in points}),
    ):
        logits = lm.model(input_ids=input_ids, use_cache=False).logits
        value = scalar_metric(metric, logits, "latent_gradients")
    names = [point.name for point in points]
    wanted = [codes[name].acts for name in names] + [after[name] for name in names]
    found = torch.autograd.grad(value, wanted)
    acts, streams = found[: len(names)], found[len(names) :]
    with torch.no_grad():
        detached = [SparseCode(codes[n].acts.detach(), codes[n].indices) for n in names]
        x_hats = stack.decode(detached)
        alone = left_alone(lm, stack, input_ids, [before[name] for name in names])
        gradients = []
        for name, code, gradient, stream, x_hat, left in zip(
            names, detached, acts, streams, x_hats, alone, strict=True
        ):
            error = ((before[name].to(x_hat) - x_hat) * stream.to(x_hat)).sum(-1)
            error = error.masked_fill(left.to(error.device), 0)
            gradients.append(LatentGradients(name, code, gradient, error))
    return gradients


def scalar_metric(metric: Callable[[Tensor], Tensor], logits: Tensor, what: str) -> Tensor:
    """`metric(logits)`. Raises TypeError or ValueError unless it is a scalar with a gradient."""
    value = metric(logits)
    if not isinstance(value, Tensor) or value.ndim:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what}: metric returned {shape}, expected a scalar tensor")
    if not value.requires_grad:
        raise ValueError(f"{what}: the metric's value has no gradient; compute it from the logits")
    return value


def left_alone(
    lm: HookedLM, stack: ReSAE, input_ids: Tensor, streams: Sequence[Tensor]
) -> list[Tensor]:
    """Per layer `[B, T]` bool: tokens that replacement leaves alone there, as `replacement` says
    of special and sink tokens."""
    left = lm.is_special(input_ids)
    if stack.sinks is None:
        return [left] * len(streams)
    left[:, 0] = True
    of_layers = []
    for layer, stream in enumerate(streams):
        left = left | stack.sinks.at(layer, stream).to(left.device)
        of_layers.append(left)
    return of_layers
