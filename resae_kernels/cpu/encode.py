"""TopK encode in torch: a chunk of scores at a time, so that they stay in cache between the GEMM
and the selection; few tokens by one call of the compiled library."""

from collections.abc import Iterator

import torch
from torch import Tensor

from resae_kernels.cpu import native, onednn
from resae_kernels.cpu.private_torch import has_16bit_gemm
from resae_kernels.cpu.selection import select, select_above
from resae_kernels.precision import residual
from resae_kernels.types import accumulation_dtype


def encode_in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Acts and indices `[N, k]` of `x [N, D]`."""
    N = x.shape[0]
    if native.takes(x, weight, bias, pre_bias, prediction) and native.EXACT_ROWS[x.dtype] >= N:
        return native.exact_encode(x, weight, bias, k, pre_bias, prediction, sorted)
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    for chunk, scores in _score_chunks(x, weight, bias, pre_bias, prediction, workspace_bytes):
        acts[chunk], indices[chunk] = select(scores, k, sorted)
    return acts, indices


def threshold_encode_in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Acts and indices `[N, k]` of the k largest scores above `threshold [M]`, and how many are
    above, `[N]` int32."""
    N = x.shape[0]
    n_active = torch.empty(N, dtype=torch.int32, device=x.device)
    given = x, weight, bias, pre_bias, prediction, threshold
    if native.takes(*given) and native.EXACT_ROWS[x.dtype] >= N:
        code = native.exact_encode(
            x, weight, bias, k, pre_bias, prediction, sorted, threshold, n_active
        )
        return *code, n_active
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    for chunk, scores in _score_chunks(x, weight, bias, pre_bias, prediction, workspace_bytes):
        acts[chunk], indices[chunk], n_active[chunk] = select_above(scores, threshold, k, sorted)
    return acts, indices, n_active


def _score_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    workspace_bytes: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their scores `[n, M]` in x's dtype, which the next chunk overwrites."""
    N, M = x.shape[0], weight.shape[0]
    # 16-bit weights are multiplied as they are where the processor can: sums are float32 there too.
    narrow = x.device.type == "cpu" and has_16bit_gemm(x.dtype)
    dtype = x.dtype if narrow else accumulation_dtype(x.dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(1, min(N, workspace_bytes // (M * dtype.itemsize)))
    by_onednn = weight.shape[1] <= onednn.MOST_DEPTH and onednn.pays(rows, weight)
    scores = None if by_onednn else torch.empty(rows, M, dtype=dtype, device=x.device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        part = None if prediction is None else prediction[chunk]
        rest = residual(x[chunk], pre_bias, part).to(dtype)
        if scores is None:
            chunk_scores = onednn.linear(rest, weight, bias)
        else:
            chunk_scores = scores[: rest.shape[0]]
            if bias is None:
                torch.mm(rest, weight.T, out=chunk_scores)
            else:
                torch.addmm(bias, rest, weight.T, out=chunk_scores)
        yield chunk, chunk_scores.to(x.dtype)
