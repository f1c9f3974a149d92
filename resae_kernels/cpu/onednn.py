"""`x @ weight.T + bias` on a CPU by oneDNN, in float32.

Torch's float32 GEMM is MKL's, which reaches half of the speed of an AMD processor. oneDNN, which
torch includes for its 16-bit GEMMs, takes 0.4 to 0.5 of that time there from some 64 rows on (one
core; other makes were not measured). It is called through an op that torch keeps for its compiler
and that has no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resae_kernels.cpu import private_torch
from resae_kernels.cpu.native import packed

LEAST_SCORES = 16_384
"""Entries of the result below which a call's fixed cost of some 10 µs outweighs the gain."""
MOST_DEPTH = 384
"""Width up to which rounding errors are those of MKL, which adds up pieces of so many terms; beyond
it oneDNN's errors grow to twice as large (at a width of 2048)."""


def pays(rows: int, weight: Tensor) -> bool:
    """True if `linear` can run for this many rows and `weight [M, D]`, and is faster than torch.
    It reads a weight row by row: another layout would be copied at every call."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and rows * weight.shape[0] >= LEAST_SCORES
        and private_torch.has_onednn_linear()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., M]` of `x [..., D]`, `weight [M, D]`, `bias [M]`: float32, on a CPU, no gradient.

    Raises:
        TypeError: a dtype other than float32.
    """
    x, weight = packed(x.detach()), packed(weight.detach())
    bias = None if bias is None else packed(bias.detach())
    for tensor in (x, weight, bias):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(
                f"onednn.linear: got {tensor.dtype}, expected float32; convert it first"
            )
    return private_torch.onednn_linear(x, weight, bias)


class OneDNNLinear(TorchFunctionMode):
    """Context in which every `nn.Linear` for which it `pays` runs by oneDNN, without gradients.

    Results differ in rounding: for reading a model's activations, not where its exact bits count.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            alike = all(t is None or t.dtype == x.dtype for t in (weight, *bias))
            if alike and pays(x.numel() // x.shape[-1], weight):
                return linear(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))
