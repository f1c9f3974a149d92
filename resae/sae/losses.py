"""Loss terms of one autoencoder beside its reconstruction error, and sums of batches in pieces."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from resae_kernels import sparse_decode, topk_encode


class TopKWeights(Protocol):
    """An autoencoder with one encoder and one dictionary."""

    encoder: nn.Linear

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def b_dec(self) -> Tensor: ...


Total = Callable[[Tensor], Tensor]
"""Makes of a sum over a piece of a batch the sum over the whole batch."""


def in_one_piece(sum_of_piece: Tensor) -> Tensor:
    """The `Total` of a batch that is one piece."""
    return sum_of_piece


def auxk_loss(
    sae: TopKWeights,
    x: Tensor,
    error: Tensor,
    dead: Tensor,
    k_aux: int,
    *,
    base: Tensor | None = None,
    total: Total = in_one_piece,
) -> Tensor:
    """How badly the k_aux strongest dead latents explain what the live ones leave; 0 if none is
    dead.

    `Σ‖e − ê‖² / Σ‖e‖²` with `e` the detached error and `ê` the decode of the dead latents' code, no
    bias. The code is an ordinary `topk_encode` on the dead rows, so the gradient reaches the
    encoder. Gao et al. 2024 (arXiv 2406.04093), appendix A.2, with the error's own energy as
    denominator.

    Args:
        x: `[N, D]`. error: `[N, D]`, x − x̂. dead: `[M]` bool. base: as in `encode`.
        total: of a batch in pieces; the losses of the pieces add up to that of the batch.
    """
    rows = dead.nonzero().squeeze(1)
    if not rows.numel():
        return x.new_zeros(())
    error = error.detach()
    code = topk_encode(
        x,
        sae.encoder.weight[rows],
        sae.encoder.bias[rows],
        min(k_aux, rows.numel()),
        pre_bias=sae.b_dec,
        base=base,
        sorted=False,
    )
    rebuilt = sparse_decode(code.acts, code.indices, sae.W_dec[rows])
    return (error - rebuilt).square().sum() / total(error.square().sum()).clamp_min(1e-12)
