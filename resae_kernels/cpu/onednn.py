"""`x @ weight.T + bias` on a CPU by oneDNN: float32, and 16-bit types where the processor has
instructions for them.

Torch has MKL multiply in float32, which leaves half of what an AMD processor can do. oneDNN, which
torch carries for its 16-bit products, takes 0.4 to 0.5 of that time there from some 64 rows on (one
core; other makes were not measured). torch reaches it through an op that it keeps for its compiler
and that has no gradient.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resae_kernels.cpu.native import packed

LEAST_SCORES = 16_384
"""Entries of the result below which a call's fixed cost of some 10 µs outweighs the gain."""
MOST_DEPTH = 384
"""Width up to which rounding errors are those of MKL, which adds up pieces of so many terms; beyond
it oneDNN's errors grow to twice as large (at a width of 2048)."""


def pays(rows: int, weight: Tensor) -> bool:
    """Whether `linear` can run for this many rows and `weight [M, D]`, and is worth its call. It
    reads a weight row by row: another layout would be copied at every call."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and rows * weight.shape[0] >= LEAST_SCORES
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., M]` of `x [..., D]`, `weight [M, D]`, `bias [M]`: float32, on a CPU, no gradient.

    The op takes addresses: it reads a strided bias as if it were contiguous, past its end.

    Raises:
        TypeError: a dtype other than float32.
    """
    tensors = [None if t is None else packed(t.detach()) for t in (x, weight, bias)]
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(
                f"onednn.linear: got {tensor.dtype}, expected float32; convert it first"
            )
    return torch.ops.mkldnn._linear_pointwise(*tensors, "none", [], "")


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this 16-bit dtype on a CPU by instructions made for it,
    accumulating in float32."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    probe = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return probe is not None and bool(probe())


class OneDNNLinear(TorchFunctionMode):
    """While in force, without gradients, every `nn.Linear` that it pays for runs by oneDNN. Results
    differ in rounding: for reading a model's activations, not for what must be the model's bits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            alike = all(t is None or t.dtype == x.dtype for t in (weight, *bias))
            if alike and pays(x.numel() // x.shape[-1], weight):
                return linear(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))
