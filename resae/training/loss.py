"""The loss of all selected layers on one batch of activations:

    loss = Σ_l  ‖r_l − r̂_l‖² / ‖r_l − mean‖²  +  auxk_coefficient · auxk_l

with r_l what the affine maps leave of x_l, every layer divided by its RMS.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resae.sae.losses import Reduce, no_reduce
from resae.stack.stack import ReSAE
from resae.training.config import TrainConfig


class LayerMetrics(NamedTuple):
    """Metrics of one layer and one batch, on the residual target."""

    fvu: float
    l0: float
    dead_fraction: float
    auxk: float


Measured = tuple[Tensor, Tensor, Tensor, Tensor]


class StackLoss(NamedTuple):
    """Loss of one batch over all layers, and its metrics; scalars are still on the device."""

    loss: Tensor
    measured: list[Measured]
    """Per layer `(fvu, l0, dead fraction, auxk)`, detached."""
    fired: list[Tensor]
    """Per SAE of `stack.saes`: indices of latents that fired (unordered, with repeats)."""
    acts: list[Tensor]
    """Per SAE of `stack.saes`: activations of its trained part, `[N, k]`, detached."""


def stack_loss(
    stack: ReSAE,
    config: TrainConfig,
    xs: Sequence[Tensor],
    dead: Sequence[Tensor],
    *,
    reduce: Reduce = no_reduce,
) -> StackLoss:
    """The loss of L activations `[N, D]`, already divided by their RMS.

    Args:
        dead: for each of `stack.saes` which latents AuxK shall revive, `[M]` bool.
        reduce: makes a sum over these tokens the sum over the batch that they are a piece of; the
            losses of all pieces then add up to the loss of the batch. Whatever a loss divides by
            goes through it, always in the same order, and no argument depends on what an earlier
            call returned.
    """
    loss = xs[0].new_zeros(())
    x_hats: list[Tensor] = []
    measured: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    fired: list[list[Tensor]] = [[] for _ in stack.saes]
    all_acts: list[list[Tensor]] = [[] for _ in stack.saes]
    for layer, x in enumerate(xs):
        sae = stack.sae(layer)
        prediction = stack.predictor(layer, x_hats if config.loop == "closed" else xs)
        its_dead = dead[stack.sae_index(layer)]
        code = sae.encode(x, prediction=prediction)
        *partial, x_hat = sae.reconstructions(code, prediction=prediction)
        x_hats.append(x_hat.detach())
        target = x if prediction is None else x - prediction
        variance = centred_energy(target, reduce).to(x.dtype)
        fvu = F.mse_loss(x_hat, x, reduction="sum") / variance
        errors = [F.mse_loss(y, x, reduction="sum") / variance for y in partial]
        error = sum(errors, fvu) / (1 + len(errors))
        aux = sae.dead_latent_loss(
            x, x - x_hats[-1], its_dead, prediction=prediction, reduce=reduce
        )
        loss = loss + error + config.auxk_coefficient * aux
        acts, indices = sae.trainable_code(code)
        active = acts > 0
        fired[stack.sae_index(layer)].append(indices[active])
        all_acts[stack.sae_index(layer)].append(acts.detach())
        l0 = active.sum(-1).double().mean()
        measured.append((fvu.detach(), l0, its_dead.double().mean(), aux.detach()))
    joined = ([torch.cat(of_layers) for of_layers in of_saes] for of_saes in (fired, all_acts))
    return StackLoss(loss, measured, *joined)


def centred_energy(x: Tensor, reduce: Reduce = no_reduce) -> Tensor:
    """Σ‖x − mean‖² over the batch that `x [N, D]` is a piece of; of pieces from sums in float64."""
    x = x.detach()
    if reduce is no_reduce:
        return (x - x.mean(0)).square().sum()
    energy = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    tokens = energy.new_tensor(float(len(x)))
    sums = reduce(torch.cat([x.sum(0, dtype=torch.float64), torch.stack([energy, tokens])]))
    return sums[-2] - sums[:-2].square().sum() / sums[-1]
