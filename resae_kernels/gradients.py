"""Sparse sums of the gradients, each an op with a gradient of its own.

`scatter_outer`, a scatter-add of outer products, is the gradient of a dictionary. It sums over the
codes sorted by latent, so that each row is one ordered sum: deterministic, no atomics, no `[N, M]`.
`sddmm`, a sampled dense-dense matrix multiplication, is the gradient of the acts:
⟨grad[n], W[indices[n,j]]⟩.

`autoencoder_gradients` gives all that an autoencoder sums by latent (gradients of its dictionary,
of its encoder and of the encoder's bias) from one sort of the code, in Triton by one launch.

Gao et al. 2024 (arXiv 2406.04093), appendix on sparse kernels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
        return native.scatter_outer([acts], indices, [rows], M)[0]
    order = _order_by_latent(acts, indices, M)
    if chosen == "triton":
        return order.launch([acts], [rows])[0]
    return sums.scatter_outer(order.sorted(acts), order.tokens, order.bounds, rows)


class _LatentOrder(NamedTuple):
    """The entries of a code in the order of latent, then token; padding last."""

    entries: Tensor
    """`[N·k]`, places in the flattened code."""
    tokens: Tensor
    """`[N·k]`, the token of each."""
    bounds: Tensor
    """`[M + 1]`, of each latent's entries."""

    def sorted(self, weights: Tensor) -> Tensor:
        """`weights [N, k]` of the code's entries in this order, `[N·k]`."""
        return weights.reshape(-1)[self.entries]

    def launch(
        self, weights: Sequence[Tensor], rows: Sequence[Tensor], total: Tensor | None = None
    ) -> list[Tensor]:
        """`Σ weights[s] · rows[s]` per latent, `[M, D]` each, by Triton; `Σ weights[0]` into total.
        One launch for all rows of one dtype."""
        chosen = [self.sorted(w) for w in weights]
        if len({r.dtype for r in rows}) == 1:
            return triton_decode.launch_scatter_outer(chosen, self.tokens, self.bounds, rows, total)
        out: list[Tensor] = []
        for w, r in zip(chosen, rows, strict=True):
            out += triton_decode.launch_scatter_outer([w], self.tokens, self.bounds, [r], total)
            total = None
        return out


def _order_by_latent(acts: Tensor, indices: Tensor, M: int) -> _LatentOrder:
    k = acts.shape[1]
    acts, latents = acts.reshape(-1), indices.reshape(-1)
    # Padding slots would pile up on latent 0: they sort behind the last latent and are cut off.
    latents, order = sums.sort_stably(torch.where(acts != 0, latents, M).int())
    bounds = torch.searchsorted(
        latents, torch.arange(M + 1, dtype=torch.int32, device=latents.device)
    )
    return _LatentOrder(order, order.div(max(k, 1), rounding_mode="floor"), bounds)


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
    need_acts, _, need_rows, _ = ctx.needs_input_grad
    acts, indices, rows = ctx.saved_tensors
    needed = need_acts, need_rows
    grad_acts, grad_rows = _outer_backward(acts, indices, rows, grad, needed, ctx.options)
    return grad_acts, None, grad_rows, None


def _outer_backward(
    acts: Tensor,
    indices: Tensor,
    rows: Tensor,
    grad: Tensor,
    needed: tuple[bool, bool],
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the acts and rows of `scatter_outer`, for gradients of gradients. The transposed
    dense code times rows is linear in both."""
    grad = grad.contiguous()
    grad_acts = grad_rows = None
    if needed[0]:
        grad_acts = torch.ops.resae.sddmm(rows, indices, grad, **options)
    if needed[1]:
        grad_rows = torch.ops.resae.sparse_decode([acts], [indices], [grad], None, None, **options)
    return grad_acts, grad_rows


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
    return _order_by_latent(acts, indices, M).launch([acts], [rows], total)[0], total


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


def autoencoder_gradients(
    acts: Tensor,
    indices: Tensor,
    grad: Tensor,
    gate: Tensor,
    rows: Tensor,
    M: int,
    implementation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """`scatter_outer(acts, indices, grad, M)`, and `encoder_gradients(gate, indices, rows, M)` for
    gates that are 0 where the acts are: the gradients of a dictionary, of an encoder and of its
    bias, from one sort of the code. Bit for bit the same, but where a gate of 0 moves a border
    between two PIECEs of a latent's sum, or meets a row that is not finite."""
    return torch.ops.resae.autoencoder_gradients(
        acts, indices, grad, gate, rows, M, implementation=implementation
    )


def _autoencoder_gradients(
    acts: Tensor,
    indices: Tensor,
    grad: Tensor,
    gate: Tensor,
    rows: Tensor,
    M: int,
    *,
    implementation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation_for("autoencoder_gradients", rows, implementation or None)
    acc_dtype = accumulation_dtype(gate.dtype)
    if rows.shape[1] == 0 or any(dense.is_dense("", indices, M, r.dtype) for r in (grad, rows)):
        outer = _scatter_outer(acts, indices, grad, M, implementation=chosen)
        return outer, *_encoder_gradients(gate, indices, rows, M, implementation=chosen)
    if chosen == "triton":
        total = gate.new_empty(M, dtype=acc_dtype)
        order = _order_by_latent(acts, indices, M)
        encoder, dictionary = order.launch([gate, acts], [rows, grad], total)
        return dictionary, encoder, total
    total = scatter_sum(gate.to(acc_dtype), indices, M, chosen)
    if native.takes(acts, grad, gate, rows):
        dictionary, encoder = native.scatter_outer([acts, gate], indices, [grad, rows], M)
        return dictionary, encoder, total
    order = _order_by_latent(acts, indices, M)
    of_sum = order.tokens, order.bounds
    dictionary, encoder = (
        sums.scatter_outer(order.sorted(w), *of_sum, r) for w, r in ((acts, grad), (gate, rows))
    )
    return dictionary, encoder, total


def _autoencoder_gradients_fake(
    acts: Tensor,  # noqa: ARG001
    indices: Tensor,
    grad: Tensor,
    gate: Tensor,
    rows: Tensor,
    M: int,
    **_options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty(M, grad.shape[1]), *_encoder_gradients_fake(gate, indices, rows, M)


def _autoencoder_gradients_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: object
) -> None:
    del output
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(*inputs[:5])
    ctx.set_materialize_grads(False)


def _autoencoder_gradients_backward(
    ctx: Any,
    grad_dictionary: Tensor | None,
    grad_encoder: Tensor | None,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """For gradients of gradients: those of the two sums, one after the other."""
    acts, indices, grad, gate, rows = ctx.saved_tensors
    need_acts, _, need_grad, need_gate, need_rows, _ = ctx.needs_input_grad
    of_acts = of_grad = of_gate = of_rows = None
    if grad_dictionary is not None:
        needed = need_acts, need_grad
        of_acts, of_grad = _outer_backward(
            acts, indices, grad, grad_dictionary, needed, ctx.options
        )
    if grad_encoder is not None:
        needed = need_gate, need_rows
        of_gate, of_rows = _outer_backward(gate, indices, rows, grad_encoder, needed, ctx.options)
    if grad_total is not None and need_gate:
        named = grad_total[indices].to(gate.dtype)
        of_gate = named if of_gate is None else of_gate + named
    return of_acts, None, of_grad, of_gate, of_rows, None


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
    "autoencoder_gradients(Tensor acts, Tensor indices, Tensor grad, Tensor gate, Tensor rows, "
    "SymInt M, *, str implementation='') -> (Tensor dictionary, Tensor encoder, Tensor total)",
    _autoencoder_gradients,
    _autoencoder_gradients_fake,
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
    ("autoencoder_gradients", _autoencoder_gradients_backward, _autoencoder_gradients_setup),
    ("sddmm", _sddmm_backward, _sddmm_setup),
):
    torch.library.register_autograd(
        f"resae::{_op}", _its_backward, setup_context=_its_setup, lib=LIBRARY
    )
