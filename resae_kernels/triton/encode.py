"""TopK encode in Triton: scores, largest scores of groups, selection.

A product leaves scores, and the largest score of each group of consecutive latents, by which the
selection finds the k best latents (`selection.py`). Up to 16 tokens the product is one kernel that
reads `weight` once; more tokens take the library's GEMM, or one that leaves the maxima as well
(`gemm.py`): the tile of "product_of_many_16bit" decides.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from resae_kernels.precision import residual
from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.gemm import gemm_takes, launch_gemm
from resae_kernels.triton.keys import KEYS, key
from resae_kernels.triton.runtime import tl, triton
from resae_kernels.triton.selection import SelectionLayout, launch_select, selection_layout

FEW_TOKENS = 16
"""Up to here the product is bound by reading `weight`: one Triton kernel instead of a GEMM."""

GEMM_ROWS = 256
"""Rows of a large GEMM's tile, or two tiles of 128. A chunk with a part of one wastes the rest."""


def rows_per_chunk(N: int, most: int) -> int:
    """Rows of each chunk but the last, where `most` fit into the workspace.

    As few chunks as that bound allows, equal to within a tile of the GEMM: each chunk ends with a
    wave of tiles that leaves multiprocessors idle, and a short last chunk is mostly that.
    """
    if most >= N:
        return max(1, N)
    unit = GEMM_ROWS if most >= GEMM_ROWS else 1
    units = runtime.cdiv(N, unit)
    chunks = runtime.cdiv(units, most // unit)
    return runtime.cdiv(units, chunks) * unit


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
    rows = rows_per_chunk(N, max(1, workspace_bytes // (row_elements * x.itemsize)))
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
            code = (acts, indices) if whole else (acts[chunk], indices[chunk])
            # By N, not by the rows of a chunk: the last chunk is computed as the others are.
            if layout is not None and N <= FEW_TOKENS:
                best = product_of_few(part, weight, bias, pre_bias, rest, held, layout)
            else:
                part = launch_residual(part, pre_bias, rest)
                best = _product_of_many(part, weight, bias, held, layout)
            if layout is None:
                acts[chunk], indices[chunk] = select(held, k, sorted)
            else:
                launch_select(held, best, *code, layout, sorted)
    return acts, indices


def _product_of_many(x, weight, bias, scores, layout: SelectionLayout | None) -> Tensor | None:
    """Scores by a GEMM; returns the group maxima if it leaves them."""
    # Ours is for 16-bit rows that begin at multiples of 16 bytes; all others are the library's.
    if layout is not None and gemm_takes(x, weight):
        tile, keys = tiles.tile("product_of_many_16bit", x.device), KEYS[x.dtype]
        if tile != tiles.LIBRARY_GEMM:
            best = torch.empty(x.shape[0], layout.groups, dtype=keys.dtype, device=x.device)
            launch_gemm(x, weight, bias, scores, best, layout.group, tile)
            return best
    if bias is None:
        torch.mm(x, weight.T, out=scores)
    else:
        torch.addmm(bias, x, weight.T, out=scores)
    return None


def launch_residual(x: Tensor, pre_bias: Tensor | None, base: Tensor | None) -> Tensor:
    """`precision.residual`, in one launch where a kernel has the dtype."""
    if base is None and pre_bias is None:
        return x
    if x.dtype not in KEYS:
        return residual(x, pre_bias, base)
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
    b_key = tl.where(m_l[:, None], key(b_bits, INF, TOP), 0)
    # [BL / GROUP, BN]
    b_best = tl.max(tl.reshape(b_key, [BL // GROUP, GROUP, BN]), axis=1)
    o_g = i_l * (BL // GROUP) + tl.arange(0, BL // GROUP)
    p_best = best + o_n.to(tl.int64)[None, :] * groups + o_g[:, None]
    tl.store(p_best, b_best, mask=(o_g < groups)[:, None] & m_n[None, :])
