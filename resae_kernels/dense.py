"""Dense algorithm of a decode and of its backward: a GEMM over the code scattered into `[n, M]`.

Faster than gathering where k is a large share of M. Both implementations use it: they differ in how
a code is scattered and in the dtype of the factors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from resae_kernels import memory
from resae_kernels.precision import gemm
from resae_kernels.triton import decode as triton_decode
from resae_kernels.types import accumulation_dtype

DENSE_RATIO = {"cpu": (3, 3), "cuda": (24, 144)}
"""M/k up to which the dense algorithm is taken, by device type, for 32-bit and for 16-bit dtypes.

CUDA: NOT measured, from a cost model of one large GPU: rows gathered at 5.5 TB/s from its L2 cache
take 144·k/M of the time of a bf16 GEMM at 790 TFLOP/s, 24·k/M of an fp32 one at 67.
CPU: measured 2026-11-21 on one core of an AMD EPYC, fp32, N = 256 and 2048, D = 512 and 768,
M = 2048, gather and dense in turns, fastest of several: sum and both gradients together take 1.7 to
1.9 times as long gathered at M/k = 2, 1.06 to 1.24 times at 3, 0.79 to 0.92 times at 4. Each alone
is even at about 2 (the sum), 2.5 to 3.5 (the gradient of W_dec) and 5 to 6 (of the acts). That was
before the compiled library took all three, and is what float64 and machines without it have."""

DENSE_TOKENS = 256
"""Tokens from which on the dense algorithm is taken: with fewer, a GEMM is bound by reading all M
rows of W_dec (the same cost model; a CPU was measured from here on)."""


def is_dense(algorithm: str, indices: Tensor, M: int, dtype: torch.dtype) -> bool:
    """True if the algorithm is dense: as requested, or (empty) by the rule."""
    if algorithm:
        return algorithm == "dense"
    wide, narrow = DENSE_RATIO.get(indices.device.type, DENSE_RATIO["cuda"])
    N, k = indices.shape
    return N >= DENSE_TOKENS and (narrow if dtype.itemsize == 2 else wide) * k >= M


def _factor_dtype(tensor: Tensor, implementation: str) -> torch.dtype:
    """Dtype of the factors of a GEMM whose sums are in the accumulation dtype."""
    narrow = implementation == "triton" and tensor.is_cuda
    return tensor.dtype if narrow else accumulation_dtype(tensor.dtype)


def _scattered(
    acts: Tensor, indices: Tensor, M: int, implementation: str
) -> Iterator[tuple[slice, Tensor]]:
    """The code as `[n, M]`, chunk of rows by chunk, all in the same memory. Acts that name the same
    latent are added up in the accumulation dtype, in a fixed order."""
    dtype = _factor_dtype(acts, implementation)
    bound = memory.workspace_bytes(acts)
    chunks = list(memory.row_chunks(acts.shape[0], M * dtype.itemsize, bound))
    scattered = acts.new_empty(chunks[0].stop if chunks else 0, M, dtype=dtype)
    for chunk in chunks:
        a, i = acts[chunk], indices[chunk]
        code = scattered[: a.shape[0]].zero_()
        if implementation == "triton":
            triton_decode.launch_scatter(code, a, i)
        elif acts.is_cuda:
            # Slot by slot: no two threads add to one entry.
            for slot in range(a.shape[1]):
                code.scatter_add_(1, i[:, slot : slot + 1], a[:, slot : slot + 1].to(dtype))
        else:
            code.scatter_add_(1, i, a.to(dtype))
        yield chunk, code


def dense_sum(
    acts: Tensor, indices: Tensor, W: Tensor, prediction: Tensor | None, implementation: str
) -> Tensor:
    """`[N, D]` in the accumulation dtype, prediction added: new memory."""
    acc_dtype, N, (M, D) = accumulation_dtype(W.dtype), acts.shape[0], W.shape
    if prediction is None:
        total = W.new_zeros(N, D, dtype=acc_dtype)
    else:
        total = prediction.to(acc_dtype, copy=True)
    W = W.to(_factor_dtype(W, implementation))
    for chunk, code in _scattered(acts, indices, M, implementation):
        gemm(code, W, total[chunk])
    return total


def dense_outer(acts: Tensor, indices: Tensor, rows: Tensor, M: int, implementation: str) -> Tensor:
    total = rows.new_zeros(M, rows.shape[1], dtype=accumulation_dtype(rows.dtype))
    for chunk, code in _scattered(acts, indices, M, implementation):
        gemm(code.T, rows[chunk].to(code.dtype), total)
    return total.to(rows.dtype)


def dense_sddmm(grad: Tensor, indices: Tensor, W: Tensor, implementation: str) -> Tensor:
    out = grad.new_empty(indices.shape)
    acc_dtype, dtype = accumulation_dtype(W.dtype), _factor_dtype(W, implementation)
    W_t = W.to(dtype).T
    bound = memory.workspace_bytes(W)
    for chunk in memory.row_chunks(grad.shape[0], W.shape[0] * acc_dtype.itemsize, bound):
        # Products with all latents, `[n, M]`, then those that the code names.
        out[chunk] = gemm(grad[chunk].to(dtype), W_t).gather(1, indices[chunk]).to(out.dtype)
    return out
