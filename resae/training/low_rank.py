"""Adam whose matrices change by a product of low rank: W = W_0 + U V, U [m, r], V [r, n].

The tensors stay merged: after each step W changes by the change of U V, and the gradients of U and
V are G Vᵀ and Uᵀ G for the gradient G of W. So what is saved is an ordinary stack, and the moments
of r (m + n) numbers are kept in place of m n (LoRA, arXiv 2106.09685). U begins at 0. Rows that are
scaled after a step, such as those of a dictionary, are scaled in W alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LowRankAdam(torch.optim.Adam):
    """Adam; of matrices with more than `rank` rows and columns by factors of this rank.

    Args:
        groups: parameter groups.
        seed: of the first V, random with entries of variance 1/r.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, rank: int, seed: int = 0):
        super().__init__(groups, fused=True)
        generator = torch.Generator().manual_seed(seed)
        for group in self.param_groups:
            for W in group["params"]:
                if W.ndim == 2 and min(W.shape) > rank:
                    m, n = W.shape
                    V = torch.randn(rank, n, generator=generator) * rank**-0.5
                    factors = {"U": W.new_zeros(m, rank), "V": V.to(W)}
                    moments = {
                        f"{name}_{moment}": torch.zeros_like(factor)
                        for name, factor in factors.items()
                        for moment in ("avg", "avg_sq")
                    }
                    self.state[W] = factors | moments | {"count": torch.zeros(())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step. Gradients of matrices are used up."""
        for group in self.param_groups:
            for W in group["params"]:
                state = self.state.get(W, {})
                if "U" in state and W.grad is not None:
                    _change(W, state, group)
                    W.grad = None
        super().step(closure)


def _change(W: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One Adam step of the factors of a matrix, which follows them."""
    state["count"] += 1
    U, V, G = state["U"], state["V"], W.grad
    assert G is not None
    of_U, of_V = (
        _adam(name, gradient, state, group) for name, gradient in (("U", G @ V.T), ("V", U.T @ G))
    )
    V += of_V
    W.addmm_(of_U, V).addmm_(U, of_V)
    U += of_U


def _adam(name: str, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Adam's change of a factor with gradient g."""
    beta, beta_sq = group["betas"]
    average, square = state[f"{name}_avg"], state[f"{name}_avg_sq"]
    average.lerp_(g, 1 - beta)
    square.mul_(beta_sq).addcmul_(g, g, value=1 - beta_sq)
    count = float(state["count"])
    size = (square / (1 - beta_sq**count)).sqrt_().add_(group["eps"])
    return average / size * (-group["lr"] / (1 - beta**count))
