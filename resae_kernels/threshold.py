"""Threshold encode: z[n] = relu(s) · [s > threshold] of s = (x[n] − prediction[n] − pre_bias)
weightᵀ + bias, as a sparse code.

JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) has one threshold per latent, BatchTopK
(Bussmann et al. 2024, arXiv 2412.06410) one for all at inference, ReLU the threshold 0. The scores
are those of `topk_encode`, chunk by chunk; instead of a selection they are compared, counted and,
as long as no more than `max_active` are above, only moved together.

Inference only: the outputs cannot be differentiated.
"""

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from resae_kernels import checks, memory
from resae_kernels.cpu.encode import threshold_encode_in_chunks
from resae_kernels.cpu.selection import select_above
from resae_kernels.dispatch import LIBRARY, implementation_for, register
from resae_kernels.encode import check_arguments
from resae_kernels.triton.encode import launch_encode
from resae_kernels.types import Implementation, ThresholdCode

OP = "threshold_encode"


def threshold_encode(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    threshold: Tensor,  # [M] or []
    max_active: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> ThresholdCode:
    """The positive pre-activations above their latents' thresholds (formula:
    `reference.threshold_encode`).

    Args:
        x: `[..., D]`, the activations to encode.
        weight: `[M, D]`, one latent per contiguous row; x's dtype and device, as every other input.
        bias: `[M]` or None.
        threshold: `[M]`, one per latent (JumpReLU), or `[]`, one for all (BatchTopK; 0: ReLU).
        max_active: room for active latents per token, 1 ≤ max_active ≤ M.
        pre_bias: `[D]`, subtracted from every token (an autoencoder's `b_dec`).
        prediction: `[..., D]`, subtracted token by token (a prediction of x; the code is of the
            rest).
        sorted: True orders a code by value, descending, then index; False by index, ascending.
        workspace_bytes: bound on the scores held at once, as of `topk_encode`.
        implementation: "torch", "triton" or None, by device (CUDA: triton). Same contract.

    Returns:
        `ThresholdCode(acts, indices, n_active)`: `[..., max_active]` in x's dtype and int64, and
        `[...]` int32. Unused slots hold act 0, index 0 and come last.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, max_active out of range.
        RuntimeError: at a backward pass through the acts.

    Note:
        `n_active` is the true number of active latents. Where it exceeds max_active, the code holds
        the max_active largest (ties to the lower index); look at `(n_active > max_active).any()`
        and raise max_active if that must not be.

        Scores are rounded to x's dtype before they are compared. A latent whose threshold is
        negative is active where its score is positive. A NaN score is active whatever the
        threshold, and sorts first; a NaN threshold lets nothing else pass. Under autocast the
        inputs, thresholds too, are cast as for `F.linear`. Where gradients are enabled and an input
        requires one, `torch.compile` refuses the op: call it under `torch.no_grad()`.
    """
    x, weight, bias, threshold, pre_bias, prediction = checks.under_autocast(
        x, weight, bias, threshold, pre_bias, prediction
    )  # type: ignore[assignment]
    check_arguments(
        x, weight, bias, max_active, pre_bias, prediction, workspace_bytes, OP, "max_active"
    )
    threshold = per_latent(threshold, weight)
    D = weight.shape[1]
    acts, indices, n_active = torch.ops.resae.threshold_encode(
        x.reshape(-1, D),
        weight,
        bias,
        threshold,
        max_active,
        pre_bias,
        None if prediction is None else prediction.reshape(-1, D),
        sorted,
        memory.workspace_bytes(x) if workspace_bytes is None else workspace_bytes,
        implementation_for(OP, x, implementation),
    )
    leading = x.shape[:-1]
    return ThresholdCode(
        acts.reshape(*leading, max_active),
        indices.reshape(*leading, max_active),
        n_active.reshape(leading),
    )


def per_latent(threshold: Tensor, weight: Tensor) -> Tensor:
    """Thresholds as `[M]`, checked."""
    M = weight.shape[0]
    if threshold.ndim:
        why = "one entry per latent, or [] for one of all"
        checks.check_shape(OP, "threshold", threshold, (M,), why)
    checks.check_like(OP, "threshold", threshold, "weight", weight)
    return threshold.expand(M)


# -- op ------------------------------------------------------------------------------------------


def _encode_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    max_active: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Acts and indices `[N, max_active]` of `x [N, D]`, and `[N]` active latents."""
    if implementation == "triton":
        select = partial(_select_above, threshold)
        acts, indices, n_active = launch_encode(
            x,
            weight,
            bias,
            max_active,
            pre_bias,
            prediction,
            sorted,
            workspace_bytes,
            select,
            threshold,
        )
        return acts, indices, n_active
    return threshold_encode_in_chunks(
        x, weight, bias, threshold, max_active, pre_bias, prediction, sorted, workspace_bytes
    )


def _select_above(
    threshold: Tensor, scores: Tensor, k: int, sorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return select_above(scores, threshold, k, sorted)


def _encode_fake(
    x: Tensor, _weight: object, _bias: object, _threshold: object, max_active: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[0], max_active
    indices = x.new_empty(shape, dtype=torch.int64)
    return x.new_empty(shape), indices, x.new_empty(shape[0], dtype=torch.int32)


def setup_context(ctx: Any, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep nothing: there is no gradient."""
    del inputs
    _, indices, n_active = output
    ctx.mark_non_differentiable(indices, n_active)


def backward(ctx: object, *gradients: object) -> NoReturn:
    """Raise RuntimeError."""
    del ctx, gradients
    raise RuntimeError(
        f"{OP}: has no gradient, it is for inference; call it under torch.no_grad() or detach its "
        f"inputs, and train with topk_encode or a dense activation"
    )


register(
    "threshold_encode(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, SymInt max_active, "
    "Tensor? pre_bias, Tensor? prediction, bool sorted, int workspace_bytes, str implementation) "
    "-> (Tensor acts, Tensor indices, Tensor n_active)",
    _encode_rows,
    _encode_fake,
)
torch.library.register_autograd(
    "resae::threshold_encode", backward, setup_context=setup_context, lib=LIBRARY
)
