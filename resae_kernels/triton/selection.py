# pyright: basic
"""Exact selection of the k best of each row of scores in Triton, by the largest scores of groups.

The k best latents lie in the k groups of consecutive latents with the largest maxima: were one
outside, k groups would each hold a latent before it. So a row's selection reads M/group maxima and
k·group scores, not M.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.runtime import tl, triton

GROUP_SIZES = (8, 16, 32, 64)  # at most the latents of a GEMM tile

MOST_KEYS = 8192  # that one program of the selection holds in registers

KEYS_PER_THREAD = 16


class SelectionLayout(NamedTuple):
    """Groups into which the selection divides a row of M scores."""

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


def select_warps(layout: SelectionLayout, keys_per_thread: int = KEYS_PER_THREAD) -> int:
    """Warps of the program that selects from a row: up to 8."""
    return max(1, min(8, layout.width // (32 * keys_per_thread)))


def select_constants(
    layout: SelectionLayout, tile: tiles.SelectTile, *, maxima: bool, by_value: bool
) -> dict[str, int]:
    """Compile-time constants of `select_kernel`, except those of the keys."""
    threads = 32 * select_warps(layout, tile.keys_per_thread)
    # Comparisons of each code with itself: as many at a time per thread as keys.
    at_a_time = max(1, min(layout.slots, KEYS_PER_THREAD * threads // layout.slots))
    return {
        "GROUP": layout.group,
        "GROUPS": runtime.next_power_of_2(layout.groups),
        "SLOTS": layout.slots,
        "BM": tile.columns if maxima else 0,
        "BJ": at_a_time if by_value else 0,
    }


@cache
def select_settings(
    layout: SelectionLayout,
    tile: tiles.SelectTile,
    dtype: torch.dtype,
    maxima: bool,
    by_value: bool,
) -> dict[str, Any]:
    """Constants and options of a launch, made once."""
    return (
        select_constants(layout, tile, maxima=maxima, by_value=by_value)
        | {"INF": KEYS[dtype].inf, "TOP": KEYS[dtype].top}
        | runtime.launch_options(select_warps(layout, tile.keys_per_thread))
    )


def group_maxima(scores: Tensor, layout: SelectionLayout) -> Tensor:
    """Keys `[n, groups]` of the largest scores of groups, by a pass over `scores [n, M]`."""
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


def launch_select(
    scores: Tensor,
    best: Tensor | None,
    acts: Tensor,
    indices: Tensor,
    layout: SelectionLayout,
    by_value: bool,
    threshold: Tensor | None = None,
    n_active: Tensor | None = None,
) -> None:
    """Write the exact code of each row of `scores [n, M]` into `acts`, `indices` `[n, k]`: in order
    of value, or of index. `best`: the group maxima, where the GEMM wrote them. With `threshold
    [M]`, contiguous: of the scores above it, which are counted into `n_active [n]`, int32."""
    n, M = scores.shape
    keys = KEYS[scores.dtype]
    tile = tiles.tile("select", scores.device)
    if threshold is not None:  # the pass that takes the maxima of what is above counts it
        threshold, best = threshold.view(keys.dtype), None
        tile = threshold_tile(tile, layout)
    maxima = best is None and tile.columns > 0
    if maxima:
        best = torch.empty(n, layout.groups, dtype=keys.dtype, device=scores.device)
    elif best is None:
        best = group_maxima(scores, layout)
    select_kernel[(n,)](
        scores.view(keys.dtype),
        best,
        acts.view(keys.dtype),
        indices,
        M,
        layout.groups,
        scores.stride(0),
        acts.shape[1],
        threshold,
        n_active,
        **select_settings(layout, tile, scores.dtype, maxima, by_value),
    )


def threshold_tile(tile: tiles.SelectTile, layout: SelectionLayout) -> tiles.SelectTile:
    """The tile of a selection above thresholds: it takes the maxima itself, of as many scores at a
    time as its threads hold."""
    threads = 32 * select_warps(layout, tile.keys_per_thread)
    return tile if tile.columns else tile._replace(columns=KEYS_PER_THREAD * threads)


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _keys(
    p_scores,  # [M]
    threshold,  # [M] or None
    o_m,
    m_m,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Keys of the scores at `o_m`: 0 for those that are not above their thresholds."""
    b_key = key(tl.load(p_scores + o_m, mask=m_m, other=0), INF, TOP)
    if threshold is not None:
        b_key = above_threshold(b_key, threshold, o_m, m_m, INF, TOP)
    return b_key


@triton.jit
def above_threshold(b_key, threshold, o_m, m_m, INF: tl.constexpr, TOP: tl.constexpr):
    """Keys of latents `o_m`, 0 where these are not above their thresholds. NaN is above
    everything."""
    b_level = tl.maximum(key(tl.load(threshold + o_m, mask=m_m, other=0), INF, TOP), 0)
    return tl.where((b_key > b_level) | (b_key == TOP), b_key, 0)


@triton.jit
def _strip_maxima(
    p_scores,  # [M]
    threshold,  # [M] or None
    p_best,  # [groups]
    i_m,
    M,
    groups,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Write the group maxima of the i_m-th BM scores of a row; returns how many are positive."""
    o_m = i_m * BM + tl.arange(0, BM)
    o_g = i_m * (BM // GROUP) + tl.arange(0, BM // GROUP)
    # [BM], consecutive latents in a thread: a group's maximum takes few shuffles
    b_key = _keys(p_scores, threshold, o_m, o_m < M, INF, TOP)
    # [BM / GROUP]
    b_best = tl.max(tl.reshape(b_key, [BM // GROUP, GROUP]), axis=1)
    tl.store(p_best + o_g, b_best, mask=o_g < groups)
    return tl.sum((b_key > 0).to(tl.int32), axis=0)


@triton.jit
def threshold_maxima(
    p_scores,  # [M]
    threshold,  # [M] or None
    p_best,  # [groups]
    M,
    groups,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Write the group maxima of a row, for this program to read; returns how many scores are
    positive and above their thresholds."""
    count = 0
    for i_m in range(0, tl.cdiv(M, BM)):
        count += _strip_maxima(p_scores, threshold, p_best, i_m, M, groups, GROUP, BM, INF, TOP)
    tl.debug_barrier()  # other threads wrote the maxima than read them
    return count


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
    p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
    _strip_maxima(p_scores, None, p_best, i_m, M, groups, GROUP, BM, INF, TOP)


@triton.jit
def take_first(b_key, low, k):
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
    threshold,  # [M] or None
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
    # The k-th largest of at least k maxima is none below the least of them: far fewer steps than
    # from 0, since the maxima of groups lie close together.
    least = tl.min(tl.where(o_g < groups, b_best, TOP), axis=0)
    low = tl.where(groups >= k, tl.maximum(least, 0), 0)
    m_taken, b_slot, count, low = take_first(b_best, low, k)
    # Compaction goes through memory, in the row's own indices. They are overwritten below only
    # after counts over all that was read from them.
    tl.store(p_indices + b_slot, o_g, mask=m_taken)
    tl.debug_barrier()
    # [SLOTS, GROUP]: groups in order, hence latents in order
    b_group = tl.load(p_indices + o_s, mask=o_s < count, other=0).to(tl.int32)
    o_m = b_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_m = (o_s < count)[:, None] & (o_m < M)
    b_key = _keys(p_scores, threshold, o_m, m_m, INF, TOP)
    # [SLOTS * GROUP]
    b_key = tl.reshape(b_key, [SLOTS * GROUP])
    o_m = tl.reshape(o_m, [SLOTS * GROUP])
    m_taken, b_slot, count, low = take_first(b_key, low, k)
    tl.store(p_acts + b_slot, b_key, mask=m_taken)
    tl.store(p_indices + b_slot, o_m, mask=m_taken)
    m_padding = (o_s >= count) & (o_s < k)
    tl.store(p_acts + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)
    tl.store(p_indices + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)


@triton.jit
def sort_row(
    p_acts,  # [k], as keys
    p_indices,  # [k]
    k,
    SLOTS: tl.constexpr,
    BJ: tl.constexpr,
):
    """Put a code that is in order of index in order of value, equal acts as they were.

    An entry's place is the number of those before it, counted by comparing all with all: k² over
    the threads, and no exchange between them but one sum.
    """
    o_s = tl.arange(0, SLOTS)
    m_s = o_s < k
    tl.debug_barrier()  # other threads wrote the code than read it here
    # [SLOTS]; padding is 0, and the last
    b_key = tl.load(p_acts + o_s, mask=m_s, other=0).to(tl.int32)
    b_index = tl.load(p_indices + o_s, mask=m_s, other=0)
    # [BJ, SLOTS]
    b_before = tl.zeros([BJ, SLOTS], tl.int32)
    for i_j in range(0, SLOTS, BJ):
        o_j = i_j + tl.arange(0, BJ)
        b_other = tl.load(p_acts + o_j, mask=o_j < k, other=-1).to(tl.int32)
        # Of equal keys the earlier is first: a later one, or itself, comes before if larger.
        m_later = o_j[:, None] >= o_s[None, :]
        b_before += (b_other[:, None] - m_later.to(tl.int32) >= b_key[None, :]).to(tl.int32)
    b_place = tl.sum(b_before, axis=0)
    tl.debug_barrier()  # all is read before anything is overwritten
    tl.store(p_acts + b_place, b_key, mask=m_s)
    tl.store(p_indices + b_place, b_index, mask=m_s)


@triton.jit
def select_kernel(
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups]; written here where BM > 0
    acts,  # [n, k]
    indices,  # [n, k]
    M,
    groups,
    s_scores,
    k,
    threshold,  # [M] or None
    n_active,  # [n] or None; written where BM > 0
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
    p_acts, p_indices = acts + i_n * k, indices + i_n * k
    if BM > 0:
        count = threshold_maxima(p_scores, threshold, p_best, M, groups, GROUP, BM, INF, TOP)
        if n_active is not None:
            tl.store(n_active + i_n, count)
    select_row(
        p_scores, threshold, p_best, p_acts, p_indices, M, groups, k, GROUP, GROUPS, SLOTS, INF, TOP
    )
    if BJ > 0:
        sort_row(p_acts, p_indices, k, SLOTS, BJ)
