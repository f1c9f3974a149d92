"""Norms whose denominators are constants to gradients.

A layer norm or RMS norm is nearly blind to the length of its input, so that by its true gradient
the parts of a stream explain next to nothing of what is read from it. With the denominator held
fixed it is an affine function, and contributions add up (as in circuit-tracer).
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def frozen_norms(model: nn.Module) -> Generator[None]:
    """While inside, gradients through every norm of the model, a module whose class is named
    …Norm, take its denominator for a constant. Outputs stay what they are."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                stack.callback(module.register_forward_hook(_frozen).remove)
        yield


def _frozen(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not args:
        return None
    x: Tensor = args[0]
    with torch.no_grad():
        bias = norm.forward(torch.zeros_like(x[..., :1, :]))
        shifted = norm.forward(x + x.square().mean(-1, keepdim=True).sqrt())
        difference, size = (shifted - output).norm(), (output - bias).norm()
    centred = x
    if difference <= 0.1 * size:  # a layer norm, which does not see the mean
        centred = x - x.mean(-1, keepdim=True)
    slope = torch.where(centred == 0, 0, (output - bias) / centred).detach()
    return output.detach() + (centred - centred.detach()) * slope
