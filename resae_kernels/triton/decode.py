# pyright: basic
"""Sparse decode in Triton, its squared error, and the two sums of its backward.

The decode gathers rows of `W_dec`; the gradient of the acts is an SDDMM with the same rows;
the gradient of `W_dec` is summed latent by latent over sorted codes, each row one ordered sum:
deterministic, no atomics.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.runtime import tl, triton
from resae_kernels.triton.tiles import GatherTile
from resae_kernels.types import accumulation_dtype

SCATTER_SLOTS = 64
"""Slots of a row that a program of the scatter compares with as many at a time. Chosen from
ahead-of-time compilation, not measured."""

SPREAD_TOKENS = 16
"""Up to here a decode spreads each token over many narrow programs (cost model, not measured)."""

PIECE = 256
"""Longest run of one latent's entries that one program sums: a latent that fires on every second
token would otherwise keep one program busy long after the rest."""


def decode_tile_name(N: int) -> str:
    """The name in `tiles.TILES` of what N tokens are decoded with."""
    return "decode_few" if N <= SPREAD_TOKENS else "decode"


@cache
def decode_settings(
    tile: GatherTile, N: int, widths: tuple[int, ...], D: int, dtype: torch.dtype
) -> tuple[int, dict[str, Any]]:
    """Slices of D, and the constants and options of the launch. N counts as few or many."""
    constants = decode_constants(tile, N, widths, D, dtype)
    settings = constants | tile.options(decode_registers(N, dtype))
    return runtime.cdiv(D, constants["BD"]), settings


def decode_constants(
    tile: GatherTile, N: int, widths: tuple[int, ...], D: int, dtype: torch.dtype
) -> dict[str, Any]:
    rows = min(tile.rows, runtime.next_power_of_2(max(1, *widths)))
    return {"K": widths, "BK": rows, "SPREAD": N <= SPREAD_TOKENS} | tile.constants(D, dtype)


def decode_registers(N: int, dtype: torch.dtype) -> int | None:
    """The register budget of a decode: none for wide dtypes and few tokens, whose loop over k is
    unrolled and, with a budget, spills."""
    return tiles.GATHER_REGISTERS if N > SPREAD_TOKENS and dtype.itemsize == 2 else None


def launch_decode(
    acts, indices, W_dec, bias, prediction, out=None, target=None
) -> tuple[Tensor, Tensor | None]:
    """Decode of all dictionaries in one launch. bias and prediction may have a wider dtype than the
    acts. With a target, returns the error and its squares summed over D."""
    N, D = acts[0].shape[0], W_dec[0].shape[1]
    if out is None:
        out = acts[0].new_empty(N, D)
    tile = tiles.tile(decode_tile_name(N), out.device)
    few = min(N, SPREAD_TOKENS + 1)
    slices, settings = decode_settings(tile, few, tuple([a.shape[1] for a in acts]), D, out.dtype)
    squared = None
    if target is not None:
        squared = out.new_empty(N, slices, dtype=accumulation_dtype(out.dtype))
    if out.numel() > 0:
        with torch.cuda.device_of(out):
            # Tokens are the fast axis: all of them pass over one slice of W_dec while it is in
            # cache.
            decode_kernel[(N, slices)](
                out,
                tuple([a.contiguous() for a in acts]),
                tuple([i.contiguous() for i in indices]),
                tuple([W.contiguous() for W in W_dec]),
                None if bias is None else bias.contiguous(),
                None if prediction is None else prediction.contiguous(),
                None if target is None else target.contiguous(),
                squared,
                **settings,
            )
    return out, None if squared is None else squared.sum(1)


def launch_scatter(code: Tensor, acts: Tensor, indices: Tensor) -> None:
    """Add each row's acts to the row of `code`, `[n, M]`, which holds zeros."""
    n, k = acts.shape
    if acts.numel() == 0:
        return
    with torch.cuda.device_of(code):
        scatter_kernel[(n,)](
            code,
            acts.contiguous(),
            indices.contiguous(),
            code.shape[1],
            **scatter_constants(k, acts.dtype),
            **runtime.launch_options(num_warps=4, num_stages=1),
        )


def scatter_constants(k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "K": k,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BK": min(SCATTER_SLOTS, runtime.next_power_of_2(k)),
    }


def launch_sddmm(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    N, k = indices.shape
    out = grad.new_empty(N, k)
    if out.numel() == 0:
        return out
    tile = tiles.tile("sddmm", out.device)
    with torch.cuda.device_of(out):
        sddmm_kernel[(N, runtime.cdiv(k, tile.rows))](
            out,
            grad.contiguous(),
            indices.contiguous(),
            W.contiguous(),
            **sddmm_constants(tile, k, W.shape[1], W.dtype),
            **tile.options(tiles.GATHER_REGISTERS),
        )
    return out


def sddmm_constants(tile: GatherTile, k: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    constants = {"K": k, "BK": tile.rows} | tile.constants(D, dtype)
    return constants | {"VECTOR": min(16 // dtype.itemsize, constants["BD"])}


def launch_scatter_outer(
    weights: Sequence[Tensor],
    tokens: Tensor,
    bounds: Tensor,
    rows: Sequence[Tensor],
    total: Tensor | None = None,
) -> list[Tensor]:
    """`out[s][m] = Σ weights[s][e] · rows[s][tokens[e]]` over the entries `bounds[m] ≤ e <
    bounds[m + 1]`, for S weights and rows, all in one launch; into `total`, `[M]` in the
    accumulation dtype, `Σ weights[0][e]`.

    The first PIECE entries of a latent are summed by the program that writes its row; what lies
    beyond, before that, in pieces by programs of their own. How many of these there can be follows
    from the shapes: nothing waits for the device.
    """
    M, D, first = bounds.shape[0] - 1, rows[0].shape[1], rows[0]
    out = [first.new_empty(M, D) for _ in rows]
    if out[0].numel() == 0:
        return out
    acc_dtype = accumulation_dtype(first.dtype)
    pieces = tokens.shape[0] // PIECE
    # Where PIECE divides the entries of a latent the last of its pieces is empty: zeros.
    beyond = bounds.diff().div(PIECE, rounding_mode="floor")
    piece_bounds = F.pad(beyond.cumsum(0), (1, 0))
    piece_latent = torch.searchsorted(
        piece_bounds[1:], torch.arange(pieces, device=first.device), right=True
    )
    partial = tuple([first.new_empty(pieces, D, dtype=acc_dtype) for _ in rows])
    piece_total = None if total is None else first.new_empty(pieces, dtype=acc_dtype)
    contiguous = tuple([r.contiguous() for r in rows])
    entries = (tuple(weights), tokens, contiguous, bounds, piece_bounds)
    tile = tiles.tile("scatter_outer", first.device)
    constants = {"PIECE": PIECE, "BE": tile.rows} | tile.constants(D, first.dtype)
    slices = runtime.cdiv(D, constants["BD"])
    settings = constants | tile.options(tiles.GATHER_REGISTERS)
    with torch.cuda.device_of(first):
        if pieces > 0:
            latent_piece_kernel[(pieces, slices)](
                partial, piece_total, *entries, piece_latent, M, **settings
            )
        scatter_outer_kernel[(M, slices)](
            tuple(out), total, *entries, partial, piece_total, **settings
        )
    return out


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def decode_kernel(
    out,  # [N, D]
    acts,  # T × [N, K[t]]
    indices,  # T × [N, K[t]]
    W_dec,  # T × [M_t, D]
    bias,  # [D] or None
    prediction,  # [N, D] or None
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
    if prediction is not None:
        b_sum += tl.load(prediction + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
    if target is not None:
        b_sum -= tl.load(target + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
        # Where an act is infinite a column past the last one holds inf · 0.
        b_squared = tl.sum(tl.where(m_d, b_sum * b_sum, 0.0), 0)
        tl.store(squared + i_n * tl.num_programs(1) + tl.program_id(1), b_squared)
    tl.store(out + i_n * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def scatter_kernel(
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
def sddmm_kernel(
    out,  # [N, K]
    grad,  # [N, D]
    indices,  # [N, K]
    W,  # [M, D]
    K: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    VECTOR: tl.constexpr,  # columns that a thread loads at once
):
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < K
    # [BK]
    b_index = tl.load(indices + i_n * K + o_k, mask=m_k, other=0)
    # [BK, BD / VECTOR]: the columns of one load are added up in the thread that holds them, those
    # of all threads once at the end.
    b_products = tl.zeros([BK, BD // VECTOR], ACC)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_grad = tl.load(grad + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
        p_row = W + b_index[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_k[:, None] & m_d[None, :], other=0.0).to(ACC)
        b_terms = tl.reshape(b_grad[None, :] * b_row, [BK, BD // VECTOR, VECTOR])
        b_products += tl.sum(b_terms, 2)
    tl.store(out + i_n * K + o_k, tl.sum(b_products, 1).to(out.dtype.element_ty), mask=m_k)


@triton.jit
def sum_entries(
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
def sum_weights(weights, i_first, i_last, ACC: tl.constexpr, STEP: tl.constexpr):
    """`Σ weights[e]` over the entries `i_first ≤ e < i_last`."""
    # [STEP], added up at the end: that sum crosses threads
    b_sum = tl.zeros([STEP], ACC)
    for i_e in range(i_first, i_last, STEP):
        o_e = i_e + tl.arange(0, STEP)
        b_sum += tl.load(weights + o_e, mask=o_e < i_last, other=0.0).to(ACC)
    return tl.sum(b_sum, 0)


@triton.jit
def latent_piece_kernel(
    partial,  # S × [pieces, D]
    piece_total,  # [pieces] or None
    weights,  # S × [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # S × [N, D]
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
        for s in tl.static_range(len(rows)):  # type: ignore
            b_sum = sum_entries(weights[s], tokens, rows[s], i_first, i_last, o_d, D, ACC, BE, BD)
            tl.store(partial[s] + i_p * D + o_d, b_sum, mask=o_d < D)
        if piece_total is not None:  # noqa: SIM102 - nested: the outer one at compile time
            if tl.program_id(1) == 0:
                tl.store(piece_total + i_p, sum_weights(weights[0], i_first, i_last, ACC, 32))


@triton.jit
def scatter_outer_kernel(
    out,  # S × [M, D]
    total,  # [M] or None: the sum of each latent's weights[0]
    weights,  # S × [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # S × [N, D]
    bounds,  # [M + 1], of the latents in weights and tokens
    piece_bounds,  # [M + 1], of the latents in partial
    partial,  # S × [pieces, D]
    piece_total,  # [pieces] or None
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
    i_piece, i_end = tl.load(piece_bounds + i_m), tl.load(piece_bounds + i_m + 1)
    for s in tl.static_range(len(rows)):  # type: ignore
        b_sum = sum_entries(weights[s], tokens, rows[s], i_first, i_last, o_d, D, ACC, BE, BD)
        for i_p in range(i_piece, i_end):
            b_sum += tl.load(partial[s] + i_p * D + o_d, mask=m_d, other=0.0)
        tl.store(out[s] + i_m * D + o_d, b_sum.to(out[s].dtype.element_ty), mask=m_d)
    if total is not None:  # noqa: SIM102 - nested: the outer one at compile time
        if tl.program_id(1) == 0:
            b_total = sum_weights(weights[0], i_first, i_last, ACC, 32)
            for i_p in range(i_piece, i_end):
                b_total += tl.load(piece_total + i_p)
            tl.store(total + i_m, b_total)
