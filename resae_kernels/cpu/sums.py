"""The sums of a decode and of its backward: by the compiled library, or in torch by rows gathered
and entries sorted by latent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels import memory
from resae_kernels.cpu import native
from resae_kernels.cpu.private_torch import gathered_dot
from resae_kernels.types import accumulation_dtype

RADIX_ENTRIES = 32_768
"""Number of entries from which on torch, too, sorts integers on a CPU by radix (its `GRAIN_SIZE`).
Measured 2026-11-21 on one core of an AMD EPYC: 8,192 entries of 512 latents 0.33 ms in torch, 0.03
by numpy; 65,536 of 65,537 latents 0.33 and 0.38."""


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ_j acts[n, j] · W[indices[n, j]]`, `[N, D]`, summed in and returned as `dtype`."""
    if indices.numel() == 0:
        return W.new_zeros(acts.shape[0], W.shape[1], dtype=dtype)
    indices, W = indices.contiguous(), W.contiguous()
    if dtype != W.dtype and indices.numel() < W.shape[0]:
        # Fewer codes than latents: widen the rows they name, not the whole dictionary.
        W = F.embedding_bag(indices.view(-1, 1), W, mode="sum")
        indices = torch.arange(indices.numel(), device=W.device).view_as(indices)
    weights = acts.to(dtype).contiguous()
    return F.embedding_bag(indices, W.to(dtype), per_sample_weights=weights, mode="sum")


def sort_stably(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Values and order of `latents.sort(stable=True)`, int32 ≥ 0.

    Torch sorts short lists on a CPU by comparison, ten times slower than numpy's radix sort. That
    is for 16 bits only: two rounds of it, the second only where a latent needs it.
    """
    if latents.is_cuda or latents.numel() >= RADIX_ENTRIES:
        return latents.sort(stable=True)
    keys = latents.numpy()
    order = keys.astype("uint16").argsort(kind="stable")
    high = keys >> 16
    if high.any():
        order = order[high[order].astype("uint16").argsort(kind="stable")]
    order = torch.from_numpy(order)
    return latents[order], order


def scatter_outer(weights: Tensor, tokens: Tensor, bounds: Tensor, rows: Tensor) -> Tensor:
    """`out[m] = Σ weights[e] · rows[tokens[e]]`, `[M, D]`, over the entries `bounds[m] ≤ e <
    bounds[m + 1]`."""
    used = int(bounds[-1])
    return F.embedding_bag(
        tokens[:used],
        rows.contiguous(),
        bounds,
        per_sample_weights=weights[:used],
        mode="sum",
        include_last_offset=True,
    )


def scatter_sum(acts: Tensor, indices: Tensor, M: int) -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j]`, `[M]`, in the order of the codes."""
    widened = acts.to(accumulation_dtype(acts.dtype))
    if native.takes(widened):
        return native.scatter_sum(widened, indices, M).to(acts.dtype)
    total = widened.new_zeros(M).index_add(0, indices.reshape(-1), widened.reshape(-1))
    return total.to(acts.dtype)


def sddmm(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """`out[n, j] = ⟨grad[n], W[indices[n, j]]⟩`, `[N, k]`."""
    if native.takes(grad, W):
        return native.sddmm(grad, indices, W)
    (N, k), (M, D) = indices.shape, W.shape
    acc_dtype = accumulation_dtype(W.dtype)
    if W.device.type == "cpu" and indices.numel() >= (1 if W.dtype == acc_dtype else M):
        # In 16 bit the dictionary is widened once, not row by row as often as codes name it.
        tokens = torch.arange(N).repeat_interleave(k)
        out = gathered_dot(grad.to(acc_dtype), tokens, W.to(acc_dtype), indices.reshape(-1))
        return out.view(N, k).to(grad.dtype)
    out = grad.new_empty(N, k)
    for chunk in memory.row_chunks(N, k * D * acc_dtype.itemsize, memory.GATHER_BYTES):
        gathered = W[indices[chunk]].to(acc_dtype)
        out[chunk] = (gathered @ grad[chunk].to(acc_dtype).unsqueeze(-1)).squeeze(-1).to(out.dtype)
    return out
