"""Comparison of the latents of a stack before and after further training."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from resae.choices import Loop
from resae.data.activations import capture_tokens
from resae.evaluation.metrics import kept_directions
from resae.evaluation.redundancy import LargestCosines
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE


@dataclass(frozen=True)
class KeptLatents:
    """Change of latents by further training; lists have one entry per layer, pairs are before and
    after."""

    kept_directions: list[float]
    """Share of latents whose decoder row has a cosine above 0.9 with its row before."""
    silent: list[tuple[float, float]]
    """Share of latents that fire on none of the tokens."""
    tokens: int
    """Tokens that `silent` was counted on, without special ones and sinks."""
    redundancy: tuple[float, float] | None
    """Mean largest cosine of a latent with one of another layer; None: of one dictionary."""

    def lines(self) -> list[str]:
        """Sentences with these numbers."""
        kept = ", ".join(f"{share:.1%}" for share in self.kept_directions)
        found = [f"latents whose direction has a cosine above 0.9 with before: {kept}"]
        if self.tokens:
            pairs = ", ".join(f"{before:.1%} → {after:.1%}" for before, after in self.silent)
            found.append(f"latents silent on {self.tokens:,} held-out tokens: {pairs}")
        if self.redundancy is not None:
            before, after = self.redundancy
            found.append(
                f"redundancy (mean largest cosine with a latent of another layer): {before:.3f} → "
                f"{after:.3f}"
            )
        return found


@torch.no_grad()
def kept_latents(
    lm: HookedLM,
    before: ReSAE,
    after: ReSAE,
    batches: Iterable[Tensor],
    loop: Loop | str = "closed",
) -> KeptLatents:
    """Compare two stacks of the same shapes.

    Args:
        batches: token ids `[B, T]`; the plain model's activations on them are encoded.
        loop: as of `ReSAE.encode`.
    """
    stacks, points = (before, after), lm.hook_points(before.hook_points)
    fired = [
        [torch.zeros(before.sae(i).config.d_sae, dtype=torch.bool) for i in range(len(points))]
        for _ in stacks
    ]
    tokens = 0
    for ids in batches:
        xs = capture_tokens(lm, ids, points, sinks=before.sinks)
        tokens += len(xs[0])
        for stack, of_stack in zip(stacks, fired, strict=True):
            for latents, (acts, indices) in zip(of_stack, stack.encode(xs, loop=loop), strict=True):
                latents[indices[acts > 0].cpu()] = True
    shares = [[1 - float(latents.double().mean()) for latents in of_stack] for of_stack in fired]
    dictionaries = [
        [stack.sae(i).W_dec.detach().cpu() for i in range(len(points))] for stack in stacks
    ]
    of_dictionaries = None
    if len(points) > 1 and not before.shared:
        first, second = (
            float(LargestCosines(of_stack).other_layers().double().mean())
            for of_stack in dictionaries
        )
        of_dictionaries = (first, second)
    return KeptLatents(
        kept_directions=[kept_directions(*rows) for rows in zip(*dictionaries, strict=True)],
        silent=list(zip(*shares, strict=True)) if tokens else [],
        tokens=tokens,
        redundancy=of_dictionaries,
    )
