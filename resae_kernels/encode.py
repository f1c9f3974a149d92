"""TopK encode: z[n] = the k largest of relu((x[n] − base[n] − pre_bias) weightᵀ + bias).

N tokens, D width, M latents, k active. 2·N·D·M FLOPs; the scores `[N, M]` exist for one chunk of
rows at a time, so that they stay in cache between the product and the selection. Selection is
exact: ties go to the lower index, whatever the chunking.

In Triton: a product leaves scores (up to 16 tokens: one kernel that reads `weight` once; more: the
library's GEMM), and the largest score of each group of consecutive latents. The k best latents lie
in the k best groups: were one outside, k groups would each hold a latent before it. So a row's
selection reads M/group maxima and k·group scores, not M.

Backward is sparse. With g the gradient of the acts where they are positive, dx is a sparse decode
of g through `weight`, and dweight sums g · residual per latent (`latent_outer`, over codes sorted
by latent: deterministic, no `[N, M]`). Gao et al. 2024 (arXiv 2406.04093), section 2.2.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from resae_kernels.cpu import native, onednn
from resae_kernels.decode import latent_outer, latent_sum
from resae_kernels.reference import TopK, accumulation_dtype
from resae_kernels.triton import runtime as _launch
from resae_kernels.triton.runtime import AotCase, tl, triton

FEW_TOKENS = 16
"""Up to here the product is bound by reading `weight`: one Triton kernel instead of a GEMM."""


class ProductTile(NamedTuple):
    """Latents and dimensions of `weight` that a program of the product multiplies at a time."""

    latents: int
    dimensions: int
    num_stages: int
    num_warps: int


class RowTile(NamedTuple):
    """Consecutive entries of a row that one program reads."""

    columns: int
    num_warps: int


_WIDE = _launch.Chosen(ProductTile(64, 128, num_stages=4, num_warps=4), measured=None)
_launch.TILES |= {
    "product_of_few_16bit": _launch.TileTable(
        default=_launch.Chosen(ProductTile(64, 64, num_stages=4, num_warps=4), measured=None),
        classes={"sm_80": _WIDE, "sm_90": _WIDE, "sm_100": _WIDE},
        alternatives=(
            ProductTile(64, 128, num_stages=3, num_warps=4),
            ProductTile(128, 64, num_stages=4, num_warps=4),
        ),
    ),
    "product_of_few_32bit": _launch.TileTable(
        default=_launch.Chosen(ProductTile(64, 32, num_stages=4, num_warps=8), measured=None),
        alternatives=(
            ProductTile(64, 32, num_stages=3, num_warps=8),
            ProductTile(64, 16, num_stages=4, num_warps=4),
        ),
    ),
    "group_max": _launch.TileTable(
        default=_launch.Chosen(RowTile(4096, num_warps=4), measured=None),
        alternatives=(RowTile(2048, num_warps=2), RowTile(4096, num_warps=8)),
    ),
    "residual": _launch.TileTable(
        default=_launch.Chosen(RowTile(1024, num_warps=4), measured=None),
        alternatives=(RowTile(512, num_warps=2), RowTile(2048, num_warps=8)),
    ),
}


def topk_encode(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    workspace_bytes: int | None = None,
    check_nan: bool = False,
    implementation: str | None = None,
) -> TopK:
    """The k largest positive pre-activations of each token (formula: `reference.topk_encode`).

    Args:
        x: `[..., D]`, the activations to encode.
        weight: `[M, D]`, one latent per contiguous row; x's dtype and device, as every other input.
        bias: `[M]` or None.
        k: active latents per token, 1 ≤ k ≤ M.
        pre_bias: `[D]`, subtracted from every token (an autoencoder's `b_dec`).
        base: `[..., D]`, subtracted token by token (a prediction of x; the code is of the rest).
        sorted: True orders a code by value, descending, then index; False by index, ascending.
        workspace_bytes: bound on the scores held at once (one row at least); default 32 MiB on
            CPU, 512 MiB on CUDA. Selection on a CPU may hold them a second time.
        check_nan: raise if a score is NaN instead of sorting it first.
        implementation: "torch", "triton" or None, by device (CUDA: triton). Same contract.

    Returns:
        `TopK(acts, indices)`: `[..., k]` in x's dtype, and int64. Slots beyond the positive
        pre-activations hold act 0, index 0 and come last.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, k out of range, NaN in checked mode.

    Note:
        16-bit inputs: residual rounded to x's dtype, product in fp32, scores rounded to x's dtype
        and selected in it; ties go to the lower index. Gradients reach x, weight, bias, pre_bias
        and base through the acts, where they are positive; indices have none. Under autocast the
        inputs are cast as for `F.linear`.

        "triton" beyond 16 tokens leaves the product to the GEMM of torch, in x's dtype: fp32
        accumulation with the bias added before the one rounding, unless the library splits the sum
        over D and adds the parts in 16 bit, or takes TF32 for fp32; both are settings of
        `torch.backends.cuda.matmul`. Its selection takes fp32, bf16 and fp16 with k ≤ 1024,
        M ≤ 2¹⁹ and next_power_of_2(k) · M ≤ 2²⁶; other scores are selected as in "torch".
    """
    if workspace_bytes is None and implementation is None and not check_nan:
        code = _encode_at_once(x, weight, bias, k, pre_bias, base, sorted)
        if code is not None:
            return code
    x, weight, bias, pre_bias, base = _launch.under_autocast(x, weight, bias, pre_bias, base)  # type: ignore[assignment]
    _check(x, weight, bias, k, pre_bias, base, workspace_bytes)
    D = weight.shape[1]
    if workspace_bytes is None:
        workspace_bytes = _launch.workspace_bytes(x)
    acts, indices = torch.ops.resae.topk_encode(
        x.reshape(-1, D),
        weight,
        bias,
        k,
        pre_bias,
        None if base is None else base.reshape(-1, D),
        sorted,
        workspace_bytes,
        _launch.implementation_for("topk_encode", x, implementation),
    )
    if check_nan and bool(acts.isnan().any()):
        token = int(acts.isnan().any(-1).nonzero()[0])
        raise ValueError(
            f"topk_encode: NaN in the pre-activations of token {token} (of {acts.shape[0]}); "
            f"look for NaN or inf in x, weight, bias, pre_bias and base"
        )
    code_shape = (*x.shape[:-1], k)
    return TopK(acts.reshape(code_shape), indices.reshape(code_shape))


def fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
) -> bool:
    """Would `_check` let these shapes and this k pass? Without a word about what does not fit."""
    if weight.ndim != 2 or x.ndim == 0:
        return False
    (M, D), shape = weight.shape, x.shape
    return (
        shape[-1] == D
        and 1 <= k <= M
        and (bias is None or bias.shape == (M,))
        and (pre_bias is None or pre_bias.shape == (D,))
        and (base is None or base.shape == shape)
    )


def _encode_at_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    sorted: bool,
) -> TopK | None:
    """The code of few tokens by one call of the compiled library; None: not the way for these
    arguments, or one of them is wrong (`_check` tells which)."""
    if not native.direct(x, weight, bias, pre_bias, base) or not fits(
        x, weight, bias, k, pre_bias, base
    ):
        return None
    leading, D = x.shape[:-1], x.shape[-1]
    N = leading.numel()
    if native.EXACT_ROWS[x.dtype] < N:
        return None
    if len(leading) == 1:
        return TopK(*native.exact_encode(x, weight, bias, k, pre_bias, base, sorted))
    base = None if base is None else base.reshape(N, D)
    acts, indices = native.exact_encode(x.reshape(N, D), weight, bias, k, pre_bias, base, sorted)
    return TopK(acts.view(*leading, k), indices.view(*leading, k))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    workspace_bytes: int | None,
) -> None:
    op = "topk_encode"
    _launch.check_floating(op, "x", x)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [M, D]")
    M, D = weight.shape
    if x.ndim == 0 or x.shape[-1] != D:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [..., {D}] (weight is [{M}, {D}], one "
            f"latent per row; pass weight.T if yours is [D, M])"
        )
    _launch.check_like(op, "weight", weight, "x", x)
    for name, tensor, shape, why in (
        ("bias", bias, (M,), "one entry per latent"),
        ("pre_bias", pre_bias, (D,), "one entry per dimension"),
        ("base", base, tuple(x.shape), "the shape of x"),
    ):
        if tensor is not None:
            _launch.check_shape(op, name, tensor, shape, why)
            _launch.check_like(op, name, tensor, "x", x)
    if k < 1:
        raise ValueError(f"{op}: k={k}, expected at least 1")
    if k > M:
        raise ValueError(
            f"{op}: k={k} exceeds the number of latents M={M} (weight is [{M}, {D}]); lower k"
        )
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{op}: workspace_bytes={workspace_bytes}, expected at least 1")


# -- op ------------------------------------------------------------------------------------------


def _residual(x: Tensor, pre_bias: Tensor | None, base: Tensor | None) -> Tensor:
    """`x − base − pre_bias`, formed in the accumulation dtype and rounded once to x's."""
    residual = x.to(accumulation_dtype(x.dtype))
    for offset in (base, pre_bias):
        if offset is not None:
            residual = residual - offset
    return residual.to(x.dtype)


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        return _encode_triton(x, weight, bias, k, pre_bias, base, sorted, workspace_bytes)
    N, M = x.shape[0], weight.shape[0]
    if native.takes(x, weight, bias, pre_bias, base) and native.EXACT_ROWS[x.dtype] >= N:
        return native.exact_encode(x, weight, bias, k, pre_bias, base, sorted)
    # 16-bit weights are multiplied as they are where the processor can: sums are float32 there too.
    narrow = x.device.type == "cpu" and onednn.multiplies(x.dtype)
    dtype = x.dtype if narrow else accumulation_dtype(x.dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(1, min(N, workspace_bytes // (M * dtype.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    by_onednn = weight.shape[1] <= onednn.MOST_DEPTH and onednn.pays(rows, weight)
    scores = None if by_onednn else torch.empty(rows, M, dtype=dtype, device=x.device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        residual = _residual(x[chunk], pre_bias, None if base is None else base[chunk]).to(dtype)
        if scores is None:
            chunk_scores = onednn.linear(residual, weight, bias)
        else:
            chunk_scores = scores[: residual.shape[0]]
            if bias is None:
                torch.mm(residual, weight.T, out=chunk_scores)
            else:
                torch.addmm(bias, residual, weight.T, out=chunk_scores)
        acts[chunk], indices[chunk] = _select(chunk_scores.to(x.dtype), k, sorted)
    return acts, indices


GROUPED_SCORES = 131_072
"""Scores from which on groups save more than their fixed cost."""


def _select(scores: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Exact TopK of `relu(scores)`, `[n, M]`: ties to the lower index, NaN first, padding last."""
    if native.takes(scores):
        return native.select(scores, k, sorted)
    if scores.device.type == "cpu" and scores.dtype.itemsize == 2:  # numpy has no bfloat16
        acts, indices = _select(scores.float(), k, sorted)
        return acts.to(scores.dtype), indices
    indices = _largest(scores, k)
    values = scores.gather(1, indices)
    positive = (values > 0) | values.isnan()
    acts = torch.where(positive, values, 0.0)
    order = _descending(acts if sorted else positive.to(torch.uint8))
    return acts.gather(1, order), indices.masked_fill_(~positive, 0).gather(1, order)


def _descending(values: Tensor) -> Tensor:
    """`values.argsort(dim=1, descending=True, stable=True)`, NaN first; numpy is the faster."""
    if values.device.type != "cpu":
        return values.argsort(dim=1, descending=True, stable=True)
    rising = values.numpy()[:, ::-1].argsort(axis=1, kind="stable")[:, ::-1]
    return values.shape[1] - 1 - torch.from_numpy(rising.copy())


def _largest(scores: Tensor, k: int) -> Tensor:
    """`[n, k]` indices, ascending, of the k largest of each row: of equals the lower, NaN first.

    No value outside the k + 1 groups with the largest maxima can be among the k largest, and where
    one is equal to the kth, so are two inside. Groups are strided, so that their maxima are taken
    along contiguous lanes, and their members stay in order; they pay where there is much to choose
    from, and enough of them remain.
    """
    n, M = scores.shape
    if k == M:
        return torch.arange(M, device=scores.device).repeat(n, 1)
    sizes = (16, 8, 4) if scores.numel() >= GROUPED_SCORES else ()
    enough = (g for g in sizes if M % g == 0 and M // g >= max(3, g // 2) * (k + 1))
    size = next(enough, None)
    if size is None:
        return _above_kth(scores, k)[0]
    groups, _ = _above_kth(scores.view(n, size, M // size).amax(dim=1), k + 1)
    strides = torch.arange(0, M, M // size, device=scores.device)
    members = (groups.unsqueeze(1) + strides.view(1, size, 1)).flatten(1)
    picked, tied = _above_kth(scores.gather(1, members), k)
    indices = members.gather(1, picked)
    if tied.numel():  # the lower index may be outside
        indices[tied] = _above_kth(scores[tied], k)[0]
    return indices


def _above_kth(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_largest` by comparing with the kth largest value, and rows where that alone did not say.

    On a CPU numpy finds this value by a vectorised partition, several times faster than
    `torch.topk`, and the entries that reach it likewise.
    """
    n, M = scores.shape
    if scores.device.type == "cpu":
        entries = scores.numpy()
        ranked = entries.copy()
        ranked.partition(M - k, axis=1)
        top = torch.from_numpy(ranked[:, M - k :])
        kth = top[:, :1]
        reached = torch.from_numpy(entries >= kth.numpy())
        flat = torch.from_numpy(reached.numpy().reshape(-1).nonzero()[0])
    else:
        top = scores.topk(k, dim=1).values
        kth = top[:, -1:]
        reached = scores >= kth
        flat = reached.view(-1).nonzero().squeeze(1)
    nan = top.isnan().any(dim=1)
    tied = flat.new_empty(0)
    if len(flat) != n * k or bool(nan.any()):
        tied = (nan | (reached.sum(dim=1) != k)).nonzero().squeeze(1)
        reached[tied] = _lowest_among_ties(scores[tied], kth[tied], k)
        flat = reached.view(-1).nonzero().squeeze(1)
    return flat.view(n, k) - torch.arange(0, n * M, M, device=flat.device).unsqueeze(1), tied


def _lowest_among_ties(scores: Tensor, kth: Tensor, k: int) -> Tensor:
    """`[n, M]` bool: the k largest scores; of those equal to `kth [n, 1]` the first ones."""
    nan = scores.isnan()
    above = torch.where(kth.isnan(), False, (scores > kth) | nan)
    level = torch.where(kth.isnan(), nan, scores == kth)
    missing = k - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= missing))


def _encode_fake(x, weight, bias, k, pre_bias, base, sorted, workspace_bytes, implementation):  # noqa: ARG001
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, pre_bias, base, _, _, ctx.implementation = inputs
    acts, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    # acts gate the gradient; x, pre_bias and base rebuild the residual that dweight needs.
    ctx.save_for_backward(x, weight, pre_bias, base, acts, indices)
    ctx.has_bias = bias is not None


def _combined(total: Tensor, weight: Tensor) -> Tensor:
    """`total @ weight`, `[D]`: total `[M]` in the accumulation dtype, weight not copied to it."""
    if total.dtype == weight.dtype:
        return total @ weight
    # What the 16-bit total leaves out is a second row of the product.
    coarse = total.to(weight.dtype)
    fine = (total - coarse).to(weight.dtype)
    return (torch.stack([coarse, fine]) @ weight).to(total.dtype).sum(0).to(weight.dtype)


def _backward(ctx, grad_acts, grad_indices):
    del grad_indices  # integers carry no gradient
    if grad_acts is None:
        return (None,) * 9
    x, weight, pre_bias, base, acts, indices = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_pre_bias, need_base, _, _, _ = ctx.needs_input_grad
    grad = torch.where(acts > 0, grad_acts, 0.0)
    grad_x = grad_weight = grad_bias = grad_pre_bias = grad_base = None
    if need_x or need_base:
        grad_x = torch.ops.resae.sparse_decode(
            [grad], [indices], [weight], None, None, implementation=ctx.implementation
        )
        grad_base = -grad_x if need_base else None
    if need_weight:
        residual = _residual(x, pre_bias, base)
        grad_weight = latent_outer(grad, indices, residual, weight.shape[0], ctx.implementation)
    need_bias = need_bias and ctx.has_bias
    if need_bias or need_pre_bias:
        wide = accumulation_dtype(weight.dtype)
        total = latent_sum(grad.to(wide), indices, weight.shape[0], ctx.implementation)
        grad_bias = total.to(weight.dtype) if need_bias else None
        # One product with the sum over all tokens, where a decode would gather rows for each.
        grad_pre_bias = -_combined(total, weight) if need_pre_bias else None
    return (
        grad_x if need_x else None,
        grad_weight,
        grad_bias,
        None,
        grad_pre_bias,
        grad_base,
        None,
        None,
        None,
    )


_launch.register(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, Tensor? pre_bias, Tensor? base, "
    "bool sorted, int workspace_bytes, str implementation) -> (Tensor acts, Tensor indices)",
    _encode,
    _encode_fake,
)
torch.library.register_autograd(
    "resae::topk_encode", _backward, setup_context=_setup_context, lib=_launch.LIBRARY
)


# -- launchers -------------------------------------------------------------------------------------


class _Keys(NamedTuple):
    """Scores as integers, in whose order selection is done."""

    dtype: torch.dtype
    """Signed, as wide as the scores."""
    inf: int
    """Bits of +inf: a larger magnitude is a NaN."""
    top: int
    """The largest integer, itself a NaN: the key of every NaN."""


KEYS = {
    torch.bfloat16: _Keys(torch.int16, 0x7F80, 0x7FFF),
    torch.float16: _Keys(torch.int16, 0x7C00, 0x7FFF),
    torch.float32: _Keys(torch.int32, 0x7F800000, 0x7FFFFFFF),
}
GROUP_SIZES = (8, 16, 32, 64)  # at most the latents of a product tile
MOST_KEYS = 8192  # that one program of the selection holds in registers


class _Plan(NamedTuple):
    """How a row of M scores is selected from."""

    group: int
    """Latents per group."""
    groups: int
    """Groups of a row."""
    slots: int
    """k, up to a power of two."""
    width: int
    """Keys held at once: the group maxima, then the members of k groups."""


@cache
def _plan(M: int, k: int) -> _Plan | None:
    """The group size that holds fewest keys; None where that is still too many."""
    slots = triton.next_power_of_2(k)
    plans = []
    for group in GROUP_SIZES:
        groups = triton.cdiv(M, group)
        width = max(triton.next_power_of_2(groups), slots * group)
        plans.append(_Plan(group, groups, slots, width))
    best = min(plans, key=lambda plan: plan.width)
    return best if best.width <= MOST_KEYS else None


def _encode_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    N, M = x.shape[0], weight.shape[0]
    # Kernels step along a row by 1; rows of x and base may lie anywhere.
    x = x if x.stride(1) == 1 else x.contiguous()
    base = base if base is None or base.stride(1) == 1 else base.contiguous()
    weight = weight.contiguous()
    bias, pre_bias = (None if t is None else t.contiguous() for t in (bias, pre_bias))
    plan = _plan(M, k) if x.dtype in KEYS else None

    stride = triton.cdiv(M, 64) * 64  # every row of scores starts at a multiple of 16 bytes
    row_elements = stride + (plan.groups if plan else 0)
    rows = max(1, min(N, workspace_bytes // (row_elements * x.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    scores = x.new_empty(rows, stride)[:, :M]
    with torch.cuda.device_of(x):
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            n = chunk.stop - start
            rest = None if base is None else base[chunk]
            if plan is None:
                _product(x[chunk], weight, bias, pre_bias, rest, scores[:n])
                acts[chunk], indices[chunk] = _select(scores[:n], k, sorted)
                continue
            # By N, not by the rows of a chunk: the last chunk is computed as the others are.
            producer = _product_of_few if N <= FEW_TOKENS else _product_of_many
            best = producer(x[chunk], weight, bias, pre_bias, rest, scores[:n], plan)
            _launch_select(scores[:n], best, acts[chunk], indices[chunk], plan)
    if sorted and plan is not None:
        # Stable, over codes in order of index: equal acts stay in that order; NaN sorts first.
        acts, order = acts.sort(dim=-1, descending=True, stable=True)
        indices = indices.gather(-1, order)
    return acts, indices


def _product(x, weight, bias, pre_bias, base, out) -> None:
    """`out = (x − base − pre_bias) weightᵀ + bias` by the library's GEMM."""
    if base is not None or pre_bias is not None:
        x = _launch_residual(x, pre_bias, base) if x.dtype in KEYS else _residual(x, pre_bias, base)
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _launch_residual(x: Tensor, pre_bias: Tensor | None, base: Tensor | None) -> Tensor:
    n, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = _launch.tile("residual", x.device)
    _residual_kernel[n, triton.cdiv(D, tile.columns)](
        x,
        base,
        pre_bias,
        out,
        D,
        x.stride(0),
        0 if base is None else base.stride(0),
        BD=tile.columns,
        **_launch.launch_options(tile.num_warps),
    )
    return out


def _product_of_many(x, weight, bias, pre_bias, base, scores, plan: _Plan) -> Tensor:
    """Scores by GEMM, group maxima by a pass over them; returns the maxima."""
    _product(x, weight, bias, pre_bias, base, scores)
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    best = torch.empty(n, plan.groups, dtype=keys.dtype, device=scores.device)
    tile = _launch.tile("group_max", scores.device)
    _group_max_kernel[n, triton.cdiv(M, tile.columns)](
        scores.view(keys.dtype),
        best,
        M,
        plan.groups,
        scores.stride(0),
        GROUP=plan.group,
        BM=tile.columns,
        INF=keys.inf,
        TOP=keys.top,
        **_launch.launch_options(tile.num_warps),
    )
    return best


def _product_of_few(x, weight, bias, pre_bias, base, scores, plan: _Plan, best=None) -> Tensor:
    """Scores and group maxima of at most 16 tokens in one kernel; returns the maxima."""
    (n, D), M = x.shape, weight.shape[0]
    keys = KEYS[scores.dtype]
    if best is None:
        best = torch.empty(n, plan.groups, dtype=keys.dtype, device=x.device)
    tile = _launch.tile(_product_name(x.dtype, D), x.device)
    _product_of_few_kernel[(triton.cdiv(M, tile.latents),)](
        x,
        base,
        pre_bias,
        weight,
        bias,
        scores.view(keys.dtype),
        best,
        n,
        D,
        M,
        plan.groups,
        x.stride(0),
        0 if base is None else base.stride(0),
        scores.stride(0),
        GROUP=plan.group,
        BL=tile.latents,
        BK=tile.dimensions,
        BN=FEW_TOKENS,
        INF=keys.inf,
        TOP=keys.top,
        UPCAST=not x.is_cuda,
        **_launch.launch_options(tile.num_warps, tile.num_stages),
    )
    return best


def _product_name(dtype: torch.dtype, D: int) -> str:
    # Rows that start anywhere are loaded element by element: in tiles for elements twice as wide,
    # or registers would not suffice.
    aligned = D % 16 == 0
    return f"product_of_few_{8 * dtype.itemsize if aligned else 32}bit"


def _launch_select(scores, best, acts, indices, plan: _Plan) -> None:
    """Write the exact code of each row, in order of index."""
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    _select_kernel[(n,)](
        scores.view(keys.dtype),
        best,
        acts.view(keys.dtype),
        indices,
        M,
        plan.groups,
        scores.stride(0),
        acts.shape[1],
        GROUP=plan.group,
        GROUPS=triton.next_power_of_2(plan.groups),
        SLOTS=plan.slots,
        INF=keys.inf,
        TOP=keys.top,
        **_launch.launch_options(_select_warps(plan)),
    )


def _select_warps(plan: _Plan) -> int:
    """16 keys per thread, up to 8 warps."""
    return max(1, min(8, plan.width // 512))


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _residual_tile(x, base, pre_bias, o_x, o_base, o_d, m_x, m_d):
    """`x − base − pre_bias` in fp32, rounded once to x's dtype."""
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    if base is not None:
        b_x = b_x.to(tl.float32) - tl.load(base + o_base, mask=m_x, other=0.0).to(tl.float32)
    if pre_bias is not None:
        b_x = b_x.to(tl.float32) - tl.load(pre_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x.to(x.dtype.element_ty)


@triton.jit
def _residual_kernel(x, base, pre_bias, out, D, s_x, s_base, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_x = _residual_tile(x, base, pre_bias, i_n * s_x + o_d, i_n * s_base + o_d, o_d, m_d, m_d)
    tl.store(out + i_n * D + o_d, b_x, mask=m_d)


@triton.jit
def _key(bits, INF: tl.constexpr, TOP: tl.constexpr):
    """Scores' bits to int32: positive in the scores' order, NaN of either sign on top. Negative
    scores are negative in some order: the selection takes positive keys alone, which is relu."""
    bits = bits.to(tl.int32)
    return tl.where((bits & TOP) > INF, TOP, bits)


@triton.jit
def _group_max_kernel(
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups]
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    i_n, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_g = i_m * (BM // GROUP) + tl.arange(0, BM // GROUP)
    # [BM], consecutive latents in a thread: a group's maximum takes few shuffles
    b_key = _key(tl.load(scores + i_n * s_scores + o_m, mask=o_m < M, other=0), INF, TOP)
    # [BM / GROUP]
    b_best = tl.max(tl.reshape(b_key, [BM // GROUP, GROUP]), axis=1)
    tl.store(best + i_n * groups + o_g, b_best, mask=o_g < groups)


@triton.jit
def _product_of_few_kernel(
    x,  # [n, D], n ≤ BN, rows s_x apart
    base,  # [n, D] or None, rows s_base apart
    pre_bias,  # [D] or None
    weight,  # [M, D]
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups]
    n,
    D,
    M,
    groups,
    s_x,
    s_base,
    s_scores,
    GROUP: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_l = tl.program_id(0)
    o_l, o_n = i_l * BL + tl.arange(0, BL), tl.arange(0, BN)
    m_l, m_n = o_l < M, o_n < n
    p_w = weight + o_l.to(tl.int64)[:, None] * D
    o_x = o_n.to(tl.int64)[None, :] * s_x
    o_base = o_n.to(tl.int64)[None, :] * s_base
    # [BL, BN]: latents fill the rows of the matrix instruction, tokens the short side
    b_score = tl.zeros([BL, BN], dtype=tl.float32)
    for i_d in range(0, D, BK):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < D
        # [BL, BK]
        b_w = tl.load(p_w + o_d[None, :], mask=m_l[:, None] & m_d[None, :], other=0.0)
        o_k, m_k = o_d[:, None], m_d[:, None]
        # [BK, BN]
        b_x = _residual_tile(x, base, pre_bias, o_x + o_k, o_base + o_k, o_k, m_k & m_n, m_k)
        if UPCAST:  # the interpreter multiplies bf16 by its bit patterns
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
        b_score = tl.dot(b_w, b_x, b_score, input_precision="ieee")
    if bias is not None:
        b_score += tl.load(bias + o_l, mask=m_l, other=0.0).to(tl.float32)[:, None]
    # The one rounding: what is compared is what is returned.
    b_bits = b_score.to(x.dtype.element_ty).to(scores.dtype.element_ty, bitcast=True)
    p_scores = scores + o_n.to(tl.int64)[None, :] * s_scores + o_l[:, None]
    tl.store(p_scores, b_bits, mask=m_l[:, None] & m_n[None, :])
    # Where x is infinite, a row past the last latent holds 0 · inf.
    b_key = tl.where(m_l[:, None], _key(b_bits, INF, TOP), 0)
    # [BL / GROUP, BN]
    b_best = tl.max(tl.reshape(b_key, [BL // GROUP, GROUP, BN]), axis=1)
    o_g = i_l * (BL // GROUP) + tl.arange(0, BL // GROUP)
    p_best = best + o_n.to(tl.int64)[None, :] * groups + o_g[:, None]
    tl.store(p_best, b_best, mask=(o_g < groups)[:, None] & m_n[None, :])


@triton.jit
def _take(b_key, low, k):
    """The k first of the positive `b_key` by (value, descending; position).

    `low` ≥ 0: a lower bound of the k-th largest. Returns (which, the slot of each in order of
    position, how many, the k-th largest or what else parts the first k from the rest).
    """
    # Bisection: at least k keys are ≥ low (unless there are fewer), fewer than k are > high.
    high = tl.max(b_key, axis=0)
    count = tl.sum((b_key >= low).to(tl.int32), axis=0)
    while (low < high) & (count != k):
        middle = high - ((high - low) >> 1)
        reached = tl.sum((b_key >= middle).to(tl.int32), axis=0)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        count = tl.where(enough, reached, count)
    above = (b_key > low).to(tl.int32)
    level = ((b_key == low) & (b_key > 0)).to(tl.int32)
    missing = k - tl.sum(above, axis=0)
    # One scan for both counts: neither reaches 2¹⁶.
    both = above + (level << 16)
    before = tl.cumsum(both, axis=0) - both
    level_before = before >> 16
    taken = (above + level * (level_before < missing)) > 0
    slot = (before & 0xFFFF) + tl.minimum(level_before, missing)
    return taken, slot, tl.sum(taken.to(tl.int32), axis=0), low


@triton.jit
def _select_row(
    p_scores,  # [M]
    p_best,  # [groups]
    p_acts,  # [k]
    p_indices,  # [k]
    M,
    groups,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Write the exact code of one row, in order of index."""
    o_g, o_s = tl.arange(0, GROUPS), tl.arange(0, SLOTS)
    # [GROUPS]
    b_best = tl.load(p_best + o_g, mask=o_g < groups, other=0).to(tl.int32)
    m_taken, b_slot, count, low = _take(b_best, tl.full((), 0, tl.int32), k)
    # Compaction goes through memory, in the row's own indices. They are overwritten below only
    # after counts over all that was read from them.
    tl.store(p_indices + b_slot, o_g, mask=m_taken)
    tl.debug_barrier()
    # [SLOTS, GROUP]: groups in order, hence latents in order
    b_group = tl.load(p_indices + o_s, mask=o_s < count, other=0).to(tl.int32)
    o_m = b_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_m = (o_s < count)[:, None] & (o_m < M)
    b_bits = tl.load(p_scores + o_m, mask=m_m, other=0)
    # [SLOTS * GROUP]
    b_key = tl.reshape(_key(b_bits, INF, TOP), [SLOTS * GROUP])
    o_m = tl.reshape(o_m, [SLOTS * GROUP])
    m_taken, b_slot, count, low = _take(b_key, low, k)
    tl.store(p_acts + b_slot, b_key, mask=m_taken)
    tl.store(p_indices + b_slot, o_m, mask=m_taken)
    m_padding = (o_s >= count) & (o_s < k)
    tl.store(p_acts + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)
    tl.store(p_indices + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)


@triton.jit
def _select_kernel(
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups]
    acts,  # [n, k]
    indices,  # [n, k]
    M,
    groups,
    s_scores,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
    p_acts, p_indices = acts + i_n * k, indices + i_n * k
    _select_row(p_scores, p_best, p_acts, p_indices, M, groups, k, GROUP, GROUPS, SLOTS, INF, TOP)


# -- compilation ahead of time ---------------------------------------------------------------------


def aot_cases() -> Iterator[AotCase]:
    """Every kernel as it runs at the shapes that matter, for a compiler without a device."""

    def each(kind: str, names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), kind)

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        keys = KEYS[dtype]
        floats, integers = f"*{name}:16", f"*i{dtype.itemsize * 8}:16"
        levels = {"INF": keys.inf, "TOP": keys.top}

        for tile in _launch.TILES["residual"].candidates("sm_90"):
            yield AotCase(
                f"residual {name} {_launch.sizes(tile)}",
                _residual_kernel,
                each(floats, "x base pre_bias out") | each("i32:16", "D s_x s_base"),
                {"BD": tile.columns},
                *(tile.num_warps, 1),
                {"loads_128": 3, "instructions": 300},
                ("sm_90",),
            )

        for tile in _launch.TILES["group_max"].candidates("sm_90"):
            yield AotCase(
                f"group_max {name} {_launch.sizes(tile)}",
                _group_max_kernel,
                each(integers, "scores best") | each("i32:16", "M groups s_scores"),
                {"GROUP": 32, "BM": tile.columns} | levels,
                *(tile.num_warps, 1),
                {
                    "loads_128": tile.columns * dtype.itemsize // (tile.num_warps * 512),
                    "instructions": 700,
                },
                ("sm_90",),
            )

        for architecture, D in itertools.product(("sm_80", "sm_90", "sm_100"), (2048, 999)):
            for tile in _launch.TILES[_product_name(dtype, D)].candidates(architecture):
                loads = tile.latents * tile.dimensions * dtype.itemsize // (tile.num_warps * 512)
                yield AotCase(
                    f"product_of_few {name}, D={D} {_launch.sizes(tile)}",
                    _product_of_few_kernel,
                    each(floats, "x base pre_bias weight bias")
                    | each(integers, "scores best")
                    | each("i32:16", "M groups s_scores")
                    | each("i32:16" if D % 16 == 0 else "i32", "D s_x s_base")
                    | each("i32", "n"),
                    {"GROUP": 32, "BL": tile.latents, "BK": tile.dimensions}
                    | {"BN": FEW_TOKENS, "UPCAST": False}
                    | levels,
                    *(tile.num_warps, tile.num_stages),
                    {
                        # Weight's loads ahead of the loop and in it.
                        "loads_128": loads * tile.num_stages if D % 16 == 0 else 0,
                        # No matrix instruction has the precision of fp32.
                        "matrix": dtype != torch.float32,
                        "instructions": 1500,
                    },
                    (architecture,),
                )

        for M, k in ((8192, 32), (65536, 64), (131072, 256)):
            plan = _plan(M, k)
            assert plan is not None
            yield AotCase(
                f"select {name}, M={M} k={k}",
                _select_kernel,
                each(integers, "scores best acts")
                | each("*i64:16", "indices")
                | each("i32:16", "M groups s_scores k"),
                {
                    "GROUP": plan.group,
                    "GROUPS": triton.next_power_of_2(plan.groups),
                    "SLOTS": plan.slots,
                }
                | levels,
                *(_select_warps(plan), 3),
                {"instructions": 4000},
            )
