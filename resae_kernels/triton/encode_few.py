# pyright: basic
"""Encoder GEMM of at most 16 tokens in Triton, bound by reading `weight` once.

The type of a tile names the kernel:

- `SmallGemmTile`: matrix instructions multiply latents × dimensions by dimensions × 16 tokens;
- `GemvTile`: at most two tokens; each weight is multiplied in the register it was loaded to, and
  passes through no shared memory.

`weight` is read as it lies, by rows (`[M, D]`) or by columns (a view of `[D, M]`): it is never
copied for the strides it has.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.residual import launch_residual, residual_tile
from resae_kernels.triton.runtime import tl, triton
from resae_kernels.triton.tiles import GemvTile, SmallGemmTile

FEW_TOKENS = 16
"""Tokens up to which the GEMM is bound by reading `weight`: one Triton kernel of our own."""

GEMV_TOKENS = 2
"""Tokens up to which a tile may be a `GemvTile`."""


def readable(weight: Tensor) -> Tensor:
    """`weight` itself where its rows or its columns lie in one piece, otherwise a copy."""
    return weight if 1 in weight.stride() else weight.contiguous()


def small_gemm_tile_name(dtype: torch.dtype, N: int, weight_shape, weight_strides) -> str:
    """The name in `tiles.TILES` of the scores of N tokens."""
    # Rows that start anywhere are loaded element by element: in tiles for elements twice as wide,
    # or registers would not suffice.
    run = weight_shape[1] if weight_strides[1] == 1 else weight_shape[0]
    bits = 8 * dtype.itemsize if run % 16 == 0 else 32
    return f"gemm_{GEMV_TOKENS if N <= GEMV_TOKENS else FEW_TOKENS}_tokens_{bits}bit"


def small_gemm_tile(N: int, weight: Tensor) -> SmallGemmTile | GemvTile:
    """The tile for the scores of N tokens."""
    name = small_gemm_tile_name(weight.dtype, N, weight.shape, weight.stride())
    return tiles.tile(name, weight.device)


def small_gemm(
    x,
    weight,
    bias,
    pre_bias,
    prediction,
    scores,
    best,
    group: int,
    tile: SmallGemmTile | GemvTile,
    rest,
    n_candidates: Tensor | None = None,
) -> None:
    """Write scores `[n, M]` and the largest score of each group of latents, `[n, groups]`, both as
    integers (`KEYS`).

    `rest`, `[n, D]`, or None to allocate it: where the residual goes if it has its own launch. With
    `n_candidates [n]`, int32, nothing is computed unless one of them is negative.
    """
    if tile.residual_launch and not (prediction is None and pre_bias is None):
        x, prediction, pre_bias = launch_residual(x, pre_bias, prediction, rest), None, None
    (n, D), M = x.shape, weight.shape[0]
    settings = small_gemm_settings(tile, n, group, x.dtype, not x.is_cuda)
    programs = blocks = runtime.cdiv(M, settings["BL"])
    if isinstance(tile, SmallGemmTile) and tile.programs_per_multiprocessor:
        resident = tile.programs_per_multiprocessor * _multiprocessors(x.device)
        programs = min(blocks, resident)
    small_gemm_variant(tile)[(programs,)](
        x,
        prediction,
        pre_bias,
        weight,
        bias,
        scores,
        best,
        n,
        D,
        M,
        runtime.cdiv(M, group),
        x.stride(0),
        0 if prediction is None else prediction.stride(0),
        *weight.stride(),
        scores.stride(0),
        n_candidates,
        **settings,
    )


@cache
def small_gemm_settings(
    tile: SmallGemmTile | GemvTile, n: int, group: int, dtype: torch.dtype, upcast: bool
) -> dict[str, Any]:
    """Constants and options of a launch, made once."""
    constants = small_gemm_constants(tile, n, group, dtype)
    if isinstance(tile, SmallGemmTile):
        constants["UPCAST"] = upcast
    return constants | runtime.launch_options(tile.num_warps, tile.num_stages)


def small_gemm_variant(tile: SmallGemmTile | GemvTile) -> Any:
    """The kernel that a tile is for."""
    return gemv_kernel if isinstance(tile, GemvTile) else small_gemm_kernel


def small_gemm_constants(
    tile: SmallGemmTile | GemvTile, n: int, group: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Compile-time constants of the kernel of a tile."""
    keys = KEYS[dtype]
    constants = {"GROUP": group, "INF": keys.inf, "TOP": keys.top}
    if isinstance(tile, GemvTile):
        latents = max(tile.latents, group)  # a program sees whole groups
        dimensions = tile.latents * tile.dimensions // latents
        return constants | {"BL": latents, "BK": dimensions, "BN": n}
    return constants | {
        "BL": tile.latents,
        "BK": tile.dimensions,
        "BN": FEW_TOKENS,
        "PRECISION": tile.precision,
        "PERSISTENT": tile.programs_per_multiprocessor > 0,
        "UPCAST": False,
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _store_scores(
    b_score,  # [BL, BN]
    bias,
    scores,
    best,
    i_l,
    n,
    M,
    groups,
    s_scores,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    BL: tl.constexpr,
    BN: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Add the bias, round once, store the scores and the largest of each group."""
    o_l, o_n = i_l * BL + tl.arange(0, BL), tl.arange(0, BN)
    m_l, m_n = o_l < M, o_n < n
    if bias is not None:
        b_score += tl.load(bias + o_l, mask=m_l, other=0.0).to(tl.float32)[:, None]
    # The one rounding: what is compared is what is returned.
    b_bits = b_score.to(dtype).to(scores.dtype.element_ty, bitcast=True)
    p_scores = scores + o_n.to(tl.int64)[None, :] * s_scores + o_l[:, None]
    tl.store(p_scores, b_bits, mask=m_l[:, None] & m_n[None, :])
    # Where x is infinite, a row past the last latent holds 0 · inf.
    b_key = tl.where(m_l[:, None], key(b_bits, INF, TOP), 0)
    # [BL / GROUP, BN]
    b_best = tl.max(tl.reshape(b_key, [BL // GROUP, GROUP, BN]), axis=1)
    o_g = i_l * (BL // GROUP) + tl.arange(0, BL // GROUP)
    p_best = best + o_n.to(tl.int64)[None, :] * groups + o_g[:, None]
    tl.store(p_best, b_best, mask=(o_g < groups)[:, None] & m_n[None, :])


@triton.jit
def is_any_row_exact(n_candidates, n, BN: tl.constexpr):
    """True if a row was not screened: then all n rows are multiplied."""
    o_n = tl.arange(0, BN)
    return tl.min(tl.load(n_candidates + o_n, mask=o_n < n, other=0), axis=0) < 0  # type: ignore


@triton.jit
def small_gemm_kernel(
    x,  # [n, D], n ≤ BN, rows s_x apart
    prediction,  # [n, D] or None, rows s_prediction apart
    pre_bias,  # [D] or None
    weight,  # [M, D], strides s_latent and s_dimension, one of them 1
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart, as integers
    best,  # [n, groups], as integers
    n,
    D,
    M,
    groups,
    s_x,
    s_prediction,
    s_latent,
    s_dimension,
    s_scores,
    n_candidates,  # [n] or None
    GROUP: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a program takes several blocks of latents, one after another
    INF: tl.constexpr,
    TOP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if n_candidates is not None:  # noqa: SIM102 - nested: the outer one at compile time
        if not is_any_row_exact(n_candidates, n, BN):
            return
    o_n = tl.arange(0, BN)
    m_n = (o_n < n)[None, :]
    o_x = o_n.to(tl.int64)[None, :] * s_x
    o_prediction = o_n.to(tl.int64)[None, :] * s_prediction
    blocks = 1
    if PERSISTENT:
        blocks = tl.cdiv(tl.cdiv(M, BL) - tl.program_id(0), tl.num_programs(0))
    for i_block in range(0, blocks):
        i_l = tl.program_id(0) + i_block * tl.num_programs(0)
        o_l = i_l * BL + tl.arange(0, BL)
        m_l = o_l < M
        o_w = o_l.to(tl.int64)[:, None] * s_latent + tl.arange(0, BK)[None, :] * s_dimension
        p_w = weight
        # [BL, BN]: latents fill the rows of the matrix instruction, tokens the short side
        b_score = tl.zeros([BL, BN], dtype=tl.float32)
        for i_d in range(0, D, BK):
            o_d = i_d + tl.arange(0, BK)
            m_d = o_d < D
            # [BL, BK]
            b_w = tl.load(p_w + o_w, mask=m_l[:, None] & m_d[None, :], other=0.0)
            p_w += BK * s_dimension
            o_k, m_k = o_d[:, None], m_d[:, None]
            # [BK, BN]
            b_x = residual_tile(
                x, prediction, pre_bias, o_x + o_k, o_prediction + o_k, o_k, m_k & m_n, m_k
            )
            if UPCAST:  # the interpreter multiplies bf16 by its bit patterns
                b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
            b_score = tl.dot(b_w, b_x, b_score, input_precision=PRECISION)
        dtype: tl.constexpr = x.dtype.element_ty
        _store_scores(
            b_score, bias, scores, best, i_l, n, M, groups, s_scores, dtype, GROUP, BL, BN, INF, TOP
        )


@triton.jit
def gemv_kernel(
    x,  # [n, D], n = BN, rows s_x apart
    prediction,  # [n, D] or None, rows s_prediction apart
    pre_bias,  # [D] or None
    weight,  # [M, D], strides s_latent and s_dimension, one of them 1
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart, as integers
    best,  # [n, groups], as integers
    n,
    D,
    M,
    groups,
    s_x,
    s_prediction,
    s_latent,
    s_dimension,
    s_scores,
    n_candidates,  # [n] or None
    GROUP: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,  # 1 or 2
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    if n_candidates is not None:  # noqa: SIM102 - nested: the outer one at compile time
        if not is_any_row_exact(n_candidates, n, BN):
            return
    i_l = tl.program_id(0)
    o_l = i_l * BL + tl.arange(0, BL)
    m_l = o_l < M
    p_w = weight + o_l.to(tl.int64)[:, None] * s_latent
    # [BL, BK] per token: a thread adds to its own sums until the end
    b_first = tl.zeros([BL, BK], tl.float32)
    if BN == 2:
        b_second = tl.zeros([BL, BK], tl.float32)
    for i_d in range(0, D, BK):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < D
        p_tile = p_w + o_d.to(tl.int64)[None, :] * s_dimension
        b_w = tl.load(p_tile, mask=m_l[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_x = residual_tile(x, prediction, pre_bias, o_d, o_d, o_d, m_d, m_d)
        b_first += b_w * b_x.to(tl.float32)[None, :]
        if BN == 2:
            b_x = residual_tile(
                x, prediction, pre_bias, s_x + o_d, s_prediction + o_d, o_d, m_d, m_d
            )
            b_second += b_w * b_x.to(tl.float32)[None, :]
    # [BL, BN]
    if BN == 2:
        b_score = tl.join(tl.sum(b_first, 1), tl.sum(b_second, 1))
    else:
        b_score = tl.sum(b_first, 1, keep_dims=True)
    dtype: tl.constexpr = x.dtype.element_ty
    _store_scores(
        b_score, bias, scores, best, i_l, n, M, groups, s_scores, dtype, GROUP, BL, BN, INF, TOP
    )
