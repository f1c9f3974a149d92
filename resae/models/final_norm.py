"""The norm between the last block and the head, linearised.

    y = norm(x),  J = mean over reference tokens x of ∂norm/∂x      a direction d adds about J d

Families name their final norm differently, and some have a projection beside it: it is found by
running the model, as the module that reads the stream after the last block and returns what the
head reads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from resae.models.hooked import HookedLM
from resae.models.unembedding import Unembedding

REFERENCE_TOKENS = 64
JACOBIAN_ROWS = 64
"""Rows of the Jacobian that are computed at once: it takes as many times the memory of a pass of
the reference tokens through the norm."""


@torch.no_grad()
def final_norm(unembedding: Unembedding, input_ids: Tensor) -> nn.Module | None:
    """The module between last block and head, found on `input_ids [B, T]`; None: there is no such
    single module."""
    lm = unembedding.lm
    last = lm.hook_points([lm.n_layers - 1])
    stream = lm.capture(input_ids, last)[last[0]]
    final = unembedding.final(input_ids)
    if final.shape == stream.shape and torch.equal(final, stream):
        return nn.Identity()
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and _equal(inputs[0], stream) and _equal(output, final):
            found.append(module)

    blocks = lm.family.blocks
    outside = [
        module
        for name, module in lm.model.named_modules()
        if blocks not in name and not any(child is lm.blocks for child in module.modules())
    ]
    handles = [module.register_forward_hook(look) for module in outside]
    try:
        unembedding.final(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _equal(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == expected.shape and value.equal(expected)


def mean_jacobian(norm: nn.Module, lm: HookedLM, input_ids: Tensor) -> Tensor:
    """`[D_out, D]` float32: mean Jacobian of a final norm at the first tokens of `input_ids
    [B, T]` that are not special."""
    last = lm.hook_points([lm.n_layers - 1])
    stream = lm.capture(input_ids, last)[last[0]]
    x = stream[~lm.is_special(input_ids.to(lm.device)).to(stream.device)][:REFERENCE_TOKENS]

    def mean_output(direction: Tensor) -> Tensor:
        return norm(x + direction).float().mean(0)

    jacobian = torch.func.jacrev(mean_output, chunk_size=JACOBIAN_ROWS)
    return jacobian(torch.zeros_like(x[0])).detach().float()
