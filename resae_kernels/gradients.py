"""Sparse sums of the gradients, each an op with a gradient of its own.

`scatter_outer`, a scatter-add of outer products, is the gradient of a dictionary. It sums over the
codes sorted by latent, so that each row is one ordered sum: deterministic, no atomics, no `[N, M]`.
`sddmm`, a sampled dense-dense matrix multiplication, is the gradient of the acts:
⟨grad[n], W[indices[n,j]]⟩.

An autoencoder's backward sorts its code twice: for the encoder's gradients, and for the decoder's.
One sort would need an op of encode and decode together. It is not there because it would save
little: by the cost model 1.4 % of a training step at D = 2048, M = 65,536, k = 64 and 3.5 % at
D = 768, M = 24,576, k = 32 (70 µs for 524,288 entries; not measured on a GPU); on one core
of a CPU a sort takes 9 % of the time of one of the two sums at N = 2048, D = 512, M = 8192, k = 32,
and 5 % at N = 4096, D = 768, M = 24,576. Nor is the order kept from one to the other: the
two see different tensors over the same memory, which may be that of another code by then.

Gao et al. 2024 (arXiv 2406.04093), appendix on sparse kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resae_kernels import dense
from resae_kernels.cpu import native, sums
from resae_kernels.dispatch import LIBRARY, implementation_for, register
from resae_kernels.triton import decode as triton_decode
from resae_kernels.types import accumulation_dtype


def code_gradients(
    acts: Sequence[Tensor],
    indices: Sequence[Tensor],
    W_dec: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Sequence[tuple[bool, bool]],
    *,
    implementation: str = "",
    algorithm: str = "",
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of each code's acts and of its dictionary, given the gradient of its decode."""
    options = {"implementation": implementation, "algorithm": algorithm}
    grad_acts: list[Tensor | None] = []
    grad_W: list[Tensor | None] = []
    for a, i, W, grad, (need_acts, need_W) in zip(acts, indices, W_dec, grads, needed, strict=True):
        grad_acts.append(torch.ops.resae.sddmm(grad, i, W, **options) if need_acts else None)
        grad_W.append(scatter_outer(a, i, grad, W.shape[0], **options) if need_W else None)
    return grad_acts, grad_W


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    rows: Tensor,
    M: int,
    implementation: str = "",
    algorithm: str = "",
) -> Tensor:
    """Scatter-add of outer products, `out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j] · rows[n]`,
    `[M, D]`: the gradient of a dictionary (rows = gradient of the decode) or of an encoder (rows =
    residual)."""
    return torch.ops.resae.scatter_outer(
        acts, indices, rows, M, implementation=implementation, algorithm=algorithm
    )


def _scatter_outer(
    acts: Tensor,
    indices: Tensor,
    rows: Tensor,
    M: int,
    *,
    implementation: str = "",
    algorithm: str = "",
) -> Tensor:
    chosen = implementation_for("scatter_outer", rows, implementation or None)
    if dense.is_dense(algorithm, indices, M, rows.dtype):
        return dense.dense_outer(acts, indices, rows, M, chosen)
    if chosen == "torch" and native.takes(acts, rows):
        return native.scatter_outer(acts, indices, rows, M)
    summed = triton_decode.launch_scatter_outer if chosen == "triton" else sums.scatter_outer
    return summed(*_sorted_by_latent(acts, indices, M), rows)


def _sorted_by_latent(acts: Tensor, indices: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a code in the order of latent, then token: acts, tokens, and the bounds of
    each latent's entries, `[M + 1]`."""
    k = acts.shape[1]
    acts, latents = acts.reshape(-1), indices.reshape(-1)
    # Padding slots would pile up on latent 0: they sort behind the last latent and are cut off.
    latents, order = sums.sort_stably(torch.where(acts != 0, latents, M).int())
    bounds = torch.searchsorted(
        latents, torch.arange(M + 1, dtype=torch.int32, device=latents.device)
    )
    return acts[order], order.div(max(k, 1), rounding_mode="floor"), bounds


def _scatter_outer_fake(
    _acts: object, _indices: object, rows: Tensor, M: int, **_options: object
) -> Tensor:
    return rows.new_empty(M, rows.shape[1])


def _scatter_outer_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: object
) -> None:
    del output
    acts, indices, rows, _ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(acts, indices, rows)


def _scatter_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For gradients of gradients. The transposed dense code times rows is linear in both."""
    acts, indices, rows = ctx.saved_tensors
    need_acts, _, need_rows, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_acts = grad_rows = None
    if need_acts:
        grad_acts = torch.ops.resae.sddmm(rows, indices, grad, **ctx.options)
    if need_rows:
        grad_rows = torch.ops.resae.sparse_decode(
            [acts], [indices], [grad], None, None, **ctx.options
        )
    return grad_acts, None, grad_rows, None


def scatter_sum(acts: Tensor, indices: Tensor, M: int, implementation: str = "") -> Tensor:
    """Scatter-add of the acts, `out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j]`, `[M]`: the
    gradient of an encoder bias."""
    if acts.device.type == "cpu" and implementation != "triton":
        return sums.scatter_sum(acts, indices, M)  # no need to sort the codes
    ones = acts.new_ones(acts.shape[0], 1)
    # One column: never worth a scattered code.
    return scatter_outer(acts, indices, ones, M, implementation, algorithm="gather").squeeze(1)


def encoder_gradients(
    acts: Tensor, indices: Tensor, rows: Tensor, M: int, implementation: str = ""
) -> tuple[Tensor, Tensor]:
    """`scatter_outer` and `scatter_sum` of one code, the latter in the accumulation dtype: the
    gradients of an encoder and of its bias. In Triton one sort and the same launches for both."""
    return torch.ops.resae.encoder_gradients(acts, indices, rows, M, implementation=implementation)


def _encoder_gradients(
    acts: Tensor, indices: Tensor, rows: Tensor, M: int, *, implementation: str = ""
) -> tuple[Tensor, Tensor]:
    chosen = implementation_for("encoder_gradients", rows, implementation or None)
    acc_dtype = accumulation_dtype(acts.dtype)
    if chosen == "torch" or rows.shape[1] == 0 or dense.is_dense("", indices, M, rows.dtype):
        outer = _scatter_outer(acts, indices, rows, M, implementation=chosen)
        return outer, scatter_sum(acts.to(acc_dtype), indices, M, chosen)
    total = acts.new_empty(M, dtype=acc_dtype)
    entries = _sorted_by_latent(acts, indices, M)
    return triton_decode.launch_scatter_outer(*entries, rows, total), total


def _encoder_gradients_fake(
    acts: Tensor, _indices: object, rows: Tensor, M: int, **_options: object
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(M, rows.shape[1]), acts.new_empty(M, dtype=accumulation_dtype(acts.dtype))


def _encoder_gradients_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: object
) -> None:
    _scatter_outer_setup(ctx, inputs, keyword_only_inputs, output)
    ctx.set_materialize_grads(False)


def _encoder_gradients_backward(
    ctx: Any, grad_outer: Tensor | None, grad_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    """For gradients of gradients."""
    acts, indices, _ = ctx.saved_tensors
    grad_acts = grad_rows = None
    if grad_outer is not None:
        grad_acts, _, grad_rows, _ = _scatter_outer_backward(ctx, grad_outer)
    if grad_total is not None and ctx.needs_input_grad[0]:
        named = grad_total[indices].to(acts.dtype)
        grad_acts = named if grad_acts is None else grad_acts + named
    return grad_acts, None, grad_rows, None


def _sddmm(
    grad: Tensor, indices: Tensor, W: Tensor, *, implementation: str = "", algorithm: str = ""
) -> Tensor:
    chosen = implementation_for("sddmm", W, implementation or None)
    if dense.is_dense(algorithm, indices, W.shape[0], W.dtype):
        return dense.dense_sddmm(grad, indices, W, chosen)
    sampled = triton_decode.launch_sddmm if chosen == "triton" else sums.sddmm
    return sampled(grad, indices, W)


def _sddmm_fake(grad: Tensor, indices: Tensor, _W: object, **_options: object) -> Tensor:
    return grad.new_empty(indices.shape)


def _sddmm_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: object
) -> None:
    del output
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(*inputs)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For gradients of gradients. The SDDMM is linear in the rows on either side."""
    rows, indices, W = ctx.saved_tensors
    need_rows, _, need_W = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_rows = grad_W = None
    if need_rows:
        grad_rows = torch.ops.resae.sparse_decode([grad], [indices], [W], None, None, **ctx.options)
    if need_W:
        grad_W = scatter_outer(grad, indices, rows, W.shape[0], **ctx.options)
    return grad_rows, None, grad_W


register(
    "scatter_outer(Tensor acts, Tensor indices, Tensor rows, SymInt M, *, str implementation='', "
    "str algorithm='') -> Tensor",
    _scatter_outer,
    _scatter_outer_fake,
)
register(
    "encoder_gradients(Tensor acts, Tensor indices, Tensor rows, SymInt M, *, "
    "str implementation='') -> (Tensor outer, Tensor total)",
    _encoder_gradients,
    _encoder_gradients_fake,
)
register(
    "sddmm(Tensor grad, Tensor indices, Tensor W, *, str implementation='', "
    "str algorithm='') -> Tensor",
    _sddmm,
    _sddmm_fake,
)
for _op, _its_backward, _its_setup in (
    ("scatter_outer", _scatter_outer_backward, _scatter_outer_setup),
    ("encoder_gradients", _encoder_gradients_backward, _encoder_gradients_setup),
    ("sddmm", _sddmm_backward, _sddmm_setup),
):
    torch.library.register_autograd(
        f"resae::{_op}", _its_backward, setup_context=_its_setup, lib=LIBRARY
    )
