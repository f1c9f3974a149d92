"""Sparse decode: y[n] = Σ_j acts[n,j] · W_dec[indices[n,j]] + bias + base[n].

N tokens, k active latents, D width, M latents. 2·N·k·D FLOPs against 2·N·M·D dense; bound by
gathering N·k·D weight elements. Codes of several dictionaries are summed in one call.

Backward: d acts is a sampled product ⟨g[n], W_dec[indices[n,j]]⟩; dW_dec is summed latent by latent
over the codes sorted by latent (`latent_outer`), so that each row is one ordered sum:
deterministic, no atomics, no `[N, M]`. Gao et al. 2024 (arXiv 2406.04093), appendix on sparse
kernels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels import _launch
from resae_kernels.reference import accumulation_dtype

GATHER_BYTES = 64 << 20
"""Bound on the gathered rows `[n, k, D]` that the gradient of the acts holds at once."""


def sparse_decode(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    *,
    bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
) -> Tensor:
    """`Σ_j acts_j · W_dec[indices_j] (+ bias) (+ base)` (formula: `reference.sparse_decode`).

    Args:
        acts: `[..., k]`; or a list, one per dictionary, with the same leading shape.
        indices: `[..., k]` int64, 0 ≤ index < M; or a list.
        W_dec: `[M, D]`, one direction per contiguous row; or a list with the same D.
        bias: `[D]`, added to every token.
        base: `[..., D]`, added token by token.

    Returns:
        `[..., D]` in W_dec's dtype.

    Raises:
        TypeError: dtypes that differ or are not floating (int64 for indices).
        ValueError: shapes, devices or list lengths that do not fit.
        RuntimeError: an index outside its dictionary (checked on CPU).

    Note:
        Padding slots (act 0) add nothing to the sum. Gradients reach acts, W_dec, bias and base.
        Under autocast the acts are cast to W_dec's dtype.
    """
    op = "sparse_decode"
    if isinstance(acts, Tensor) and isinstance(indices, Tensor) and isinstance(W_dec, Tensor):
        acts, indices, W_dec = [acts], [indices], [W_dec]
    elif isinstance(acts, Tensor) or isinstance(indices, Tensor) or isinstance(W_dec, Tensor):
        raise TypeError(
            f"{op}: acts, indices and W_dec must be three tensors, or three lists of tensors"
        )
    if not (len(acts) == len(indices) == len(W_dec) > 0):
        raise ValueError(
            f"{op}: got {len(acts)} acts, {len(indices)} indices, {len(W_dec)} W_dec; expected the "
            f"same number of each, at least one"
        )
    leading, W = acts[0].shape[:-1], W_dec[0]
    if _launch.autocasts(W.device.type):
        acts = [a.to(W.dtype) for a in acts]
        bias, base = (None if t is None else t.to(W.dtype) for t in (bias, base))
    for i in range(len(acts)):
        at = f"[{i}]" if len(acts) > 1 else ""
        _launch.check_codes(op, acts[i], indices[i], at)
        _launch.check_shape(
            op, f"acts{at}", acts[i], (*leading, acts[i].shape[-1]), "the tokens of the first acts"
        )
        if W_dec[i].ndim != 2 or W_dec[i].shape[1] != W.shape[-1]:
            raise ValueError(
                f"{op}: W_dec{at} has shape {list(W_dec[i].shape)}, expected [M, {W.shape[-1]}]"
            )
        _launch.check_like(op, f"W_dec{at}", W_dec[i], f"acts{at}", acts[i])
    N, D = leading.numel(), W.shape[1]
    for name, tensor, shape in (("bias", bias, (D,)), ("base", base, (*leading, D))):
        if tensor is not None:
            _launch.check_shape(op, name, tensor, shape, "tokens of acts, width of W_dec")
            _launch.check_like(op, name, tensor, "W_dec", W)
    out = torch.ops.resae.sparse_decode(
        [a.reshape(N, a.shape[-1]) for a in acts],
        [i.reshape(N, i.shape[-1]) for i in indices],
        list(W_dec),
        bias,
        None if base is None else base.reshape(N, D),
    )
    return out.reshape(*leading, D)


# -- op ------------------------------------------------------------------------------------------


def _decode(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    # A single sum is rounded once by itself; several terms are added up in the accumulation dtype.
    alone = len(acts) == 1 and bias is None and base is None
    dtype = acts[0].dtype if alone else accumulation_dtype(acts[0].dtype)
    total = _gather_sum(acts[0], indices[0], W_dec[0], dtype)
    for a, i, W in zip(acts[1:], indices[1:], W_dec[1:], strict=True):
        total += _gather_sum(a, i, W, dtype)
    for offset in (bias, base):
        if offset is not None:
            total += offset
    return total.to(acts[0].dtype)


def _gather_sum(acts: Tensor, indices: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    if indices.numel() == 0:
        return W.new_zeros(acts.shape[0], W.shape[1], dtype=dtype)
    indices, W = indices.contiguous(), W.contiguous()
    if dtype != W.dtype and indices.numel() < W.shape[0]:
        # Fewer codes than latents: widen the rows they name, not the whole dictionary.
        W = F.embedding_bag(indices.view(-1, 1), W, mode="sum")
        indices = torch.arange(indices.numel(), device=W.device).view_as(indices)
    weights = acts.to(dtype).contiguous()
    return F.embedding_bag(indices, W.to(dtype), per_sample_weights=weights, mode="sum")


def _decode_fake(acts, indices, W_dec, bias, base):  # noqa: ARG001
    return acts[0].new_empty(acts[0].shape[0], W_dec[0].shape[1])


def _setup_context(ctx, inputs, output) -> None:
    del output
    acts, indices, W_dec, _, _ = inputs
    ctx.set_materialize_grads(False)
    # acts weigh dW_dec, W_dec gives d acts, indices say where: no activation is kept.
    ctx.save_for_backward(*acts, *indices, *W_dec)


def _backward(ctx, grad):
    n = len(ctx.saved_tensors) // 3
    acts, indices, W_dec = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(3))
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None
    grad = grad.contiguous()
    grad_acts, grad_W = code_gradients(acts, indices, W_dec, [grad] * n, _needed(ctx, n))
    _, _, _, need_bias, need_base = ctx.needs_input_grad
    return (
        grad_acts,
        [None] * n,
        grad_W,
        grad.sum(0) if need_bias else None,
        grad if need_base else None,
    )


def _needed(ctx, n: int) -> list[tuple[bool, bool]]:
    """Per dictionary: does acts, does W_dec need its gradient?"""
    need_acts, _, need_W = ctx.needs_input_grad[:3]

    def flag(need, i: int) -> bool:
        return bool(need[i]) if isinstance(need, (list, tuple)) else bool(need)

    return [(flag(need_acts, i), flag(need_W, i)) for i in range(n)]


def code_gradients(acts, indices, W_dec, grads, needed):
    """Gradients of each code's acts and of its dictionary, given the gradient of its decode."""
    grad_acts: list[Tensor | None] = []
    grad_W: list[Tensor | None] = []
    for a, i, W, grad, (need_acts, need_W) in zip(acts, indices, W_dec, grads, needed, strict=True):
        grad_acts.append(torch.ops.resae.sampled_product(grad, i, W) if need_acts else None)
        grad_W.append(latent_outer(a, i, grad, W.shape[0]) if need_W else None)
    return grad_acts, grad_W


# -- the sums of the backward ----------------------------------------------------------------------


def latent_outer(acts: Tensor, indices: Tensor, rows: Tensor, M: int) -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j] · rows[n]`, `[M, D]`: the gradient of a
    dictionary (rows = gradient of the decode) or of an encoder (rows = residual)."""
    return torch.ops.resae.latent_outer(acts, indices, rows, M)


def _latent_outer(acts: Tensor, indices: Tensor, rows: Tensor, M: int) -> Tensor:
    k = acts.shape[1]
    acts, latents = acts.reshape(-1), indices.reshape(-1)
    # Padding slots would pile up on latent 0: they sort behind the last latent and are cut off.
    latents, order = torch.where(acts != 0, latents, M).sort(stable=True)
    bounds = torch.searchsorted(latents, torch.arange(M + 1, device=latents.device))
    order = order[: int(bounds[M])]
    return F.embedding_bag(
        order.div(max(k, 1), rounding_mode="floor"),
        rows.contiguous(),
        bounds,
        per_sample_weights=acts[order],
        mode="sum",
        include_last_offset=True,
    )


def _latent_outer_fake(acts, indices, rows, M):  # noqa: ARG001
    return rows.new_empty(M, rows.shape[1])


def latent_sum(acts: Tensor, indices: Tensor, M: int) -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j]`, `[M]`: the gradient of an encoder bias."""
    return latent_outer(acts, indices, acts.new_ones(acts.shape[0], 1), M).squeeze(1)


def _sampled_product(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    N, k, D = *indices.shape, W.shape[1]
    if W.device.type == "cpu" and W.dtype in (torch.float32, torch.float64) and indices.numel():
        # The gradient of `embedding_bag` in its weights is this product, with no row copied.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.contiguous(),
            W.contiguous(),
            indices.reshape(-1).contiguous(),
            torch.arange(0, N * k, k),
            torch.arange(N).repeat_interleave(k),
            0,  # mode "sum"
        ).view(N, k)
    wide = accumulation_dtype(W.dtype)
    out = grad.new_empty(N, k)
    rows = max(1, GATHER_BYTES // max(1, k * D * wide.itemsize))
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        gathered = W[indices[chunk]].to(wide)
        out[chunk] = (gathered @ grad[chunk].to(wide).unsqueeze(-1)).squeeze(-1).to(out.dtype)
    return out


def _sampled_product_fake(grad, indices, W):  # noqa: ARG001
    return grad.new_empty(indices.shape)


_launch.register(
    "sparse_decode(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor? bias, Tensor? base) "
    "-> Tensor",
    _decode,
    _decode_fake,
)
_launch.register(
    "latent_outer(Tensor acts, Tensor indices, Tensor rows, SymInt M) -> Tensor",
    _latent_outer,
    _latent_outer_fake,
)
_launch.register(
    "sampled_product(Tensor grad, Tensor indices, Tensor W) -> Tensor",
    _sampled_product,
    _sampled_product_fake,
)
torch.library.register_autograd(
    "resae::sparse_decode", _backward, setup_context=_setup_context, lib=_launch.LIBRARY
)
