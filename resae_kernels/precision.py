"""Sums in the accumulation dtype (float32 for 16-bit tensors), rounded once."""

import torch
from torch import Tensor

from resae_kernels.types import accumulation_dtype


def residual(x: Tensor, pre_bias: Tensor | None, prediction: Tensor | None) -> Tensor:
    """`x − prediction − pre_bias`, formed in the accumulation dtype and rounded once to x's."""
    rest = x.to(accumulation_dtype(x.dtype))
    for offset in (prediction, pre_bias):
        if offset is not None:
            rest = rest - offset
    return rest.to(x.dtype)


def gemm(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """GEMM `a @ b`, or `total += a @ b`, in the accumulation dtype, also under autocast: GEMMs with
    an `out` are not cast."""
    acc_dtype = accumulation_dtype(a.dtype)
    if a.dtype != acc_dtype and a.is_cuda:
        # Tensor cores multiply 16-bit factors and sum in fp32.
        summed = torch.mm(a, b, out_dtype=acc_dtype)
        return summed if total is None else total.add_(summed)
    if total is None:
        total = a.new_empty(a.shape[0], b.shape[1], dtype=acc_dtype)
        return torch.mm(cast(a, acc_dtype), cast(b, acc_dtype), out=total)
    return total.addmm_(cast(a, acc_dtype), cast(b, acc_dtype))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes as long as an addition where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
