"""TopK encode in Triton: scores, largest scores of groups, selection.

A product leaves scores (up to 16 tokens: one kernel that reads `weight` once; more: the library's
GEMM), and the largest score of each group of consecutive latents. The k best latents lie in the k
best groups: were one outside, k groups would each hold a latent before it. So a row's selection
reads M/group maxima and k·group scores, not M.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels.precision import residual
from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.runtime import tl, triton

FEW_TOKENS = 16
"""Up to here the product is bound by reading `weight`: one Triton kernel instead of a GEMM."""


class Keys(NamedTuple):
    """Scores as integers, in whose order selection is done."""

    dtype: torch.dtype
    """Signed, as wide as the scores."""
    inf: int
    """Bits of +inf: a larger magnitude is a NaN."""
    top: int
    """The largest integer, itself a NaN: the key of every NaN."""


KEYS = {
    torch.bfloat16: Keys(torch.int16, 0x7F80, 0x7FFF),
    torch.float16: Keys(torch.int16, 0x7C00, 0x7FFF),
    torch.float32: Keys(torch.int32, 0x7F800000, 0x7FFFFFFF),
}

GROUP_SIZES = (8, 16, 32, 64)  # at most the latents of a product tile

MOST_KEYS = 8192  # that one program of the selection holds in registers


class SelectionLayout(NamedTuple):
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
def selection_layout(M: int, k: int) -> SelectionLayout | None:
    """The group size that holds fewest keys; None where that is still too many."""
    slots = runtime.next_power_of_2(k)
    layouts = []
    for group in GROUP_SIZES:
        groups = runtime.cdiv(M, group)
        width = max(runtime.next_power_of_2(groups), slots * group)
        layouts.append(SelectionLayout(group, groups, slots, width))
    best = min(layouts, key=lambda layout: layout.width)
    return best if best.width <= MOST_KEYS else None


def launch_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
    select: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Acts and indices `[N, k]`. `select` takes scores that the kernels do not: fp64, or too many
    of them for one program's registers."""
    N, M = x.shape[0], weight.shape[0]
    # Kernels step along a row by 1; rows of x and base may lie anywhere.
    x = x if x.stride(1) == 1 else x.contiguous()
    base = base if base is None or base.stride(1) == 1 else base.contiguous()
    weight = weight.contiguous()
    bias, pre_bias = (None if t is None else t.contiguous() for t in (bias, pre_bias))
    layout = selection_layout(M, k) if x.dtype in KEYS else None

    stride = runtime.cdiv(M, 64) * 64  # every row of scores starts at a multiple of 16 bytes
    row_elements = stride + (layout.groups if layout else 0)
    rows = max(1, min(N, workspace_bytes // (row_elements * x.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    scores = x.new_empty(rows, stride)[:, :M]
    with torch.cuda.device_of(x):
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            n = chunk.stop - start
            whole = n == N  # slices of everything cost microseconds
            rest = base if base is None or whole else base[chunk]
            part, held = (x, scores) if whole else (x[chunk], scores[:n])
            if layout is None:
                _gemm(part, weight, bias, pre_bias, rest, held)
                acts[chunk], indices[chunk] = select(held, k, sorted)
                continue
            # By N, not by the rows of a chunk: the last chunk is computed as the others are.
            producer = product_of_few if N <= FEW_TOKENS else _product_of_many
            best = producer(part, weight, bias, pre_bias, rest, held, layout)
            code = (acts, indices) if whole else (acts[chunk], indices[chunk])
            _launch_select(held, best, *code, layout)
    if sorted and layout is not None:
        # Stable, over codes in order of index: equal acts stay in that order; NaN sorts first.
        acts, order = acts.sort(dim=-1, descending=True, stable=True)
        indices = indices.gather(-1, order)
    return acts, indices


def _gemm(x, weight, bias, pre_bias, base, out) -> None:
    """`out = (x − base − pre_bias) weightᵀ + bias` by the library's GEMM."""
    if base is not None or pre_bias is not None:
        x = launch_residual(x, pre_bias, base) if x.dtype in KEYS else residual(x, pre_bias, base)
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def launch_residual(x: Tensor, pre_bias: Tensor | None, base: Tensor | None) -> Tensor:
    """`precision.residual` in one launch."""
    n, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tiles.tile("residual", x.device)
    residual_kernel[n, runtime.cdiv(D, tile.columns)](
        x,
        base,
        pre_bias,
        out,
        D,
        x.stride(0),
        0 if base is None else base.stride(0),
        BD=tile.columns,
        **runtime.launch_options(tile.num_warps),
    )
    return out


def _product_of_many(x, weight, bias, pre_bias, base, scores, layout: SelectionLayout) -> Tensor:
    """Scores by GEMM, group maxima by a pass over them; returns the maxima."""
    _gemm(x, weight, bias, pre_bias, base, scores)
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    best = torch.empty(n, layout.groups, dtype=keys.dtype, device=scores.device)
    tile = tiles.tile("group_max", scores.device)
    group_max_kernel[n, runtime.cdiv(M, tile.columns)](
        scores.view(keys.dtype),
        best,
        M,
        layout.groups,
        scores.stride(0),
        GROUP=layout.group,
        BM=tile.columns,
        INF=keys.inf,
        TOP=keys.top,
        **runtime.launch_options(tile.num_warps),
    )
    return best


@cache
def few_settings(
    tile: tiles.ProductTile, group: int, dtype: torch.dtype, upcast: bool
) -> dict[str, Any]:
    """Constants and options of the product of few tokens."""
    return {
        "GROUP": group,
        "BL": tile.latents,
        "BK": tile.dimensions,
        "BN": FEW_TOKENS,
        "INF": KEYS[dtype].inf,
        "TOP": KEYS[dtype].top,
        "UPCAST": upcast,
    } | runtime.launch_options(tile.num_warps, tile.num_stages)


def product_of_few(
    x, weight, bias, pre_bias, base, scores, layout: SelectionLayout, best=None
) -> Tensor:
    """Scores and group maxima of at most 16 tokens in one kernel; returns the maxima."""
    (n, D), M = x.shape, weight.shape[0]
    keys = KEYS[scores.dtype]
    if best is None:
        best = torch.empty(n, layout.groups, dtype=keys.dtype, device=x.device)
    tile = tiles.tile(product_tile_name(x.dtype, D), x.device)
    product_of_few_kernel[(runtime.cdiv(M, tile.latents),)](
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
        layout.groups,
        x.stride(0),
        0 if base is None else base.stride(0),
        scores.stride(0),
        **few_settings(tile, layout.group, scores.dtype, not x.is_cuda),
    )
    return best


def product_tile_name(dtype: torch.dtype, D: int) -> str:
    """The name in `tiles.TILES` of what `product_of_few` is launched with."""
    # Rows that start anywhere are loaded element by element: in tiles for elements twice as wide,
    # or registers would not suffice.
    aligned = D % 16 == 0
    return f"product_of_few_{8 * dtype.itemsize if aligned else 32}bit"


@cache
def select_settings(layout: SelectionLayout, dtype: torch.dtype) -> dict[str, Any]:
    """Constants and options of the selection."""
    return {
        "GROUP": layout.group,
        "GROUPS": runtime.next_power_of_2(layout.groups),
        "SLOTS": layout.slots,
        "INF": KEYS[dtype].inf,
        "TOP": KEYS[dtype].top,
    } | runtime.launch_options(select_warps(layout))


def _launch_select(scores, best, acts, indices, layout: SelectionLayout) -> None:
    """Write the exact code of each row, in order of index."""
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    select_kernel[(n,)](
        scores.view(keys.dtype),
        best,
        acts.view(keys.dtype),
        indices,
        M,
        layout.groups,
        scores.stride(0),
        acts.shape[1],
        **select_settings(layout, scores.dtype),
    )


def select_warps(layout: SelectionLayout) -> int:
    """16 keys per thread, up to 8 warps."""
    return max(1, min(8, layout.width // 512))


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
def residual_kernel(x, base, pre_bias, out, D, s_x, s_base, BD: tl.constexpr):
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
def group_max_kernel(
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
def product_of_few_kernel(
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
def select_row(
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
def select_kernel(
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
    select_row(p_scores, p_best, p_acts, p_indices, M, groups, k, GROUP, GROUPS, SLOTS, INF, TOP)
