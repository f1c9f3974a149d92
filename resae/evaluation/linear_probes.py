"""Logistic regression with an L2 penalty, the probe of the sparse-probing protocol.

    minimise Σ_i log(1 + exp(−y_i (x_i·w + b))) + ‖w‖² / (2 C),   y = ±1

The minimum is unique, so that scikit-learn's `LogisticRegression(C=C)` finds the same one up to
its stopping rule (`tests/peers`): twenty lines around torch's LBFGS are as good, and need no
further library. The columns are centred and scaled by the diagonal of the Hessian, which changes
the path to the minimum and not the minimum; float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ITERATIONS = 1000
TOLERANCE = 1e-7
"""Largest entry of the gradient, per document, at which the fit ends."""


class Probe(NamedTuple):
    """A linear classifier: positive where `x @ weight + bias > 0`."""

    weight: Tensor
    """`[p]` float64."""
    bias: Tensor
    """Scalar."""

    def logits(self, x: Tensor) -> Tensor:
        """`[n]` of `x [n, p]`."""
        return x @ self.weight + self.bias


def fit_probe(x: Tensor, positive: Tensor, *, C: float = 1.0) -> Probe:
    """Fit a probe.

    Args:
        x: `[n, p]` float64.
        positive: `[n]` bool.
        C: inverse strength of the penalty; the bias is not penalised.
    """
    mean = x.mean(0)
    centred = x - mean
    scale = (centred.square().sum(0) / 4 + 1 / C).rsqrt()
    scaled = centred * scale
    sign = positive.double() * 2 - 1
    u = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=TOLERANCE * len(x),
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight = u[:-1] * scale
        value = F.softplus(-sign * (scaled @ u[:-1] + u[-1])).sum()
        value = value + weight.square().sum() / (2 * C)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    weight = u.detach()[:-1] * scale
    return Probe(weight, u.detach()[-1] - mean @ weight)
