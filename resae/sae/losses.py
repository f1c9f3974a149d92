"""Loss terms of one autoencoder besides its reconstruction error, and sums of batches in pieces."""

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from resae_kernels import sparse_decode, topk_encode


class TopKWeights(Protocol):
    """An autoencoder with one encoder and one dictionary."""

    encoder: nn.Linear

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def b_dec(self) -> Tensor: ...


Reduce = Callable[[Tensor], Tensor]
"""Reduction of a sum over a piece of a batch to the sum over the whole batch."""


def no_reduce(sum_of_piece: Tensor) -> Tensor:
    """The `Reduce` of a batch that is one piece."""
    return sum_of_piece


def auxk_loss(
    sae: TopKWeights,
    x: Tensor,
    error: Tensor,
    dead: Tensor,
    k_aux: int,
    *,
    prediction: Tensor | None = None,
    reduce: Reduce = no_reduce,
) -> Tensor:
    """AuxK loss: error of the k_aux strongest dead latents at reconstructing the error of the live
    ones; 0 if none is dead.

    `Σ‖e − ê‖² / Σ‖e‖²` with `e` the detached error and `ê` the decode of the dead latents' code, no
    bias. The code is the TopK of the dead latents alone, so the gradient reaches the encoder.
    Gao et al. 2024 (arXiv 2406.04093), appendix A.2, with the error's own energy as denominator.

    Args:
        x: `[N, D]`. error: `[N, D]`, x − x̂. dead: `[M]` bool. prediction: as in `encode`.
        reduce: of the normaliser `Σ‖e‖²`; the losses of the pieces add up to that of the batch.

    Note:
        The gradients of `encoder.weight` and `W_dec` are sparse: added to those of the main loss
        they are dense, alone they stay sparse.
    """
    rows = dead.nonzero().squeeze(1)
    if not rows.numel():
        return x.new_zeros(())
    error = error.detach()
    # Sparse gradients are added to those of the main loss, dense ones would be `[M, D]` of zeros.
    weight, W_dec = (F.embedding(rows, W, sparse=True) for W in (sae.encoder.weight, sae.W_dec))
    bias = sae.encoder.bias[rows]
    if rows.numel() <= k_aux:  # all of them are in the code: no selection, dense products
        residual = x - sae.b_dec if prediction is None else x - prediction - sae.b_dec
        rebuilt = F.relu(F.linear(residual, weight, bias)) @ W_dec
    else:
        code = topk_encode(
            x, weight, bias, k_aux, pre_bias=sae.b_dec, prediction=prediction, sorted=False
        )
        rebuilt = sparse_decode(*code, W_dec)
    error_left = F.mse_loss(rebuilt.to(error.dtype), error, reduction="sum")
    return error_left / reduce(error.square().sum()).clamp_min(1e-12)
