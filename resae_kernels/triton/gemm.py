# pyright: basic
"""Encoder GEMM in Triton whose epilogue also writes the largest score of each group of latents.

scores[n, m] = Σ_d x[n, d] · weight[m, d] + bias[m], 16-bit inputs, sums in fp32, one rounding.
2·n·D·M FLOPs. After the library's GEMM a pass over the scores takes the maxima, which is 184/D of
the GEMM's time on an H100 by bandwidth and peak FLOP/s; here they are taken from the accumulators,
and the selection reads back k·group scores of a row.
"""

import torch
from torch import Tensor

from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.gemm_specialised import launch_specialised_gemm
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.runtime import tl, triton


def gemm_takes(x: Tensor, weight: Tensor) -> bool:
    """True if both are 16-bit, with contiguous rows that begin at multiples of 16 bytes."""
    return x.dtype in KEYS and all(
        t.dtype.itemsize == 2
        and t.stride() == (t.shape[1], 1)  # `is_contiguous` lets a single row of any stride pass
        and t.shape[1] % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in (x, weight)
    )


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    best: Tensor,
    group: int,
    tile: tiles.GemmTile | tiles.SpecialisedGemmTile,
) -> None:
    """Write `scores [n, M]` and the keys `best [n, groups]` of `x [n, D]`, `weight [M, D]`."""
    if isinstance(tile, tiles.SpecialisedGemmTile):
        given = x, weight, bias, scores, best, group, tile
        launch_specialised_gemm(*given, _multiprocessors(x.device))
        return
    (n, D), M = x.shape, weight.shape[0]
    keys = KEYS[x.dtype]
    programs = triton.cdiv(n, tile.tokens) * triton.cdiv(M, tile.latents)
    if tile.persistent:
        programs = min(programs, _multiprocessors(x.device))
    blocks = ((x, tile.tokens), (weight, tile.latents))
    gemm_kernel[(programs,)](
        *(_descriptor(t, [rows, tile.dimensions]) if tile.descriptors else t for t, rows in blocks),
        bias,
        scores,
        best,
        n,
        D,
        M,
        best.shape[1],
        scores.stride(0),
        **gemm_constants(tile, M, group),
        INF=keys.inf,
        TOP=keys.top,
        UPCAST=not scores.is_cuda,
        **runtime.launch_options(tile.num_warps, tile.num_stages),
    )


def gemm_constants(tile: tiles.GemmTile, M: int, group: int) -> dict[str, int | bool]:
    """Compile-time constants of `gemm_kernel`, except those of the keys."""
    return {
        "GROUP": group,
        "BN": tile.tokens,
        "BL": tile.latents,
        "BK": tile.dimensions,
        "DESCRIPTORS": bool(tile.descriptors),
        "PERSISTENT": bool(tile.persistent),
        "WHOLE_GROUPS": M % group == 0,
    }


def _descriptor(matrix: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: fewer programs than tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _block(
    matrix, i_row, i_d, rows, D, BR: tl.constexpr, BK: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """`[BR, BK]` of a matrix `[rows, D]`, zero outside of it."""
    if DESCRIPTOR:
        b_block = matrix.load([i_row, i_d])
    else:
        o_row, o_d = i_row + tl.arange(0, BR), i_d + tl.arange(0, BK)
        p_block = matrix + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_block = tl.load(p_block, mask=(o_row < rows)[:, None] & (o_d < D)[None, :], other=0.0)
    return b_block


@triton.jit
def gemm_kernel(
    x,  # [n, D], or its descriptor
    weight,  # [M, D], or its descriptor
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups]
    n,
    D,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Tokens first: the x of a chunk stays in the L2 cache, and each weight is read there once.
    blocks = tl.cdiv(n, BN)
    # Flattened into the loop over D, the next block's loads are in flight during the epilogue.
    first, tiles = tl.program_id(0), blocks * tl.cdiv(M, BL)
    for i_tile in tl.range(first, tiles, tl.num_programs(0), flatten=PERSISTENT):  # type: ignore[misc]
        i_n, i_l = (i_tile % blocks) * BN, (i_tile // blocks) * BL
        # [BN, BL]
        b_score = tl.zeros([BN, BL], dtype=tl.float32)
        for i_d in range(0, D, BK):
            b_x = _block(x, i_n, i_d, n, D, BN, BK, DESCRIPTORS)
            b_w = _block(weight, i_l, i_d, M, D, BL, BK, DESCRIPTORS)
            if UPCAST:  # the interpreter multiplies bf16 by its bit patterns
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            b_score = tl.dot(b_x, b_w.T, b_score)
        o_n, o_l = i_n + tl.arange(0, BN), i_l + tl.arange(0, BL)
        m_n, m_l = o_n < n, o_l < M
        if bias is not None:
            b_score += tl.load(bias + o_l, mask=m_l, other=0.0).to(tl.float32)[None, :]
        # The one rounding: what is compared is what is returned.
        p_scores = scores + o_n.to(tl.int64)[:, None] * s_scores + o_l[None, :]
        b_rounded = b_score.to(scores.dtype.element_ty)
        tl.store(p_scores, b_rounded, mask=m_n[:, None] & m_l[None, :])
        # Bits of fp32 are ordered as the keys are; rounding the largest gives the largest rounded.
        b_bits = b_score.to(tl.int32, bitcast=True)
        b_bits = tl.where(b_score != b_score, 0x7FFFFFFF, b_bits)
        if not WHOLE_GROUPS:  # where x is infinite, a latent past the last holds 0 · inf
            b_bits = tl.where(m_l[None, :], b_bits, 0)
        # [BN, BL / GROUP]
        b_best = tl.max(tl.reshape(b_bits, [BN, BL // GROUP, GROUP]), axis=2)
        b_best = tl.cast(b_best, tl.float32, bitcast=True).to(scores.dtype.element_ty)
        b_best = key(b_best.to(best.dtype.element_ty, bitcast=True), INF, TOP)
        o_g = i_l // GROUP + tl.arange(0, BL // GROUP)
        p_best = best + o_n.to(tl.int64)[:, None] * groups + o_g[None, :]
        tl.store(p_best, b_best, mask=m_n[:, None] & (o_g < groups)[None, :])
