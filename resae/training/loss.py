"""The loss of all selected layers on one batch of activations:

    loss = Σ_l  ‖r_l − r̂_l‖² / ‖r_l − mean‖²  +  auxk_coefficient · auxk_l

with r_l the residual of x_l after the affine maps, every layer divided by its RMS.

Every denominator is a sum over the tokens of the whole batch, a *normaliser*. A batch may be
computed in pieces, on several ranks or one after the other (gradient accumulation): each normaliser
has a name, and the caller's `NormaliserReduce` gives the reduction from the sum over a piece to the
sum over the batch. The losses of all pieces then add up to the loss of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resae.sae.losses import Reduce, no_reduce
from resae.stack.stack import ReSAE
from resae.training.config import TrainConfig

Number = TypeVar("Number", float, Tensor)

NormaliserReduce = Callable[[str], Reduce]
"""Name of a normaliser → the reduction of its sum over a piece to the sum over the batch."""


def within_piece(_normaliser: str) -> Reduce:
    """The `NormaliserReduce` of a batch that is one piece."""
    return no_reduce


class LayerMetrics(NamedTuple, Generic[Number]):
    """Metrics of one layer and one batch, on the residual target: numbers, or scalars still on the
    device."""

    fvu: Number
    """Share of the batch's variance; over pieces of a batch it adds up."""
    l0: Number
    """Active latents per token: a mean over tokens."""
    dead_fraction: Number
    """Share of the latents that are dead before the batch."""
    auxk: Number
    """AuxK loss, without its coefficient; over pieces of a batch it adds up."""


class StackLoss(NamedTuple):
    """Loss of one batch over all layers, and its metrics; scalars are still on the device."""

    loss: Tensor
    metrics: list[LayerMetrics[Tensor]]
    """Per layer, detached."""
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
    normaliser: NormaliserReduce = within_piece,
) -> StackLoss:
    """The loss of L activations `[N, D]`, already divided by their RMS.

    Args:
        dead: per SAE of `stack.saes`, latents that AuxK shall revive, `[M]` bool.
        normaliser: called with the name of each normaliser: `variance.{layer}`, and, where latents
            are dead, `auxk.{layer}`. No sum depends on the result of an earlier reduction.
    """
    loss = xs[0].new_zeros(())
    x_hats: list[Tensor] = []
    metrics: list[LayerMetrics[Tensor]] = []
    fired: list[list[Tensor]] = [[] for _ in stack.saes]
    all_acts: list[list[Tensor]] = [[] for _ in stack.saes]
    for layer, x in enumerate(xs):
        sae = stack.sae(layer)
        prediction = stack.predictor(layer, x_hats if config.loop == "closed" else xs)
        its_dead = dead[stack.sae_index(layer)]
        (*partial, x_hat), code = sae.reconstructions(x, prediction=prediction)
        x_hats.append(x_hat.detach())
        target = x if prediction is None else x - prediction
        variance = centred_energy(target, normaliser(f"variance.{layer}")).to(x.dtype)
        fvu = F.mse_loss(x_hat, x, reduction="sum") / variance
        errors = [F.mse_loss(y, x, reduction="sum") / variance for y in partial]
        error = sum(errors, fvu) / (1 + len(errors))
        auxk = loss.new_zeros(())
        if not sae.is_frozen:
            auxk = sae.dead_latent_loss(
                x,
                x - x_hats[-1],
                its_dead,
                prediction=prediction,
                reduce=normaliser(f"auxk.{layer}"),
            )
        loss = loss + error + config.auxk_coefficient * auxk
        acts, indices = sae.trainable_code(code)
        active = acts > 0
        fired[stack.sae_index(layer)].append(indices[active])
        all_acts[stack.sae_index(layer)].append(acts.detach())
        metrics.append(
            LayerMetrics(
                fvu=fvu.detach(),
                l0=active.sum(-1).double().mean(),
                dead_fraction=its_dead.double().mean(),
                auxk=auxk.detach(),
            )
        )
    joined = ([torch.cat(of_layers) for of_layers in of_saes] for of_saes in (fired, all_acts))
    return StackLoss(loss, metrics, *joined)


def centred_energy(x: Tensor, reduce: Reduce = no_reduce) -> Tensor:
    """Σ‖x − mean‖² over the batch that `x [N, D]` is a piece of; of pieces from sums in float64."""
    x = x.detach()
    if reduce is no_reduce:
        return (x - x.mean(0)).square().sum()
    energy = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    tokens = energy.new_tensor(float(len(x)))
    sums = reduce(torch.cat([x.sum(0, dtype=torch.float64), torch.stack([energy, tokens])]))
    return sums[-2] - sums[:-2].square().sum() / sums[-1]
