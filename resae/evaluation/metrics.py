"""Metrics: pure functions of tensors, and streaming sums in float64.

fvu                Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean over the whole set, per dimension
explained variance 1 − fvu
delta_ce           CE(replaced) − CE(original), nats per token
ce_recovered_a     (CE(ablated) − CE(replaced)) / (CE(ablated) − CE(original)), a names the ablation
kl                 KL(original ‖ replaced), nats per token
l0                 mean count of acts > 0 per token
redundancy         per latent, the largest cosine with a latent of another layer
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class VarianceUnexplained:
    """Streaming FVU; shift and scale of `(x, x̂)` together do not change it."""

    def __init__(self) -> None:
        self.count = 0
        self.error = 0.0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None
        self._origin: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add N tokens, both `[N, D]`."""
        x = x.detach().double()
        self.error += float((x - x_hat.detach().double()).square().sum())
        if self._sum is None or self._squares is None or self._origin is None:
            # Sums are taken around the first tokens' mean: a large offset would eat the digits.
            self._origin = x.mean(0)
            self._sum, self._squares = (
                torch.zeros_like(self._origin),
                torch.zeros_like(self._origin),
            )
        centred = x - self._origin
        self._sum += centred.sum(0)
        self._squares += centred.square().sum(0)
        self.count += len(x)

    def fvu(self) -> float:
        """Raises ValueError if nothing was added, or if x never varied."""
        if self._sum is None or self._squares is None:
            raise ValueError("fvu: no tokens were added; the evaluation set is empty")
        variance = float((self._squares - self._sum.square() / self.count).sum())
        if variance <= 0:
            raise ValueError(f"fvu: x does not vary over the {self.count} tokens")
        return self.error / variance


def cross_entropy(logits: Tensor, input_ids: Tensor) -> Tensor:
    """`[B, T−1]` nats: −log p(token t+1 | tokens ≤ t), of `logits [B, T, V]`."""
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(input_ids.shape[0], -1)


def kl_divergence(original: Tensor, replaced: Tensor) -> Tensor:
    """`[B, T−1]` nats: KL(original ‖ replaced) of the next-token distributions."""
    p = original[:, :-1].float().log_softmax(-1)
    q = replaced[:, :-1].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kept_directions(before: Tensor, after: Tensor, cosine: float = 0.9) -> float:
    """Share of the latents of two dictionaries `[M, D]` whose directions have a cosine above this
    one: how far a dictionary stayed what it was."""
    cosines = F.cosine_similarity(before.float(), after.float(), dim=1)
    return float((cosines > cosine).double().mean())


def recovered(ablated: float, replaced: float, original: float) -> float:
    """Share of the cross-entropy that an ablation loses and the replacement keeps."""
    if ablated == original:
        raise ValueError("ce_recovered: the ablation does not change the cross-entropy")
    return (ablated - replaced) / (ablated - original)


@dataclass(frozen=True)
class Redundancy:
    """Redundancy between the dictionaries of different layers."""

    mean_max_cos: float
    share_over_0_5: float
    share_over_0_7: float
    share_over_0_9: float
    random_floor: float
    """`mean_max_cos` of random directions in the same numbers."""


HISTOGRAM_EDGES = [round(-0.2 + 0.02 * i, 2) for i in range(61)]
"""Bin edges for `max_cosines`: −0.2 to 1 in steps of 0.02."""


def max_cosines(dictionaries: Sequence[Tensor]) -> Tensor:
    """`[Σ M_l]`: for each latent of each `[M_l, D]`, its largest (signed) cosine with a latent of
    another layer. Latents of zero norm are left out."""
    if len(dictionaries) < 2:
        raise ValueError(f"redundancy: got {len(dictionaries)} dictionaries, expected at least 2")
    unit = []
    for dictionary in dictionaries:
        rows = dictionary.detach().float()
        norm = rows.norm(dim=1, keepdim=True)
        unit.append((rows / norm.clamp_min(1e-30))[norm.squeeze(1) > 0])
    largest = []
    for layer, directions in enumerate(unit):
        others = torch.cat([V for other, V in enumerate(unit) if other != layer])
        largest += [(rows @ others.T).amax(1) for rows in directions.split(4096)]
    return torch.cat(largest)


def cosine_histogram(dictionaries: Sequence[Tensor]) -> list[int]:
    """Counts of `max_cosines` between `HISTOGRAM_EDGES`."""
    edges = torch.tensor(HISTOGRAM_EDGES)
    inside = max_cosines(dictionaries).cpu().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return torch.histogram(inside, edges).hist.long().tolist()


def redundancy(dictionaries: Sequence[Tensor], seed: int = 0) -> Redundancy:
    """Summary of `max_cosines`, with the floor of random directions."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(W.shape, generator=generator) for W in dictionaries]
    cosines = max_cosines(dictionaries)

    def share(bound: float) -> float:
        return float((cosines > bound).double().mean())

    return Redundancy(
        mean_max_cos=float(cosines.double().mean()),
        share_over_0_5=share(0.5),
        share_over_0_7=share(0.7),
        share_over_0_9=share(0.9),
        random_floor=float(max_cosines(random).double().mean()),
    )
