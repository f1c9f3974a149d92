"""Metrics: pure functions of tensors, and streaming sums in float64.

fvu                Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean over the whole set, per dimension
explained variance 1 − fvu
legacy             mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²
bias               Σ‖x̂‖² / Σ⟨x, x̂⟩: below 1 if x̂ is too short
delta_ce           CE(replaced) − CE(original), nats per token
ce_recovered_a     (CE(ablated) − CE(replaced)) / (CE(ablated) − CE(original)), a names the ablation
kl                 KL(original ‖ replaced), nats per token
l0                 mean count of acts > 0 per token

Columns of reconstruction rows are made in `resae.evaluation.reconstruction`, cosines of
dictionaries in `resae.evaluation.redundancy`.
"""

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
