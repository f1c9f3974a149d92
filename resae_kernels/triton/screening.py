# pyright: basic
"""TopK and threshold encode of at most 16 tokens in Triton from an 8-bit copy of the weight:
screen, then score exactly (candidates, bounds and their proof: `screened.py`).

The residual r has no dither here. It is rounded to 15 bits, r̂ = t (128·high + low) with two 8-bit
numbers for each entry, so that a massive activation spoils no other entry and no column of the
weight has to be read apart:

    ŝ = ŵ·r̂ + bias = s t (q·(128·high + low) − d·(128·high + low)) + bias,   ŵ = s (q − d)

q is the copy, s the step of its row, d the dither of the weight less ½. The error has two parts,
s − ŝ = (w − ŵ)·r̂ + w·(r − r̂):

certain      |s − ŝ| ≤ ‖w − ŵ‖ ‖r̂‖ + ‖w‖ ‖r − r̂‖, from the errors actually made.
statistical  in the first part ‖w − ŵ‖ ‖r̂‖ becomes s ‖r̂‖ √(log(2M / FAILURE) / 6), the bound on a
             sum of independent uniform errors; the second part stays certain.

Scores in 16 bit are compared after they are rounded, so a latent can beat one with a larger exact
score: candidates are all whose upper bound reaches the k-th lower bound less one unit in the last
place.

With thresholds the candidates of a row are all latents whose upper bound lies above their
threshold and above 0. That needs no such unit: a score that is above its threshold once rounded is
above it before. The certain margin misses none; the statistical one misses an active latent with
probability below `FAILURE` per row (`screened.py`).

Six launches (seven where the tile of the exact path has one for its residual), without a wait for
the device, so that they can be captured in a CUDA graph:

    quantise   r, rounded, its 8-bit numbers and norms
    screen     the 8-bit GEMM: M·D bytes; upper bounds, largest bounds of each group of latents
    pick       a program per row: the k-th lower bound, and the latents that reach it; with
               thresholds the latents that `screen` left
    rescore    their exact scores: rows of the weight are gathered; a score outside its bounds (the
               copy is of another weight) and too many candidates both mark a row as exact
    exact      the GEMM of the exact path, whose programs end at once unless a row is marked
    select     the code: of the candidates, or of all scores in a marked row

A host that looked for marked rows would save the fifth launch, and would wait for the device at
every layer and token; nor could the call be captured.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels.screening_bounds import (
    FAILURE,
    ROUNDING,
    STEPS,
    ScreenedRows,
    draw_dither,
)
from resae_kernels.triton import encode_few, runtime, tiles
from resae_kernels.triton.encode_few import FEW_TOKENS
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.residual import residual_tile
from resae_kernels.triton.runtime import tl, triton
from resae_kernels.triton.selection import (
    SelectionLayout,
    above_threshold,
    select_constants,
    select_row,
    select_warps,
    selection_layout,
    sort_row,
    take_first,
    threshold_maxima,
    threshold_tile,
)
from resae_kernels.triton.tiles import ScreenTile

PADDED = 128
"""Rows and columns of the 8-bit copy are padded with zeros to a multiple of this: the GEMM loads
whole tiles."""
LEVELS = 127 * 128
"""Quantisation steps of the residual on either side of zero."""
ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest difference of two numbers that are rounded to the same, relative to the larger."""
LARGEST = 1e18
"""Bound on entries of residual and bias and norms of latents: no float32 score overflows."""
QUANTISED_BYTES = 64 << 20
"""float32 memory in use at a time while the copy is made."""
RESCORED_ROWS = 4
"""Candidates that one program scores. This and what follows: chosen from ahead-of-time compilation,
not measured."""
RESCORED_BYTES = 1024
"""Part of a row of the weight that one program loads at a time."""
PICKED_GROUPS = 64
"""Groups of latents that the program of a row looks through at a time."""
SCREENED_SELECT = tiles.SelectTile(keys_per_thread=16, columns=0)


class TritonCopy(NamedTuple):
    """8-bit copy of a weight and its bounds, on the weight's device: M'·D' + 12·M bytes, M' and D'
    being M and D up to a multiple of 128."""

    weight: Tensor
    """`[M, D]`, the caller's own memory."""
    bias: Tensor | None
    """`[M]`, contiguous: the caller's own memory if that is."""
    q: Tensor
    """`[M', D']` int8."""
    terms: Tensor
    """`[3, M]`: steps s; bounds of the weight's error, by ‖r̂‖, and of the residual's, by
    ‖r − r̂‖."""
    dither: Tensor
    """`[D]`: of the weight, less ½."""
    is_certain: bool

    def encode(
        self,
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        threshold: Tensor | None = None,
    ) -> ScreenedRows:
        """Codes of at most 16 rows, as `ScreeningCopy.encode`."""
        acts, indices, n_candidates, n_active = launch_screened(
            self, x, k, pre_bias, prediction, sorted, threshold
        )
        return ScreenedRows(acts, indices, None, n_candidates, n_active)


def quantise(weight: Tensor, bias: Tensor | None, margin: str, seed: int) -> TritonCopy | None:
    """The 8-bit copy of `weight [M, D]`; None if weight or bias are not finite, or so large that a
    score may not be."""
    M, D = weight.shape
    padded = (runtime.cdiv(n, PADDED) * PADDED for n in (M, D))
    q = torch.zeros(*padded, dtype=torch.int8, device=weight.device)
    terms = torch.empty(3, M, dtype=torch.float32, device=weight.device)
    dither = draw_dither(seed, D)[1].to(weight.device)
    rows_at_once = max(1, QUANTISED_BYTES // (4 * D))
    for start in range(0, M, rows_at_once):
        chunk = slice(start, min(start + rows_at_once, M))
        rows = weight[chunk].float()
        step = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(STEPS)
        levels = (rows / step).add_(dither + 0.5).floor_()
        q[chunk, :D] = levels
        norm = torch.linalg.vector_norm(rows, dim=1)
        error = torch.linalg.vector_norm(rows - (levels - dither).mul_(step), dim=1)
        terms[0, chunk], terms[1, chunk], terms[2, chunk] = step.squeeze(1), error, norm
    largest = [float(t.abs().max()) for t in (terms, bias) if t is not None]
    if not all(value < LARGEST for value in largest):  # NaN is not
        return None
    # Widened by the largest rounding error of float32 sums of D terms.
    steps, error, norm = terms
    rounding = 1 + D * 2.0**-22
    if margin == "certain":
        error.mul_(rounding)
    else:
        widened = 1.01 + D**1.5 * 2.0**-25
        torch.mul(steps, widened * math.sqrt(math.log(2 * M / FAILURE) / 6), out=error)
    norm.add_(steps * (math.sqrt(D) / 2)).mul_(rounding)  # bounds ‖ŵ‖, too
    bias = None if bias is None else bias.contiguous()
    return TritonCopy(weight, bias, q, terms, dither, margin == "certain")


def most_candidates(copy: TritonCopy, k: int) -> int:
    """Candidates of a row that are scored; a row with more takes the exact path."""
    few = max(256, runtime.next_power_of_2(4 * k))
    if not copy.is_certain:
        return few
    return max(few, min(8192, runtime.next_power_of_2(copy.weight.shape[0] // 16)))


def screens(M: int, k: int) -> bool:
    """True if the kernels can screen for the k best of M latents."""
    layout = selection_layout(M, k)
    return layout is not None and layout.groups >= 2 * k


def launch_screened(
    copy: TritonCopy,
    x: Tensor,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Acts and indices `[N, k]`; the number of candidates of each row, `[N]` int32, negative where
    the row took the exact path; with `threshold [M]` the number of latents above it, `[N]` int32.
    N ≤ 16."""
    N, M, weight = len(x), copy.weight.shape[0], copy.weight
    layout, keys = selection_layout(M, k), KEYS[x.dtype]
    assert layout is not None
    room = most_candidates(copy, k)
    acts, indices = x.new_empty(N, k), _empty(x, N, k, dtype=torch.int64)
    picked, found = _empty(x, N, 2, room), _empty(x, N, room, dtype=keys.dtype)
    n_active = level = None
    if threshold is not None:
        threshold, n_active = threshold.contiguous(), _empty(x, N)
        level = threshold.view(keys.dtype)
    with torch.cuda.device_of(x):
        bounds = launch_bounds(copy, x, pre_bias, prediction, layout, threshold)
        launch_candidates(copy, bounds, layout, k, threshold, picked, found)
        # The bounds have been read: their memory holds all scores, where these are wanted.
        n_candidates, scores = bounds.n_candidates, bounds.upper.view(keys.dtype)
        best = bounds.best.view(-1).view(keys.dtype)[: N * layout.groups].view(N, layout.groups)
        exact = encode_few.small_gemm_tile(N, weight)
        encode_few.small_gemm(
            bounds.rest,
            encode_few.readable(weight),
            copy.bias,
            None,
            None,
            scores,
            best,
            layout.group,
            exact,
            rest=None,
            n_candidates=n_candidates,
        )
        select_screened_kernel[(N,)](
            found,
            picked,
            n_candidates,
            scores,
            best,
            acts.view(keys.dtype),
            indices,
            M,
            layout.groups,
            scores.stride(0),
            k,
            level,
            n_active,
            **select_screened_settings(layout, room, x.dtype, sorted, threshold is not None),
        )
    return acts, indices, n_candidates, n_active


class ScoreBounds(NamedTuple):
    """Residuals of N rows and the bounds of all their scores."""

    rest: Tensor
    """`[N, D]`, in the dtype of x."""
    facts: Tensor
    """`[N, 4]`, as `quantise_kernel` writes them."""
    upper: Tensor
    """`[N, M]`, each row padded: upper bounds as integers, 0 for what is not positive, or not above
    its threshold."""
    best: Tensor
    """`[2, N, groups]`: the largest lower and upper bounds of each group of latents, so too."""
    n_candidates: Tensor
    """`[N]` int32: 0; −1 for a row that cannot be screened."""


def launch_bounds(
    copy: TritonCopy,
    x: Tensor,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    layout: SelectionLayout,
    threshold: Tensor | None = None,
) -> ScoreBounds:
    """The first two launches of a screened encode."""
    (N, D), M, padded = x.shape, copy.weight.shape[0], copy.q.shape[1]
    assert 0 < N <= FEW_TOKENS
    # Kernels need unit stride along a row; rows may have any stride.
    x = x if x.stride(1) == 1 else x.contiguous()
    if prediction is not None and prediction.stride(1) != 1:
        prediction = prediction.contiguous()
    levels = _empty(x, FEW_TOKENS, 2, padded, dtype=torch.int8)
    rest, facts = x.new_empty(N, D), _empty(x, N, 4, dtype=torch.float32)
    upper, best = _empty(x, N, runtime.cdiv(M, 64) * 64), _empty(x, 2, N, layout.groups)
    n_candidates = _empty(x, N)
    quantise_kernel[(N,)](
        x,
        prediction,
        None if pre_bias is None else pre_bias.contiguous(),
        copy.dither,
        rest,
        levels,
        facts,
        n_candidates,
        D,
        padded,
        x.stride(0),
        0 if prediction is None else prediction.stride(0),
        **quantise_settings(D),
    )
    tile = tiles.tile("screen", x.device)
    screen_kernel[(runtime.cdiv(M, tile.latents),)](
        levels,
        copy.q,
        copy.terms,
        copy.bias,
        facts,
        upper,
        best,
        N,
        padded,
        M,
        layout.groups,
        upper.stride(0),
        threshold,
        **screen_settings(tile, layout.group),
    )
    return ScoreBounds(rest, facts, upper, best, n_candidates)


def launch_candidates(
    copy: TritonCopy,
    bounds: ScoreBounds,
    layout: SelectionLayout,
    k: int,
    threshold: Tensor | None,
    picked: Tensor,
    found: Tensor,
) -> None:
    """The next two: write the candidates to `picked [N, 2, room]` int32 and their exact scores to
    `found [N, room]`, integers of the width of x's dtype; `room` of `most_candidates`."""
    rest, facts, upper, best, n_candidates = bounds
    (N, D), (M, _), room = rest.shape, copy.weight.shape, found.shape[1]
    pick_kernel[(N,)](
        upper,
        best,
        picked,
        n_candidates,
        N,
        M,
        layout.groups,
        upper.stride(0),
        k,
        **pick_settings(layout, room, rest.dtype, threshold is None),
    )
    rescore_kernel[(N, room // RESCORED_ROWS)](
        rest,
        copy.weight,
        copy.bias,
        copy.terms,
        facts,
        upper,
        picked,
        n_candidates,
        found.view(rest.dtype),
        M,
        upper.stride(0),
        *copy.weight.stride(),
        **rescore_settings(room, D, rest.dtype),
    )


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def quantise_constants(D: int) -> dict[str, Any]:
    bounds = {"LEVELS": LEVELS, "LARGEST": LARGEST, "ROUNDING": ROUNDING}
    return bounds | {"BD": runtime.next_power_of_2(D)}


def quantise_warps(D: int) -> int:
    return max(1, min(8, runtime.next_power_of_2(D) // 512))


@cache
def quantise_settings(D: int) -> dict[str, Any]:
    """Constants and options of a launch, made once; so too those that follow."""
    return quantise_constants(D) | runtime.launch_options(quantise_warps(D))


def screen_constants(tile: ScreenTile, group: int) -> dict[str, Any]:
    return {
        "ROUNDING": ROUNDING,
        "GROUP": group,
        "BL": tile.latents,
        "BK": tile.dimensions,
        "BN": FEW_TOKENS,
    }


@cache
def screen_settings(tile: ScreenTile, group: int) -> dict[str, Any]:
    options = runtime.launch_options(tile.num_warps, tile.num_stages)
    return screen_constants(tile, group) | options


def pick_constants(
    layout: SelectionLayout, room: int, dtype: torch.dtype, by_rank: bool = True
) -> dict[str, Any]:
    return {
        "BY_RANK": by_rank,
        "ULP": ULP[dtype],
        "SMALLEST": 2.0**-24 if dtype == torch.float16 else 0.0,
        "GROUP": layout.group,
        "GROUPS": runtime.next_power_of_2(layout.groups),
        "ROOM": room,
        "BG": min(room, PICKED_GROUPS),
    }


@cache
def pick_settings(
    layout: SelectionLayout, room: int, dtype: torch.dtype, by_rank: bool
) -> dict[str, Any]:
    options = runtime.launch_options(select_warps(layout))
    return pick_constants(layout, room, dtype, by_rank) | options


def rescore_constants(room: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    columns = min(RESCORED_BYTES // dtype.itemsize, runtime.next_power_of_2(D))
    return {"ROUNDING": ROUNDING, "D": D, "ROOM": room, "BC": RESCORED_ROWS, "BD": columns}


@cache
def rescore_settings(room: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    # One stage: pipelined loads would pass through shared memory.
    return rescore_constants(room, D, dtype) | runtime.launch_options(num_warps=2, num_stages=1)


def select_screened_constants(
    layout: SelectionLayout, room: int, dtype: torch.dtype, by_value: bool, above: bool = False
) -> dict[str, Any]:
    # The maxima of what is above thresholds are taken here, and what is above is counted.
    tile = threshold_tile(SCREENED_SELECT, layout)
    constants = select_constants(layout, tile, maxima=above, by_value=by_value)
    return constants | {"ROOM": room, "INF": KEYS[dtype].inf, "TOP": KEYS[dtype].top}


@cache
def select_screened_settings(
    layout: SelectionLayout, room: int, dtype: torch.dtype, by_value: bool, above: bool
) -> dict[str, Any]:
    options = runtime.launch_options(select_warps(layout))
    return select_screened_constants(layout, room, dtype, by_value, above) | options


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def quantise_kernel(
    x,  # [N, D], rows s_x apart
    prediction,  # [N, D] or None, rows s_prediction apart
    pre_bias,  # [D] or None
    dither,  # [D], of the weight
    rest,  # [N, D]: the residual
    levels,  # [N, 2, padded] int8: high and low
    facts,  # [N, 4]: step, dither · (128·high + low), ‖r̂‖, bound of ‖r − r̂‖
    n_candidates,  # [N]; −1: the row cannot be screened, it is not finite or its entries too small
    D,
    padded,
    s_x,
    s_prediction,
    LEVELS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDING: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_x = residual_tile(
        x, prediction, pre_bias, i_n * s_x + o_d, i_n * s_prediction + o_d, o_d, m_d, m_d
    )
    tl.store(rest + i_n * D + o_d, b_x, mask=m_d)
    b_r = tl.where(m_d, b_x.to(tl.float32), 0.0)
    m_usable = tl.abs(b_r) < LARGEST  # False for NaN
    b_r = tl.where(m_usable, b_r, 0.0)
    peak = tl.max(tl.abs(b_r), axis=0)
    usable = tl.sum(m_usable.to(tl.int32), axis=0) == BD
    usable = usable & ((peak == 0.0) | (peak * LARGEST > 1.0))  # type: ignore
    step = tl.where(usable & (peak > 0.0), peak / LEVELS, 1.0)  # type: ignore
    b_scaled = tl.where(usable, b_r / step, 0.0)
    b_level = tl.floor(b_scaled + 0.5)
    b_high = tl.floor((b_level + 64.0) / 128.0)
    b_low = b_level - 128.0 * b_high
    p_levels = levels + i_n * 2 * padded + o_d
    tl.store(p_levels, b_high.to(tl.int8), mask=m_d)
    tl.store(p_levels + padded, b_low.to(tl.int8), mask=m_d)
    along = tl.sum(tl.load(dither + o_d, mask=m_d, other=0.0) * b_level, axis=0)
    b_error = b_scaled - b_level
    norm, error = tl.sum(b_level * b_level, axis=0), tl.sum(b_error * b_error, axis=0)
    size = step * tl.sqrt(norm)
    error = step * (tl.sqrt(error) + ROUNDING * (tl.sqrt(norm) + tl.sqrt(error)))
    tl.store(n_candidates + i_n, tl.where(usable, 0, -1))
    p_facts = facts + i_n * 4
    tl.store(p_facts, step)
    tl.store(p_facts + 1, along)
    tl.store(p_facts + 2, size)
    tl.store(p_facts + 3, error)


@triton.jit
def _positive(b):
    """Bits of positive numbers, in whose order these are; 0 for others; NaN is the largest."""
    b_bits = b.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(b <= 0.0, 0, b_bits)


@triton.jit
def _bound(p_terms, M, b_size, b_error, b_bias, m_l, ROUNDING: tl.constexpr):
    """λ, from the terms of latents at `p_terms` and the norms of rows; more than any rounding of
    numbers that are too small for float32."""
    b_weight_error = tl.load(p_terms + M, mask=m_l, other=0.0)
    b_norm = tl.load(p_terms + 2 * M, mask=m_l, other=0.0)
    return b_size * b_weight_error + b_error * b_norm + ROUNDING * tl.abs(b_bias) + 1e-36


@triton.jit
def screen_kernel(
    levels,  # [BN, 2, padded] int8
    q,  # [M', padded] int8, M' a multiple of BL, padded of BK
    terms,  # [3, M]
    bias,  # [M] or None
    facts,  # [n, 4]
    upper,  # [n, M], rows s_upper apart, as integers: ŝ + λ
    best,  # [2, n, groups]: the largest of ŝ − λ and of ŝ + λ
    n,
    padded,
    M,
    groups,
    s_upper,
    threshold,  # [M] or None
    ROUNDING: tl.constexpr,
    GROUP: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    i_l = tl.program_id(0)
    o_l, o_n, o_k = i_l * BL + tl.arange(0, BL), tl.arange(0, BN), tl.arange(0, BK)
    m_l, m_n = o_l < M, o_n < n
    p_q = q + o_l.to(tl.int64)[:, None] * padded + o_k[None, :]
    p_levels = levels + o_n[None, :] * (2 * padded) + o_k[:, None]
    # [BL, BN]: latents fill the rows of the matrix instruction, tokens the short side
    b_high = tl.zeros([BL, BN], dtype=tl.int32)
    b_low = tl.zeros([BL, BN], dtype=tl.int32)
    for _ in range(0, padded, BK):
        b_q = tl.load(p_q)
        b_high = tl.dot(b_q, tl.load(p_levels), b_high, out_dtype=tl.int32)
        b_low = tl.dot(b_q, tl.load(p_levels + padded), b_low, out_dtype=tl.int32)
        p_q += BK
        p_levels += BK
    # [1, BN]
    p_facts = facts + o_n[None, :] * 4
    m_row = m_n[None, :]
    b_step = tl.load(p_facts, mask=m_row, other=0.0)
    b_along = tl.load(p_facts + 1, mask=m_row, other=0.0)
    b_size = tl.load(p_facts + 2, mask=m_row, other=0.0)
    b_error = tl.load(p_facts + 3, mask=m_row, other=0.0)
    # [BL, 1]
    p_terms, m_latent = terms + o_l[:, None], m_l[:, None]
    b_bias = tl.zeros([BL, 1], tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + o_l[:, None], mask=m_latent, other=0.0).to(tl.float32)
    b_steps = tl.load(p_terms, mask=m_latent, other=0.0)
    # [BL, BN]
    b_score = b_high.to(tl.float32) * 128.0 + b_low.to(tl.float32)
    b_score = (b_score - b_along) * b_step * b_steps + b_bias
    b_bound = _bound(p_terms, M, b_size, b_error, b_bias, m_latent, ROUNDING)
    b_upper = tl.where(m_latent, _positive(b_score + b_bound), 0)
    if threshold is not None:
        b_level = tl.load(threshold + o_l[:, None], mask=m_latent, other=0.0).to(tl.float32)
        b_upper = tl.where(b_upper > _positive(b_level), b_upper, 0)
    b_lower = b_score - b_bound
    b_lower = tl.where(m_latent & (b_lower > 0.0), b_lower.to(tl.int32, bitcast=True), 0)
    p_upper = upper + o_n.to(tl.int64)[None, :] * s_upper + o_l[:, None]
    tl.store(p_upper, b_upper, mask=m_latent & m_row)
    o_g = i_l * (BL // GROUP) + tl.arange(0, BL // GROUP)
    p_best = best + o_n[None, :] * groups + o_g[:, None]
    m_best = (o_g < groups)[:, None] & m_row
    # [BL / GROUP, BN]
    b_lower = tl.max(tl.reshape(b_lower, [BL // GROUP, GROUP, BN]), axis=1)
    b_upper = tl.max(tl.reshape(b_upper, [BL // GROUP, GROUP, BN]), axis=1)
    tl.store(p_best, b_lower, mask=m_best)
    tl.store(p_best + n * groups, b_upper, mask=m_best)


@triton.jit
def pick_kernel(
    upper,  # [n, M], rows s_upper apart, as integers
    best,  # [2, n, groups]
    picked,  # [n, 2, ROOM]: groups with candidates; candidates, in order
    n_candidates,  # [n]; −1 stays; set to −1 where there are more than there is room for
    n,
    M,
    groups,
    s_upper,
    k,
    BY_RANK: tl.constexpr,  # candidates reach the k-th lower bound; else all that is not 0
    ULP: tl.constexpr,
    SMALLEST: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
    BG: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, GROUPS)
    p_best = best + i_n * groups + o_g
    if BY_RANK:
        # k groups, hence k latents, have a score of at least `low`.
        b_best = tl.load(p_best, mask=o_g < groups, other=0)
        least = tl.min(tl.where(o_g < groups, b_best, 0x7FFFFFFF), axis=0)
        _, _, _, low = take_first(b_best, least, k)
        lower = low.to(tl.float32, bitcast=True) * (1.0 - ULP) - SMALLEST
        least = tl.maximum(lower.to(tl.int32, bitcast=True), 1)  # a negative number is one, too
    else:
        least = 1
    # [GROUPS]
    m_group = tl.load(p_best + n * groups, mask=o_g < groups, other=0) >= least
    b_slot = tl.cumsum(m_group.to(tl.int32), axis=0) - 1
    p_groups = picked + i_n * 2 * ROOM
    p_picked = p_groups + ROOM
    tl.store(p_groups + b_slot, o_g, mask=m_group & (b_slot < ROOM))
    n_groups = tl.sum(m_group.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads wrote the groups than read them
    too_many = (n_groups > ROOM) | (tl.load(n_candidates + i_n) < 0)
    count = tl.where(too_many, ROOM + 1, 0)
    n_groups = tl.where(too_many, 0, n_groups)
    for i_g in range(0, n_groups, BG):
        o_s = i_g + tl.arange(0, BG)
        b_group = tl.load(p_groups + o_s, mask=o_s < n_groups, other=0)
        # [BG, GROUP]: groups in order, hence latents in order
        o_m = b_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        m_m = (o_s < n_groups)[:, None] & (o_m < M)
        b_upper = tl.load(upper + i_n * s_upper + o_m, mask=m_m, other=0)
        # [BG * GROUP]
        m_candidate = tl.reshape(b_upper >= least, [BG * GROUP])
        b_place = count + tl.cumsum(m_candidate.to(tl.int32), axis=0) - 1
        o_m = tl.reshape(o_m, [BG * GROUP])
        tl.store(p_picked + b_place, o_m, mask=m_candidate & (b_place < ROOM))
        count += tl.sum(m_candidate.to(tl.int32), axis=0)
    tl.store(n_candidates + i_n, tl.where(count > ROOM, -1, count))


@triton.jit
def rescore_kernel(
    rest,  # [n, D]
    weight,  # [M, D], strides s_latent and s_dimension
    bias,  # [M] or None
    terms,  # [3, M]
    facts,  # [n, 4]
    upper,  # [n, M], rows s_upper apart, as integers
    picked,  # [n, 2, ROOM]
    n_candidates,  # [n]; set to −1 where a score is outside its bounds
    found,  # [n, ROOM]: exact scores
    M,
    s_upper,
    s_latent,
    s_dimension,
    ROUNDING: tl.constexpr,
    D: tl.constexpr,
    ROOM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.load(n_candidates + i_n)
    if tl.program_id(1) * BC >= count:
        return
    m_c = o_c < count
    # [BC]
    b_latent = tl.load(picked + (i_n * 2 + 1) * ROOM + o_c, mask=m_c, other=0)
    p_row = weight + b_latent.to(tl.int64)[:, None] * s_latent
    # [BC, BD], added up at the end: that sum crosses threads
    b_products = tl.zeros([BC, BD], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_rest = tl.load(rest + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        p_w = p_row + o_d.to(tl.int64)[None, :] * s_dimension
        b_w = tl.load(p_w, mask=m_c[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_products += b_rest[None, :] * b_w
    b_score = tl.sum(b_products, axis=1)
    b_bias = tl.zeros([BC], tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + b_latent, mask=m_c, other=0.0).to(tl.float32)
    b_score += b_bias
    tl.store(found + i_n * ROOM + o_c, b_score.to(found.dtype.element_ty), mask=m_c)
    size, error = tl.load(facts + i_n * 4 + 2), tl.load(facts + i_n * 4 + 3)
    b_upper = tl.load(upper + i_n * s_upper + b_latent, mask=m_c, other=0)
    b_upper = b_upper.to(tl.float32, bitcast=True)
    p_terms = terms + b_latent
    b_bound = _bound(p_terms, M, size, error, b_bias, m_c, ROUNDING)
    # The exact score is a float32 sum itself.
    b_norm = tl.load(p_terms + 2 * M, mask=m_c, other=0.0)
    b_slack = 16 * ROUNDING * (size * b_norm + tl.abs(b_bias))
    within = (b_score <= b_upper + b_slack) & (b_score >= b_upper - 2 * b_bound - b_slack)
    if tl.sum((m_c & (within == 0)).to(tl.int32), axis=0) > 0:  # type: ignore
        tl.store(n_candidates + i_n, -1)


@triton.jit
def select_screened_kernel(
    found,  # [n, ROOM], as integers
    picked,  # [n, 2, ROOM]
    n_candidates,  # [n]; negative: all scores are computed
    scores,  # [n, M], rows s_scores apart, as integers
    best,  # [n, groups]
    acts,  # [n, k], as integers
    indices,  # [n, k]
    M,
    groups,
    s_scores,
    k,
    threshold,  # [M] or None, as integers
    n_active,  # [n] or None
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    ROOM: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_acts, p_indices = acts + i_n * k, indices + i_n * k
    count = tl.load(n_candidates + i_n)
    if count < 0:
        p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
        if BM > 0:
            above = threshold_maxima(p_scores, threshold, p_best, M, groups, GROUP, BM, INF, TOP)
            tl.store(n_active + i_n, above)
        select_row(
            p_scores,
            threshold,
            p_best,
            p_acts,
            p_indices,
            M,
            groups,
            k,
            GROUP,
            GROUPS,
            SLOTS,
            INF,
            TOP,
        )
    else:
        o_c, o_s = tl.arange(0, ROOM), tl.arange(0, SLOTS)
        m_c = o_c < count
        # [ROOM]
        b_key = key(tl.load(found + i_n * ROOM + o_c, mask=m_c, other=0), INF, TOP)
        b_latent = tl.load(picked + (i_n * 2 + 1) * ROOM + o_c, mask=m_c, other=0)
        if threshold is not None:
            b_key = above_threshold(b_key, threshold, b_latent, m_c, INF, TOP)
            tl.store(n_active + i_n, tl.sum((b_key > 0).to(tl.int32), axis=0))
        least = tl.maximum(tl.min(tl.where(m_c, b_key, TOP), axis=0), 0)
        m_taken, b_slot, taken, _ = take_first(b_key, least, k)
        tl.store(p_acts + b_slot, b_key, mask=m_taken)
        tl.store(p_indices + b_slot, b_latent, mask=m_taken)
        m_padding = (o_s >= taken) & (o_s < k)
        tl.store(p_acts + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)
        tl.store(p_indices + o_s, tl.zeros([SLOTS], tl.int32), mask=m_padding)
    if BJ > 0:
        sort_row(p_acts, p_indices, k, SLOTS, BJ)
