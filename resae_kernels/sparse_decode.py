"""Sparse decode: y[n] = Σ_j acts[n,j] · W_dec[indices[n,j]] + bias + base[n]; its squared error.

N tokens, k active latents, D width, M latents. 2·N·k·D FLOPs against 2·N·M·D dense; bound by
gathering N·k·D weight elements. Codes of several dictionaries are summed in one call.

Backward: d acts is a sampled product ⟨g[n], W_dec[indices[n,j]]⟩; dW_dec is summed latent by latent
over the codes sorted by latent (`latent_outer`), so that each row is one ordered sum:
deterministic, no atomics, no `[N, M]`. Gao et al. 2024 (arXiv 2406.04093), appendix on sparse
kernels.

Where k is a large share of M, each of the three is faster as a dense product over the code
scattered into `[n, M]`, chunk of rows by chunk: the `form` "dense", with as fixed an order of sums.

Both implementations do this: `torch` with the compiled CPU library or, without it and in float64,
with `embedding_bag`; `triton` with the kernels at the end.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels import _launch, native
from resae_kernels._launch import AotCase, tl, triton
from resae_kernels.reference import ReconstructionError, accumulation_dtype

GATHER_BYTES = 64 << 20
"""Bound on the gathered rows `[n, k, D]` that the torch gradient of the acts holds at once."""

DENSE_RATIO = {"cpu": (3, 3), "cuda": (24, 144)}
"""M/k up to which the dense form is taken, by device type, for wide and for 16-bit dtypes.

CUDA: NOT measured, from a cost model of one large GPU: rows gathered at 5.5 TB/s from its L2 cache
take 144·k/M of the time of a bf16 product at 790 TFLOP/s, 24·k/M of an fp32 one at 67.
CPU: measured 2026-11-21 on one core of an AMD EPYC, fp32, N = 256 and 2048, D = 512 and 768,
M = 2048, gather and dense in turns, fastest of several: sum and both gradients together take 1.7 to
1.9 times as long gathered at M/k = 2, 1.06 to 1.24 times at 3, 0.79 to 0.92 times at 4. Each alone
is even at about 2 (the sum), 2.5 to 3.5 (the gradient of W_dec) and 5 to 6 (of the acts). That was
before the compiled library took all three, and is what float64 and machines without it have."""
RADIX_ENTRIES = 32_768
"""From so many entries on, torch sorts integers on a CPU by radix, too (its `GRAIN_SIZE`).
Measured 2026-11-21 on one core of an AMD EPYC: 8,192 entries of 512 latents 0.33 ms in torch, 0.03
by numpy; 65,536 of 65,537 latents 0.33 and 0.38."""
DENSE_TOKENS = 256
"""Tokens from which on it is: with fewer, a product is bound by reading all M rows of W_dec (the
same cost model; a CPU was measured from here on)."""


def sparse_decode(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    *,
    bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    form: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`Σ_j acts_j · W_dec[indices_j] (+ bias) (+ base)` (formula: `reference.sparse_decode`).

    Args:
        acts: `[..., k]`; or a list, one per dictionary, with the same leading shape.
        indices: `[..., k]` int64, 0 ≤ index < M; or a list.
        W_dec: `[M, D]`, one direction per contiguous row; or a list with the same D.
        bias: `[D]`, added to every token.
        base: `[..., D]`, added token by token.
        form: "gather", "dense", or None: dense for a dictionary with M ≤ DENSE_RATIO · k and at
            least DENSE_TOKENS tokens, otherwise gather. Of the gradients too.
        implementation: "torch" or "triton", of the gradients too; None: triton on CUDA, otherwise
            torch.

    Returns:
        `[..., D]` in W_dec's dtype.

    Raises:
        TypeError: dtypes that differ or are not floating (int64 for indices).
        ValueError: shapes, devices or list lengths that do not fit.
        RuntimeError: an index outside its dictionary (checked by torch on CPU, nowhere else).

    Note:
        Padding slots (act 0) add nothing to the sum. Gradients reach acts, W_dec, bias and base.
        Under autocast the acts are cast to W_dec's dtype.

        The forms agree up to rounding where W_dec and the incoming gradient are finite. The dense
        one multiplies what a code leaves out by 0: an inf or NaN in a row of W_dec makes its
        columns of every token NaN (and in a token's gradient, those of every row of W_dec's
        gradient), where the gather sees it in the tokens that name the row alone. On CUDA it leaves
        products to torch's GEMM, in the dtype of the inputs: fp32 follows the TF32 setting of
        `torch.backends.cuda.matmul`, and in 16 bit acts that name the same latent in one token
        (no code of `topk_encode` has such) are rounded once more, as their sum.
    """
    op = "sparse_decode"
    if form is None and implementation is None:
        out = _decode_at_once(acts, indices, W_dec, bias, base)
        if out is not None:
            return out
    if form not in (None, "gather", "dense"):
        raise ValueError(
            f"{op}: form={form!r}, expected 'gather', 'dense' or None (by the number of tokens "
            f"and M/k)"
        )
    offsets = {"bias": bias, "base": base}
    *codes, leading = _check(op, acts, indices, W_dec, offsets)
    out = torch.ops.resae.sparse_decode(
        *codes, **offsets, implementation=implementation or "", form=form or ""
    )
    return out.reshape(*leading, out.shape[-1])


def _decode_at_once(
    acts: Any, indices: Any, W_dec: Any, bias: Tensor | None, base: Tensor | None
) -> Tensor | None:
    """The decode by one call of the compiled library; None: not the way for these arguments, or one
    of them is wrong (`_check` tells which)."""
    if type(acts) is Tensor:
        acts, indices, W_dec = (acts,), (indices,), (W_dec,)
    elif not all(type(t) in (list, tuple) for t in (acts, indices, W_dec)):
        return None
    if len(indices) != len(acts) or len(W_dec) != len(acts):
        return None
    if not native.direct(*acts, *W_dec, bias, base):
        return None
    leading, D = acts[0].shape[:-1], W_dec[0].shape[-1:]
    for a, i, W in zip(acts, indices, W_dec, strict=True):
        shape = a.shape
        if (
            type(i) is not Tensor
            or i.dtype is not torch.int64
            or not i.is_cpu
            or i.shape != shape
            or not shape
            or shape[:-1] != leading
            or W.ndim != 2
            or W.shape[1:] != D
        ):
            return None
    N = leading.numel()
    if N >= DENSE_TOKENS and any(
        _is_dense("", i.reshape(N, -1), W.shape[0], W.dtype)
        for i, W in zip(indices, W_dec, strict=True)
    ):
        return None
    if bias is not None and bias.shape != D or base is not None and base.shape != leading + D:
        return None
    return native.decode(acts, indices, W_dec, bias, base)


def reconstruction_error(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    target: Tensor,  # [..., D]
    *,
    bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    implementation: str | None = None,
) -> ReconstructionError:
    """`sparse_decode(…) − target` and its squares summed over D, the reconstruction itself never
    written (formula: `reference.reconstruction_error`).

    Args:
        acts, indices, W_dec, bias, base, implementation: as in `sparse_decode`, in the form of its
            rule.
        target: `[..., D]`, what is to be reconstructed.

    Returns:
        `ReconstructionError(error, squared)`: `[..., D]` in W_dec's dtype, rounded once, and
        `[...]` in the accumulation dtype (fp32 for 16 bit), of the error before it is rounded.
        `squared.sum()` is the numerator of the FVU.

    Raises:
        As `sparse_decode`; target like base.

    Note:
        Gradients reach every floating input but no index, through both outputs; that of `squared`
        is taken from the rounded error. Under autocast everything is cast to W_dec's dtype.
    """
    offsets = {"target": target, "bias": bias, "base": base}
    *codes, leading = _check("reconstruction_error", acts, indices, W_dec, offsets)
    error, squared = torch.ops.resae.reconstruction_error(
        *codes, **offsets, implementation=implementation or ""
    )
    return ReconstructionError(error.reshape(target.shape), squared.reshape(leading))


def _check(
    op: str,
    acts: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    W_dec: Tensor | Sequence[Tensor],
    offsets: dict[str, Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], torch.Size]:
    """Lists of acts and indices `[N, k]` and of W_dec, and the leading shape. Tensors per token
    among the offsets become `[N, D]` in place."""
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
        offsets.update({n: None if t is None else t.to(W.dtype) for n, t in offsets.items()})
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
    for name, tensor in offsets.items():
        if tensor is not None:
            shape = (D,) if name == "bias" else (*leading, D)
            _launch.check_shape(op, name, tensor, shape, "tokens of acts, width of W_dec")
            _launch.check_like(op, name, tensor, "W_dec", W)
            if name != "bias":
                offsets[name] = tensor.reshape(N, D)
    return (
        [a.reshape(N, a.shape[-1]) for a in acts],
        [i.reshape(N, i.shape[-1]) for i in indices],
        list(W_dec),
        leading,
    )


# -- op ------------------------------------------------------------------------------------------


def _decode(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    bias: Tensor | None,
    base: Tensor | None,
    *,
    implementation: str = "",
    form: str = "",
) -> Tensor:
    return _reconstruct(acts, indices, W_dec, bias, base, None, implementation, form)[0]


def _error(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    target: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    *,
    implementation: str = "",
) -> tuple[Tensor, Tensor]:
    error, squared = _reconstruct(acts, indices, W_dec, bias, base, target, implementation, "")
    assert squared is not None
    return error, squared


def _reconstruct(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    bias: Tensor | None,
    base: Tensor | None,
    target: Tensor | None,
    implementation: str,
    form: str,
) -> tuple[Tensor, Tensor | None]:
    """The sum; or what it is off a target, and the squares of that summed over D."""
    chosen = _launch.implementation_for("sparse_decode", W_dec[0], implementation or None)
    dtype = W_dec[0].dtype
    wide = accumulation_dtype(dtype)
    codes = list(zip(acts, indices, W_dec, strict=True))
    dense = [_is_dense(form, i, W.shape[0], dtype) for _, i, W in codes]
    compiled = chosen == "torch" and target is None and not any(dense)
    if compiled and native.takes(*acts, *W_dec, bias, base):
        return native.decode(acts, indices, W_dec, bias, base), None
    gathered: list[tuple[Tensor, Tensor, Tensor]] = []
    total = base
    for code, is_dense in zip(codes, dense, strict=True):
        if is_dense:
            total = _dense_sum(*code, total, chosen)
        else:
            gathered.append(code)
    if gathered and chosen == "triton":
        a, i, W = (list(tensors) for tensors in zip(*gathered, strict=True))
        return _launch_decode(a, i, W, bias, total, None, target)
    if len(gathered) == 1 and bias is None and total is None and target is None:
        return _gather_sum(*gathered[0], dtype), None  # a single sum is rounded once by itself
    # Several terms are added up in the accumulation dtype.
    if gathered:
        rest, total = total, _gather_sum(*gathered[0], wide)
        for code in gathered[1:]:
            total += _gather_sum(*code, wide)
        total = total if rest is None else total.add_(rest)
    assert total is not None
    if bias is not None:
        total += bias
    if target is None:
        return total.to(dtype), None
    total -= target
    return total.to(dtype), total.square().sum(-1)


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


def _decode_fake(acts, indices, W_dec, bias, base, *, implementation="", form=""):  # noqa: ARG001
    return acts[0].new_empty(acts[0].shape[0], W_dec[0].shape[1])


def _error_fake(acts, indices, W_dec, target, bias, base, *, implementation=""):  # noqa: ARG001
    wide = accumulation_dtype(target.dtype)
    return target.new_empty(target.shape), target.new_empty(target.shape[0], dtype=wide)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    del output
    acts, indices, W_dec, _, _ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    # acts weigh dW_dec, W_dec gives d acts, indices say where: no activation is kept.
    ctx.save_for_backward(*acts, *indices, *W_dec)


def _backward(ctx, grad):
    n = len(ctx.saved_tensors) // 3
    acts, indices, W_dec = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(3))
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None
    grad = grad.contiguous()
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, [grad] * n, _needed(ctx, n), **ctx.options
    )
    _, _, _, need_bias, need_base = ctx.needs_input_grad
    return (
        grad_acts,
        [None] * n,
        grad_W,
        grad.sum(0) if need_bias else None,
        grad if need_base else None,
    )


def _error_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    acts, indices, W_dec, *_ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    # The error gives the gradient of its squares; the rest as in the decode.
    ctx.save_for_backward(*acts, *indices, *W_dec, output[0])


def _error_backward(ctx, grad_error, grad_squared):
    *codes, error = ctx.saved_tensors
    n = len(codes) // 3
    acts, indices, W_dec = (codes[i * n : (i + 1) * n] for i in range(3))
    grad = grad_error
    if grad_squared is not None:
        grad = (2 * grad_squared).unsqueeze(1) * error
        grad = (grad if grad_error is None else grad + grad_error).to(error.dtype)
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None, None
    grad = grad.contiguous()
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, [grad] * n, _needed(ctx, n), **ctx.options
    )
    need_target, need_bias, need_base = ctx.needs_input_grad[3:]
    return (
        grad_acts,
        [None] * n,
        grad_W,
        -grad if need_target else None,
        grad.sum(0) if need_bias else None,
        grad if need_base else None,
    )


def _needed(ctx, n: int) -> list[tuple[bool, bool]]:
    """Per dictionary: does acts, does W_dec need its gradient?"""
    need_acts, _, need_W = ctx.needs_input_grad[:3]

    def flag(need, i: int) -> bool:
        return bool(need[i]) if isinstance(need, (list, tuple)) else bool(need)

    return [(flag(need_acts, i), flag(need_W, i)) for i in range(n)]


def code_gradients(acts, indices, W_dec, grads, needed, *, implementation="", form=""):
    """Gradients of each code's acts and of its dictionary, given the gradient of its decode."""
    options = {"implementation": implementation, "form": form}
    grad_acts: list[Tensor | None] = []
    grad_W: list[Tensor | None] = []
    for a, i, W, grad, (need_acts, need_W) in zip(acts, indices, W_dec, grads, needed, strict=True):
        grad_acts.append(
            torch.ops.resae.sampled_product(grad, i, W, **options) if need_acts else None
        )
        grad_W.append(latent_outer(a, i, grad, W.shape[0], **options) if need_W else None)
    return grad_acts, grad_W


# -- the sums of the backward ----------------------------------------------------------------------


def latent_outer(
    acts: Tensor,
    indices: Tensor,
    rows: Tensor,
    M: int,
    implementation: str = "",
    form: str = "",
) -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j] · rows[n]`, `[M, D]`: the gradient of a
    dictionary (rows = gradient of the decode) or of an encoder (rows = residual)."""
    return torch.ops.resae.latent_outer(
        acts, indices, rows, M, implementation=implementation, form=form
    )


def _latent_outer(
    acts: Tensor,
    indices: Tensor,
    rows: Tensor,
    M: int,
    *,
    implementation: str = "",
    form: str = "",
) -> Tensor:
    chosen = _launch.implementation_for("latent_outer", rows, implementation or None)
    if _is_dense(form, indices, M, rows.dtype):
        return _dense_outer(acts, indices, rows, M, chosen)
    if chosen == "torch" and native.takes(acts, rows):
        return native.latent_outer(acts, indices, rows, M)
    k = acts.shape[1]
    acts, latents = acts.reshape(-1), indices.reshape(-1)
    # Padding slots would pile up on latent 0: they sort behind the last latent and are cut off.
    latents, order = _sorted_stably(torch.where(acts != 0, latents, M).int())
    bounds = torch.searchsorted(
        latents, torch.arange(M + 1, dtype=torch.int32, device=latents.device)
    )
    tokens, weights = order.div(max(k, 1), rounding_mode="floor"), acts[order]
    if chosen == "triton":
        return _launch_latent_outer(weights, tokens, bounds, rows)
    used = int(bounds[M])
    return F.embedding_bag(
        tokens[:used],
        rows.contiguous(),
        bounds,
        per_sample_weights=weights[:used],
        mode="sum",
        include_last_offset=True,
    )


def _sorted_stably(latents: Tensor) -> tuple[Tensor, Tensor]:
    """`latents.sort(stable=True)` of int32 from 0 on.

    Torch sorts short lists on a CPU by comparing, ten times slower than numpy's radix sort, which
    there is for 16 bits: two rounds of it, the second only where a latent needs it.
    """
    if latents.is_cuda or latents.numel() >= RADIX_ENTRIES:
        return latents.sort(stable=True)
    keys = latents.numpy()
    order = keys.astype("uint16").argsort(kind="stable")
    high = keys >> 16
    if high.any():
        order = order[high[order].astype("uint16").argsort(kind="stable")]
    order = torch.from_numpy(order)
    return latents[order], order


def _latent_outer_fake(acts, indices, rows, M, *, implementation="", form=""):  # noqa: ARG001
    return rows.new_empty(M, rows.shape[1])


def _latent_outer_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    del output
    acts, indices, rows, _ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(acts, indices, rows)


def _latent_outer_backward(ctx, grad):
    """For gradients of gradients. The transposed dense code times rows is linear in both."""
    acts, indices, rows = ctx.saved_tensors
    need_acts, _, need_rows, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_acts = grad_rows = None
    if need_acts:
        grad_acts = torch.ops.resae.sampled_product(rows, indices, grad, **ctx.options)
    if need_rows:
        grad_rows = torch.ops.resae.sparse_decode(
            [acts], [indices], [grad], None, None, **ctx.options
        )
    return grad_acts, None, grad_rows, None


def latent_sum(acts: Tensor, indices: Tensor, M: int, implementation: str = "") -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j]`, `[M]`: the gradient of an encoder bias."""
    if acts.device.type == "cpu" and implementation != "triton":
        # One after another on a CPU, in the order of the codes: no need to sort them.
        wide = acts.to(accumulation_dtype(acts.dtype))
        if native.takes(wide):
            return native.latent_sum(wide, indices, M).to(acts.dtype)
        total = wide.new_zeros(M).index_add(0, indices.reshape(-1), wide.reshape(-1))
        return total.to(acts.dtype)
    ones = acts.new_ones(acts.shape[0], 1)
    # One column: never worth a scattered code.
    return latent_outer(acts, indices, ones, M, implementation, form="gather").squeeze(1)


def pair_products(x: Tensor, tokens: Tensor, W: Tensor, latents: Tensor) -> Tensor:
    """`[P]`: ⟨x[tokens], W[latents]⟩ of pairs in any order, on a CPU in fp32 or fp64.

    The gradient of `embedding_bag` in its weights is this product, with no row copied. Torch keeps
    it among its private ops; where it has moved, rows are gathered.
    """
    private = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if private is not None:
        x, W, mode_sum = x.contiguous(), W.contiguous(), 0
        return private(x, W, latents.contiguous(), tokens.new_zeros(1), tokens, mode_sum)
    out = x.new_empty(len(tokens))
    for chunk in _chunks(len(tokens), W.shape[1] * W.itemsize, GATHER_BYTES):
        out[chunk] = (x[tokens[chunk]] * W[latents[chunk]]).sum(-1)
    return out


def _sampled_product(
    grad: Tensor, indices: Tensor, W: Tensor, *, implementation: str = "", form: str = ""
) -> Tensor:
    chosen = _launch.implementation_for("sampled_product", W, implementation or None)
    if _is_dense(form, indices, W.shape[0], W.dtype):
        return _dense_sampled_product(grad, indices, W, chosen)
    if chosen == "triton":
        return _launch_sampled_product(grad, indices, W)
    if native.takes(grad, W):
        return native.sampled_product(grad, indices, W)
    (N, k), (M, D) = indices.shape, W.shape
    wide = accumulation_dtype(W.dtype)
    if W.device.type == "cpu" and indices.numel() >= (1 if W.dtype == wide else M):
        # In 16 bit the dictionary is widened once, not row by row as often as codes name it.
        tokens = torch.arange(N).repeat_interleave(k)
        out = pair_products(grad.to(wide), tokens, W.to(wide), indices.reshape(-1))
        return out.view(N, k).to(grad.dtype)
    out = grad.new_empty(N, k)
    for chunk in _chunks(N, k * D * wide.itemsize, GATHER_BYTES):
        gathered = W[indices[chunk]].to(wide)
        out[chunk] = (gathered @ grad[chunk].to(wide).unsqueeze(-1)).squeeze(-1).to(out.dtype)
    return out


def _sampled_product_fake(grad, indices, W, *, implementation="", form=""):  # noqa: ARG001
    return grad.new_empty(indices.shape)


def _sampled_product_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    del output
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(*inputs)


def _sampled_product_backward(ctx, grad):
    """For gradients of gradients. The product is linear in the rows on either side."""
    rows, indices, W = ctx.saved_tensors
    need_rows, _, need_W = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_rows = grad_W = None
    if need_rows:
        grad_rows = torch.ops.resae.sparse_decode([grad], [indices], [W], None, None, **ctx.options)
    if need_W:
        grad_W = latent_outer(grad, indices, rows, W.shape[0], **ctx.options)
    return grad_rows, None, grad_W


# -- the dense form --------------------------------------------------------------------------------


def _is_dense(form: str, indices: Tensor, M: int, dtype: torch.dtype) -> bool:
    """As asked, or by the rule."""
    if form:
        return form == "dense"
    wide, narrow = DENSE_RATIO.get(indices.device.type, DENSE_RATIO["cuda"])
    N, k = indices.shape
    return N >= DENSE_TOKENS and (narrow if dtype.itemsize == 2 else wide) * k >= M


def _chunks(N: int, row_bytes: int, bound: int) -> Iterator[slice]:
    """Rows 0 to N, as many at a time as the bound allows, at least one."""
    rows = max(1, bound // max(1, row_bytes))
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


def _factor_dtype(tensor: Tensor, implementation: str) -> torch.dtype:
    """Of the factors of a product whose sums are in the accumulation dtype."""
    narrow = implementation == "triton" and tensor.is_cuda
    return tensor.dtype if narrow else accumulation_dtype(tensor.dtype)


def product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """`a @ b`, or `total += a @ b`, in the accumulation dtype, also under autocast: that leaves
    products into given memory alone."""
    wide = accumulation_dtype(a.dtype)
    if a.dtype != wide and a.is_cuda:  # 16-bit factors, sums in fp32: what tensor cores compute
        summed = torch.mm(a, b, out_dtype=wide)
        return summed if total is None else total.add_(summed)
    if total is None:
        total = a.new_empty(a.shape[0], b.shape[1], dtype=wide)
        return torch.mm(a.to(wide), b.to(wide), out=total)
    return total.addmm_(a.to(wide), b.to(wide))


def _scattered(
    acts: Tensor, indices: Tensor, M: int, implementation: str
) -> Iterator[tuple[slice, Tensor]]:
    """The code as `[n, M]`, chunk of rows by chunk, all in the same memory. Acts that name the same
    latent are added up in the accumulation dtype, in a fixed order."""
    dtype = _factor_dtype(acts, implementation)
    bound = _launch.workspace_bytes(acts)
    chunks = list(_chunks(acts.shape[0], M * dtype.itemsize, bound))
    memory = acts.new_empty(chunks[0].stop if chunks else 0, M, dtype=dtype)
    for chunk in chunks:
        a, i = acts[chunk], indices[chunk]
        code = memory[: a.shape[0]].zero_()
        if implementation == "triton":
            _launch_scatter(code, a, i)
        elif acts.is_cuda:
            # Slot by slot: no two threads add to one entry.
            for slot in range(a.shape[1]):
                code.scatter_add_(1, i[:, slot : slot + 1], a[:, slot : slot + 1].to(dtype))
        else:
            code.scatter_add_(1, i, a.to(dtype))
        yield chunk, code


def _dense_sum(
    acts: Tensor, indices: Tensor, W: Tensor, base: Tensor | None, implementation: str
) -> Tensor:
    """`[N, D]` in the accumulation dtype, base added: new memory."""
    wide = accumulation_dtype(W.dtype)
    N, (M, D) = acts.shape[0], W.shape
    total = W.new_zeros(N, D, dtype=wide) if base is None else base.to(wide, copy=True)
    W = W.to(_factor_dtype(W, implementation))
    for chunk, code in _scattered(acts, indices, M, implementation):
        product(code, W, total[chunk])
    return total


def _dense_outer(
    acts: Tensor, indices: Tensor, rows: Tensor, M: int, implementation: str
) -> Tensor:
    total = rows.new_zeros(M, rows.shape[1], dtype=accumulation_dtype(rows.dtype))
    for chunk, code in _scattered(acts, indices, M, implementation):
        product(code.T, rows[chunk].to(code.dtype), total)
    return total.to(rows.dtype)


def _dense_sampled_product(grad: Tensor, indices: Tensor, W: Tensor, implementation: str) -> Tensor:
    out = grad.new_empty(indices.shape)
    wide, dtype = accumulation_dtype(W.dtype), _factor_dtype(W, implementation)
    W_t = W.to(dtype).T
    bound = _launch.workspace_bytes(W)
    for chunk in _chunks(grad.shape[0], W.shape[0] * wide.itemsize, bound):
        # Those of all latents, `[n, M]`, then of the ones named.
        out[chunk] = product(grad[chunk].to(dtype), W_t).gather(1, indices[chunk]).to(out.dtype)
    return out


_launch.register(
    "sparse_decode(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor? bias, Tensor? base, "
    "*, str implementation='', str form='') -> Tensor",
    _decode,
    _decode_fake,
)
_launch.register(
    "reconstruction_error(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor target, "
    "Tensor? bias, Tensor? base, *, str implementation='') -> (Tensor error, Tensor squared)",
    _error,
    _error_fake,
)
_launch.register(
    "latent_outer(Tensor acts, Tensor indices, Tensor rows, SymInt M, *, str implementation='', "
    "str form='') -> Tensor",
    _latent_outer,
    _latent_outer_fake,
)
_launch.register(
    "sampled_product(Tensor grad, Tensor indices, Tensor W, *, str implementation='', "
    "str form='') -> Tensor",
    _sampled_product,
    _sampled_product_fake,
)
for _op, _its_backward, _its_setup in (
    ("sparse_decode", _backward, _setup_context),
    ("reconstruction_error", _error_backward, _error_setup),
    ("latent_outer", _latent_outer_backward, _latent_outer_setup),
    ("sampled_product", _sampled_product_backward, _sampled_product_setup),
):
    torch.library.register_autograd(
        f"resae::{_op}", _its_backward, setup_context=_its_setup, lib=_launch.LIBRARY
    )


# -- launchers -------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How many gathered rows a program loads at a time, and which part of each."""

    rows: int
    row_bytes: int
    num_warps: int

    def constants(self, D: int, dtype: torch.dtype) -> dict[str, Any]:
        """What every kernel here is compiled for."""
        return {
            "D": D,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "BD": min(self.row_bytes // dtype.itemsize, triton.next_power_of_2(D)),
        }

    @property
    def loads(self) -> int:
        """128-bit loads of a thread for one pass over the tile."""
        return self.rows * self.row_bytes // (self.num_warps * 512)

    def options(self) -> dict[str, Any]:
        # One stage: pipelined loads would pass through shared memory.
        return _launch.launch_options(self.num_warps, num_stages=1)


# A warp loads 512 bytes at once. Where a row's part is 512 bytes a warp, each thread holds its
# columns of all rows: as many loads in flight as rows, and a sum that crosses no thread.
_launch.TILES |= {
    "decode": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=8, row_bytes=512, num_warps=1), measured=None),
        alternatives=(
            Tile(rows=4, row_bytes=512, num_warps=1),
            Tile(rows=8, row_bytes=1024, num_warps=2),
        ),
    ),
    "decode_few": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=64, row_bytes=128, num_warps=4), measured=None),
        alternatives=(
            Tile(rows=64, row_bytes=64, num_warps=4),
            Tile(rows=32, row_bytes=128, num_warps=4),
        ),
    ),
    "sampled_product": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=16, row_bytes=512, num_warps=4), measured=None),
        alternatives=(
            Tile(rows=8, row_bytes=512, num_warps=2),
            Tile(rows=16, row_bytes=256, num_warps=2),
        ),
    ),
    "latent_outer": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=8, row_bytes=1024, num_warps=2), measured=None),
        alternatives=(
            Tile(rows=8, row_bytes=512, num_warps=1),
            Tile(rows=4, row_bytes=1024, num_warps=2),
        ),
    ),
}
SCATTER_SLOTS = 64
"""Slots of a row that a program of the scatter compares with as many at a time. Chosen from
ahead-of-time compilation, not measured."""
FEW_TOKENS = 16
"""Up to here a decode spreads each token over many narrow programs (cost model, not measured)."""
PIECE = 256
"""Longest run of one latent's entries that one program sums: a latent that fires on every second
token would otherwise keep one program busy long after the rest."""


def _decode_name(N: int) -> str:
    return "decode_few" if N <= FEW_TOKENS else "decode"


def _decode_constants(
    tile: Tile, N: int, widths: tuple[int, ...], D: int, dtype: torch.dtype
) -> dict[str, Any]:
    rows = min(tile.rows, triton.next_power_of_2(max(1, *widths)))
    return {"K": widths, "BK": rows, "SPREAD": N <= FEW_TOKENS} | tile.constants(D, dtype)


def _launch_decode(
    acts, indices, W_dec, bias, base, out=None, target=None
) -> tuple[Tensor, Tensor | None]:
    """One launch for all dictionaries. bias and base may be wider than the acts. With a target
    `out` is what the sum is off it; then, second, the squares of that summed over D."""
    N, D = acts[0].shape[0], W_dec[0].shape[1]
    if out is None:
        out = acts[0].new_empty(N, D)
    tile = _launch.tile(_decode_name(N), out.device)
    constants = _decode_constants(tile, N, tuple(a.shape[1] for a in acts), D, out.dtype)
    slices = triton.cdiv(D, constants["BD"])
    squared = None
    if target is not None:
        squared = out.new_empty(N, slices, dtype=accumulation_dtype(out.dtype))
    if out.numel() > 0:
        with torch.cuda.device_of(out):
            # Tokens are the fast axis: all of them pass over one slice of W_dec while it is in
            # cache.
            _decode_kernel[(N, slices)](
                out,
                tuple(a.contiguous() for a in acts),
                tuple(i.contiguous() for i in indices),
                tuple(W.contiguous() for W in W_dec),
                None if bias is None else bias.contiguous(),
                None if base is None else base.contiguous(),
                None if target is None else target.contiguous(),
                squared,
                **constants,
                **tile.options(),
            )
    return out, None if squared is None else squared.sum(1)


def _launch_scatter(code: Tensor, acts: Tensor, indices: Tensor) -> None:
    """Add each row's acts to the row of `code`, `[n, M]`, which holds zeros."""
    n, k = acts.shape
    if acts.numel() == 0:
        return
    with torch.cuda.device_of(code):
        _scatter_kernel[(n,)](
            code,
            acts.contiguous(),
            indices.contiguous(),
            code.shape[1],
            **_scatter_constants(k, acts.dtype),
            **_launch.launch_options(num_warps=4, num_stages=1),
        )


def _scatter_constants(k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "K": k,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BK": min(SCATTER_SLOTS, triton.next_power_of_2(k)),
    }


def _launch_sampled_product(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    N, k = indices.shape
    out = grad.new_empty(N, k)
    if out.numel() == 0:
        return out
    tile = _launch.tile("sampled_product", out.device)
    with torch.cuda.device_of(out):
        _sampled_product_kernel[(N, triton.cdiv(k, tile.rows))](
            out,
            grad.contiguous(),
            indices.contiguous(),
            W.contiguous(),
            K=k,
            BK=tile.rows,
            **tile.constants(W.shape[1], W.dtype),
            **tile.options(),
        )
    return out


def _launch_latent_outer(weights: Tensor, tokens: Tensor, bounds: Tensor, rows: Tensor) -> Tensor:
    """`out[m] = Σ weights[e] · rows[tokens[e]]` over the entries `bounds[m] ≤ e < bounds[m + 1]`.

    The first PIECE entries of a latent are summed by the program that writes its row; what lies
    beyond, before that, in pieces by programs of their own. How many of these there can be follows
    from the shapes: nothing waits for the device.
    """
    M, D = bounds.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(M, D)
    if out.numel() == 0:
        return out
    pieces = weights.shape[0] // PIECE
    # Where PIECE divides the entries of a latent the last of its pieces is empty: zeros.
    beyond = bounds.diff().div(PIECE, rounding_mode="floor")
    piece_bounds = F.pad(beyond.cumsum(0), (1, 0))
    piece_latent = torch.searchsorted(
        piece_bounds[1:], torch.arange(pieces, device=rows.device), right=True
    )
    partial = rows.new_empty(pieces, D, dtype=accumulation_dtype(rows.dtype))
    entries = (weights, tokens, rows.contiguous(), bounds, piece_bounds)
    tile = _launch.tile("latent_outer", out.device)
    constants = {"PIECE": PIECE, "BE": tile.rows} | tile.constants(D, rows.dtype)
    slices = triton.cdiv(D, constants["BD"])
    settings = constants | tile.options()
    with torch.cuda.device_of(out):
        if pieces > 0:
            _latent_piece_kernel[(pieces, slices)](partial, *entries, piece_latent, M, **settings)
        _latent_outer_kernel[(M, slices)](out, *entries, partial, **settings)
    return out


def aot_cases() -> Iterator[AotCase]:
    """Every kernel as it runs at the shapes that matter, for a compiler without a device."""
    D, k = 2048, 64
    i64 = "*i64:16"
    for name, dtype, architectures in (
        ("bf16", torch.bfloat16, ("sm_80", "sm_90", "sm_100")),
        ("fp32", torch.float32, ("sm_90",)),
    ):
        floats = f"*{name}:16"
        for (N, T, target), tile in (
            (case, tile)
            for case in ((8192, 1, False), (1, 1, False), (1, 4, False), (8192, 1, True))
            for tile in _launch.TILES[_decode_name(case[0])].candidates("other")
        ):
            constants = _decode_constants(tile, N, (k,) * T, D, dtype)
            pointers = {"out": floats, "bias": floats, "base": "*fp32:16"}
            # Few tokens make few programs: their registers are not what limits them.
            few = {"shared": 1024, "barriers": 5, "registers": 128}
            many = {"shared": 0, "barriers": 0, "registers": 80}
            expect = few if constants["SPREAD"] else many
            if target:
                pointers |= {"target": floats, "squared": "*fp32:16"}
                # The squares of several warps meet in shared memory.
                if tile.num_warps > 1:
                    expect = expect | {"shared": 64, "barriers": 2}
            else:
                constants |= {"target": None, "squared": None}
            yield AotCase(
                f"decode {name} N={N} dictionaries={T}{' error' * target} {_launch.sizes(tile)}",
                _decode_kernel,
                dict.fromkeys(("acts", "W_dec"), (floats,) * T)
                | {"indices": (i64,) * T}
                | pointers,
                constants,
                *(tile.num_warps, 1),
                expect | {"matrix": False, "loads_128": T * tile.loads, "instructions": 1000},
                architectures,
            )

        for tile in _launch.TILES["sampled_product"].candidates("other"):
            yield AotCase(
                f"sampled_product {name} {_launch.sizes(tile)}",
                _sampled_product_kernel,
                dict.fromkeys(("out", "grad", "W"), floats) | {"indices": i64},
                {"K": k, "BK": tile.rows} | tile.constants(D, dtype),
                *(tile.num_warps, 1),
                {"matrix": False, "loads_128": tile.loads, "registers": 80, "instructions": 500},
                architectures,
            )

        yield AotCase(
            f"scatter {name}",
            _scatter_kernel,
            {"code": floats, "acts": floats, "indices": i64, "M": "i32:16"},
            _scatter_constants(256, dtype),
            *(4, 1),
            {"matrix": False, "registers": 96, "instructions": 1000},
            architectures,
        )

        entries = dict.fromkeys(("weights", "rows"), floats) | dict.fromkeys(
            ("tokens", "bounds", "piece_bounds"), i64
        )
        kernels = (
            # The sum in fp32 changes hands on its way to 16-byte stores.
            (_latent_piece_kernel, {"partial": "*fp32:16", "piece_latent": i64, "M": "i32"}, 2048),
            (_latent_outer_kernel, {"partial": "*fp32:16", "out": floats}, 0),
        )
        for (kernel, others, shared), tile in itertools.product(
            kernels, _launch.TILES["latent_outer"].candidates("other")
        ):
            kernel_name = kernel.__name__.strip("_").removesuffix("_kernel")
            yield AotCase(
                f"{kernel_name} {name} {_launch.sizes(tile)}",
                kernel,
                entries | others,
                {"PIECE": PIECE, "BE": tile.rows} | tile.constants(D, dtype),
                *(tile.num_warps, 1),
                {
                    "matrix": False,
                    "shared": shared,
                    "loads_128": tile.loads,
                    "registers": 80,
                    "instructions": 1000,
                },
                architectures,
            )


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _decode_kernel(
    out,  # [N, D]
    acts,  # T × [N, K[t]]
    indices,  # T × [N, K[t]]
    W_dec,  # T × [M_t, D]
    bias,  # [D] or None
    base,  # [N, D] or None
    target,  # [N, D] or None
    squared,  # [N, programs of a token]; unless target is None
    K: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    SPREAD: tl.constexpr,  # sum each of the BK rows apart until the end: one sum across threads
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [1 or BK, BD]
    b_sum = tl.zeros([BK if SPREAD else 1, BD], ACC)
    for t in tl.static_range(len(K)):  # type: ignore
        for i_k in range(0, K[t], BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < K[t]
            # [BK]
            b_index = tl.load(indices[t] + i_n * K[t] + o_k, mask=m_k, other=0)
            b_act = tl.load(acts[t] + i_n * K[t] + o_k, mask=m_k, other=0.0).to(ACC)
            # [BK, BD]
            p_row = W_dec[t] + b_index[:, None] * D + o_d[None, :]
            b_row = tl.load(p_row, mask=m_k[:, None] & m_d[None, :], other=0.0).to(ACC)
            b_product = b_act[:, None] * b_row
            b_sum += b_product if SPREAD else tl.sum(b_product, 0, keep_dims=True)
    b_sum = tl.sum(b_sum, 0)
    if bias is not None:
        b_sum += tl.load(bias + o_d, mask=m_d, other=0.0).to(ACC)
    if base is not None:
        b_sum += tl.load(base + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
    if target is not None:
        b_sum -= tl.load(target + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
        # Where an act is infinite a column past the last one holds inf · 0.
        b_squared = tl.sum(tl.where(m_d, b_sum * b_sum, 0.0), 0)
        tl.store(squared + i_n * tl.num_programs(1) + tl.program_id(1), b_squared)
    tl.store(out + i_n * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _scatter_kernel(
    code,  # [n, M], zeros
    acts,  # [n, K]
    indices,  # [n, K]
    M,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        # [BK]
        b_index = tl.load(indices + i_n * K + o_k, mask=o_k < K, other=-1).to(tl.int32)
        # [BK, BK]: every slot finds the total of its latent, summed in the same order by all that
        # name it. They store the same value, so that it does not matter which comes last.
        b_terms = tl.zeros([BK, BK], ACC)
        for i_e in range(0, K, BK):
            o_e = i_e + tl.arange(0, BK)
            m_e = o_e < K
            b_other = tl.load(indices + i_n * K + o_e, mask=m_e, other=-1).to(tl.int32)
            b_act = tl.load(acts + i_n * K + o_e, mask=m_e, other=0.0).to(ACC)
            b_terms += tl.where(b_index[:, None] == b_other[None, :], b_act[None, :], 0.0)
        m_k = (b_index >= 0) & (b_index < M)  # nothing is written outside the row
        b_total = tl.sum(b_terms, 1).to(code.dtype.element_ty)
        tl.store(code + i_n * M + b_index, b_total, mask=m_k)


@triton.jit
def _sampled_product_kernel(
    out,  # [N, K]
    grad,  # [N, D]
    indices,  # [N, K]
    W,  # [M, D]
    K: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < K
    # [BK]
    b_index = tl.load(indices + i_n * K + o_k, mask=m_k, other=0)
    # [BK, BD], summed over columns once at the end: that sum crosses threads.
    b_products = tl.zeros([BK, BD], ACC)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_grad = tl.load(grad + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
        p_row = W + b_index[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_k[:, None] & m_d[None, :], other=0.0).to(ACC)
        b_products += b_grad[None, :] * b_row
    tl.store(out + i_n * K + o_k, tl.sum(b_products, 1).to(out.dtype.element_ty), mask=m_k)


@triton.jit
def _sum_entries(
    weights,
    tokens,
    rows,
    i_first,
    i_last,
    o_d,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    """Columns `o_d` of `Σ weights[e] · rows[tokens[e]]` over the entries `i_first ≤ e < i_last`."""
    m_d = o_d < D
    # [BD]
    b_sum = tl.zeros([BD], ACC)
    for i_e in range(i_first, i_last, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < i_last
        # [BE]
        b_token = tl.load(tokens + o_e, mask=m_e, other=0)
        b_weight = tl.load(weights + o_e, mask=m_e, other=0.0).to(ACC)
        # [BE, BD]
        p_row = rows + b_token[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_e[:, None] & m_d[None, :], other=0.0).to(ACC)
        b_sum += tl.sum(b_weight[:, None] * b_row, 0)
    return b_sum


@triton.jit
def _latent_piece_kernel(
    partial,  # [pieces, D]
    weights,  # [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # [N, D]
    bounds,  # [M + 1], of the latents in weights and tokens
    piece_bounds,  # [M + 1], of the latents in partial
    piece_latent,  # [pieces]; M where there is no such piece
    M,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PIECE: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    i_m = tl.load(piece_latent + i_p)
    if i_m < M:
        i_first = tl.load(bounds + i_m) + (i_p - tl.load(piece_bounds + i_m) + 1) * PIECE
        i_last = tl.minimum(i_first + PIECE, tl.load(bounds + i_m + 1))
        b_sum = _sum_entries(weights, tokens, rows, i_first, i_last, o_d, D, ACC, BE, BD)
        tl.store(partial + i_p * D + o_d, b_sum, mask=o_d < D)


@triton.jit
def _latent_outer_kernel(
    out,  # [M, D]
    weights,  # [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # [N, D]
    bounds,  # [M + 1], of the latents in weights and tokens
    piece_bounds,  # [M + 1], of the latents in partial
    partial,  # [pieces, D]
    D: tl.constexpr,
    ACC: tl.constexpr,
    PIECE: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_first = tl.load(bounds + i_m)
    i_last = tl.minimum(i_first + PIECE, tl.load(bounds + i_m + 1))
    b_sum = _sum_entries(weights, tokens, rows, i_first, i_last, o_d, D, ACC, BE, BD)
    for i_p in range(tl.load(piece_bounds + i_m), tl.load(piece_bounds + i_m + 1)):
        b_sum += tl.load(partial + i_p * D + o_d, mask=m_d, other=0.0)
    tl.store(out + i_m * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)
