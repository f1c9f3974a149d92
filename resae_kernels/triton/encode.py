"""TopK encode in Triton: scores, largest scores of groups, selection.

A GEMM writes the scores, and the largest score of each group of consecutive latents, by which the
selection finds the k best latents (`selection.py`). Up to 16 tokens it is one kernel that reads
`weight` once (`encode_few.py`); for more tokens it is the library's GEMM, or one that also writes
the maxima (`gemm.py`), as the tile of "gemm_many_tokens_16bit" chooses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from resae_kernels.precision import residual
from resae_kernels.triton import encode_few, runtime, tiles
from resae_kernels.triton.gemm import gemm_takes, launch_gemm
from resae_kernels.triton.keys import KEYS
from resae_kernels.triton.residual import launch_residual
from resae_kernels.triton.selection import SelectionLayout, launch_select, selection_layout

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
    prediction: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
    select: Callable[[Tensor, int, bool], tuple[Tensor, ...]],
    threshold: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Acts and indices `[N, k]`; with `threshold [M]` those above it, and their number, `[N]`
    int32. `select` is used for scores that the kernels do not support: fp64, or rows too long for
    one program's registers."""
    N, M = x.shape[0], weight.shape[0]
    # Kernels need unit stride along a row; the rows of x and prediction may have any stride.
    x = x if x.stride(1) == 1 else x.contiguous()
    prediction = (
        prediction if prediction is None or prediction.stride(1) == 1 else prediction.contiguous()
    )
    weight = encode_few.readable(weight)
    bias, pre_bias = (None if t is None else t.contiguous() for t in (bias, pre_bias))
    layout = selection_layout(M, k) if x.dtype in KEYS else None

    stride = runtime.cdiv(M, 64) * 64  # every row of scores starts at a multiple of 16 bytes
    row_elements = stride + (layout.groups if layout else 0)
    rows = rows_per_chunk(N, max(1, workspace_bytes // (row_elements * x.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    everything = [acts, indices]
    if threshold is not None:
        threshold = threshold.contiguous()
        everything.append(torch.empty(N, dtype=torch.int32, device=x.device))
    scores = x.new_empty(rows, stride)[:, :M]
    with torch.cuda.device_of(x):
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            n = chunk.stop - start
            whole = n == N  # slices of everything cost microseconds
            rest = prediction if prediction is None or whole else prediction[chunk]
            part, held = (x, scores) if whole else (x[chunk], scores[:n])
            code = everything if whole else [t[chunk] for t in everything]
            # Chosen by N, not by the rows of a chunk: the last chunk is computed as the others are.
            if layout is not None and N <= encode_few.FEW_TOKENS:
                best = _small_gemm(N, part, weight, bias, pre_bias, rest, held, layout)
            else:
                part = _residual(part, pre_bias, rest)
                best = _large_gemm(part, weight, bias, held, layout)
            if layout is None:
                for to, found in zip(code, select(held, k, sorted), strict=True):
                    to.copy_(found)
            else:
                count = None if threshold is None else code[2]
                launch_select(held, best, code[0], code[1], layout, sorted, threshold, count)
    return tuple(everything)


def _residual(x: Tensor, pre_bias: Tensor | None, prediction: Tensor | None) -> Tensor:
    """`precision.residual`, in one launch where a kernel has the dtype."""
    if prediction is None and pre_bias is None:
        return x
    subtract = launch_residual if x.dtype in KEYS else residual
    return subtract(x, pre_bias, prediction)


def _small_gemm(
    N: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    scores: Tensor,
    layout: SelectionLayout,
) -> Tensor:
    """Write scores and group maxima by one kernel, chosen by N; returns the maxima."""
    integers = KEYS[x.dtype].dtype
    best = x.new_empty(x.shape[0], layout.groups, dtype=integers)
    tile, bits = encode_few.small_gemm_tile(N, weight), scores.view(integers)
    encode_few.small_gemm(
        x, weight, bias, pre_bias, prediction, bits, best, layout.group, tile, rest=None
    )
    return best


def _large_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, scores: Tensor, layout: SelectionLayout | None
) -> Tensor | None:
    """Write scores by a GEMM; returns the group maxima if that GEMM computes them."""
    # Our own needs 16-bit rows that begin at multiples of 16 bytes; else the library's is used.
    if layout is not None and gemm_takes(x, weight):
        tile, keys = tiles.tile("gemm_many_tokens_16bit", x.device), KEYS[x.dtype]
        if tile != tiles.LIBRARY_GEMM:
            best = torch.empty(x.shape[0], layout.groups, dtype=keys.dtype, device=x.device)
            launch_gemm(x, weight, bias, scores, best, layout.group, tile)
            return best
    if bias is None:
        torch.mm(x, weight.T, out=scores)
    else:
        torch.addmm(bias, x, weight.T, out=scores)
    return None
