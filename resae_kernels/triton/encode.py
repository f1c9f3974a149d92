"""TopK encode in Triton: scores, largest scores of groups, selection.

A product leaves scores (up to 16 tokens: one kernel that reads `weight` once; more: the library's
GEMM), and the largest score of each group of consecutive latents. The k best latents lie in the k
best groups: were one outside, k groups would each hold a latent before it. So a row's selection
reads M/group maxima and k·group scores, not M.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from resae_kernels.precision import residual
from resae_kernels.triton import encode_few, runtime, tiles
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.residual import launch_residual
from resae_kernels.triton.runtime import tl, triton

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
    slots = triton.next_power_of_2(k)
    layouts = []
    for group in GROUP_SIZES:
        groups = triton.cdiv(M, group)
        width = max(triton.next_power_of_2(groups), slots * group)
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
    weight = encode_few.readable(weight)
    bias, pre_bias = (None if t is None else t.contiguous() for t in (bias, pre_bias))
    layout = selection_layout(M, k) if x.dtype in KEYS else None
    few = layout is not None and N <= encode_few.FEW_TOKENS
    tile = encode_few.product_tile(N, weight) if few else None

    stride = triton.cdiv(M, 64) * 64  # every row of scores starts at a multiple of 16 bytes
    row_elements = stride + (layout.groups if layout else 0)
    rows = max(1, min(N, workspace_bytes // (row_elements * x.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    scores = x.new_empty(rows, stride)[:, :M]
    with torch.cuda.device_of(x):
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            n = chunk.stop - start
            rest = None if base is None else base[chunk]
            if layout is None:
                _gemm(x[chunk], weight, bias, pre_bias, rest, scores[:n])
                acts[chunk], indices[chunk] = select(scores[:n], k, sorted)
                continue
            # By N, not by the rows of a chunk: the last chunk is computed as the others are.
            producer = _product_of_many if tile is None else partial(_product_of_few, tile)
            best = producer(x[chunk], weight, bias, pre_bias, rest, scores[:n], layout)
            _launch_select(scores[:n], best, acts[chunk], indices[chunk], layout)
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


def _product_of_few(tile, x, weight, bias, pre_bias, base, scores, layout) -> Tensor:
    """Scores and group maxima in one kernel; returns the maxima."""
    n, keys = x.shape[0], KEYS[x.dtype]
    best = torch.empty(n, layout.groups, dtype=keys.dtype, device=x.device)
    encode_few.product_of_few(
        x, weight, bias, pre_bias, base, scores, best, layout.group, tile, rest=None
    )
    return best


def _product_of_many(x, weight, bias, pre_bias, base, scores, layout: SelectionLayout) -> Tensor:
    """Scores by GEMM, group maxima by a pass over them; returns the maxima."""
    _gemm(x, weight, bias, pre_bias, base, scores)
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    best = torch.empty(n, layout.groups, dtype=keys.dtype, device=scores.device)
    tile = tiles.tile("group_max", scores.device)
    group_max_kernel[n, triton.cdiv(M, tile.columns)](
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
        GROUP=layout.group,
        GROUPS=triton.next_power_of_2(layout.groups),
        SLOTS=layout.slots,
        INF=keys.inf,
        TOP=keys.top,
        **runtime.launch_options(select_warps(layout)),
    )


def select_warps(layout: SelectionLayout) -> int:
    """16 keys per thread, up to 8 warps."""
    return max(1, min(8, layout.width // 512))


# -- kernels ---------------------------------------------------------------------------------------


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
    b_key = key(tl.load(scores + i_n * s_scores + o_m, mask=o_m < M, other=0), INF, TOP)
    # [BM / GROUP]
    b_best = tl.max(tl.reshape(b_key, [BM // GROUP, GROUP]), axis=1)
    tl.store(best + i_n * groups + o_g, b_best, mask=o_g < groups)


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
    b_key = tl.reshape(key(b_bits, INF, TOP), [SLOTS * GROUP])
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
