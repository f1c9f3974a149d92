"""TopK encode in torch: a chunk of scores at a time, so that they stay in cache between the GEMM
and the selection; few tokens by one call of the compiled library."""

import torch
from torch import Tensor

from resae_kernels.cpu import native, onednn
from resae_kernels.cpu.private_torch import has_16bit_gemm
from resae_kernels.cpu.selection import select
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
    N, M = x.shape[0], weight.shape[0]
    if native.takes(x, weight, bias, pre_bias, prediction) and native.EXACT_ROWS[x.dtype] >= N:
        return native.exact_encode(x, weight, bias, k, pre_bias, prediction, sorted)
    # 16-bit weights are multiplied as they are where the processor can: sums are float32 there too.
    narrow = x.device.type == "cpu" and has_16bit_gemm(x.dtype)
    dtype = x.dtype if narrow else accumulation_dtype(x.dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    rows = max(1, min(N, workspace_bytes // (M * dtype.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
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
        acts[chunk], indices[chunk] = select(chunk_scores.to(x.dtype), k, sorted)
    return acts, indices
