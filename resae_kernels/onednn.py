"""`x @ weight.T + bias` in float32 on a CPU, by oneDNN.

Torch has MKL multiply in float32, which leaves half of what an AMD processor can do. oneDNN, which
torch carries for its 16-bit products, takes 0.4 to 0.5 of that time there from some 64 rows on (one
core; other makes were not measured). torch reaches it through an op that it keeps for its compiler
and that has no gradient.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEAST_SCORES = 16_384
"""Entries of the result below which a call's fixed cost of some 10 µs outweighs the gain."""
MOST_DEPTH = 384
"""Width up to which rounding errors are those of MKL, which adds up pieces of so many terms; beyond
it oneDNN's errors grow to twice as large (at a width of 2048)."""


def pays(rows: int, weight: Tensor) -> bool:
    """Is `linear` at hand for so many rows and `weight [M, D]`, and worth it?"""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and rows * weight.shape[0] >= LEAST_SCORES
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., M]` of `x [..., D]`, `weight [M, D]`, `bias [M]`: float32, on a CPU, no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(TorchFunctionMode):
    """While in force, without gradients, every `nn.Linear` that it pays for runs by oneDNN. Results
    differ in rounding: for reading a model's activations, not for what must be the model's bits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            if x.dtype == weight.dtype and pays(x.numel() // x.shape[-1], weight):
                return linear(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))
