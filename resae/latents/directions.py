"""Directions of latents: in later layers, on the logits, and against those of other layers.

    transported   d A_{l+1} … A_m      the change of x̂_m when latent's direction d is added to x̂_l
    logits        W_U J (d A_{l+1} … A_{L-1})    per unit of act, less its mean over the vocabulary

J is the final norm, linearised (`resae.models.final_norm`). Between the last selected layer and the
final norm nothing is assumed: the direction goes on as it is (direct path).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resae.models.final_norm import final_norm, mean_jacobian
from resae.models.hooked import HookedLM
from resae.models.unembedding import Unembedding, unembedding_of
from resae.stack.affine import transport_rows
from resae.stack.stack import ReSAE

BLOCK = 4096
"""Latents of another layer that are compared at once."""
MOST_LOGITS = 1 << 23
"""Entries of a block of logits: 32 MB."""
CHECKED_ROWS = 8
"""Rows of text that the final norm is found on and linearised at."""


@torch.no_grad()
def transported(stack: ReSAE, layer: int, directions: Tensor) -> list[Tensor | None]:
    """`directions [S, D]` of one layer at every selected layer: themselves there, transported
    through the maps at later ones, None at earlier ones and where no map leads."""
    if not stack.chained:
        alone: list[Tensor | None] = [None] * stack.n_layers
        alone[layer] = directions
        return alone
    return transport_rows(stack.predictor.A, layer, directions)


class Neighbours(NamedTuple):
    """The most similar latents of another layer, for each of S latents."""

    latents: Tensor
    """`[S, n]` int64."""
    raw: Tensor
    """`[S, n]`, cosines of the directions themselves."""
    transported: Tensor | None
    """`[S, n]`, cosines after the earlier of both is transported to the layer of the later; None:
    no map leads there."""


@torch.no_grad()
def nearest(
    stack: ReSAE, layer: int, latents: Tensor, other: int, n: int, *, by_transported: bool
) -> Neighbours:
    """The n latents of selected layer `other` nearest to `latents [S]` of `layer`, by one of the
    two cosines; in blocks, never `[M, M]`.

    Raises:
        ValueError: by transported cosine where no map leads.
    """
    if by_transported and not stack.chained:
        raise ValueError("nearest: the stack has no maps; compare raw directions")
    own = stack.sae(layer).W_dec.detach().float()[latents]
    theirs = stack.sae(other).W_dec.detach().float()
    later = stack.chained and layer < other
    mine = _at(stack, layer, own, other) if later else own
    n = min(n, len(theirs))
    best: list[Neighbours] = []
    for start in range(0, len(theirs), BLOCK):
        rows = theirs[start : start + BLOCK]
        raw = _cosines(own, rows)
        moved = None
        if stack.chained:
            moved = _cosines(mine, rows if later else _at(stack, other, rows, layer))
        ranked = moved if by_transported and moved is not None else raw
        top = ranked.topk(min(n, len(rows)), dim=1).indices
        best.append(
            Neighbours(
                top + start, raw.gather(1, top), None if moved is None else moved.gather(1, top)
            )
        )
    return _best_of(best, n, by_transported)


def _at(stack: ReSAE, layer: int, directions: Tensor, later: int) -> Tensor:
    """Directions of one layer transported to a later one, in a stack with maps."""
    found = transported(stack, layer, directions)[later]
    assert found is not None  # every map has the layer before among its sources
    return found


def _best_of(blocks: Sequence[Neighbours], n: int, by_transported: bool) -> Neighbours:
    latents = torch.cat([block.latents for block in blocks], 1)
    raw = torch.cat([block.raw for block in blocks], 1)
    of_maps = [block.transported for block in blocks if block.transported is not None]
    moved = torch.cat(of_maps, 1) if of_maps else None
    ranked = moved if by_transported and moved is not None else raw
    top = ranked.topk(n, dim=1).indices
    return Neighbours(
        latents.gather(1, top), raw.gather(1, top), None if moved is None else moved.gather(1, top)
    )


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    return _unit(one) @ _unit(other).T


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


class LogitEffects(NamedTuple):
    """Tokens whose logits S directions raise and lower most, n of each."""

    top_tokens: Tensor
    """`[S, n]` int64, the most raised first."""
    top: Tensor
    """`[S, n]`, logits per unit of act, less the mean over the vocabulary."""
    bottom_tokens: Tensor
    """`[S, n]` int64, the most lowered first."""
    bottom: Tensor
    """`[S, n]`"""


@dataclass(frozen=True)
class Readout:
    """From directions after the last block to logits: final norm, linearised, and unembedding."""

    unembedding: Unembedding
    jacobian: Tensor
    """`[D_out, D]`, mean Jacobian of the final norm."""

    @classmethod
    def of(cls, lm: HookedLM, input_ids: Tensor) -> "Readout | None":
        """The readout of a model, linearised at the first tokens of `input_ids [R, T]`; None: its
        head or final norm has no known form."""
        ids = input_ids[:CHECKED_ROWS].to(lm.device, torch.int64)
        unembedding = unembedding_of(lm, ids)
        norm = None if unembedding.path is None else final_norm(unembedding, ids)
        return None if norm is None else cls(unembedding, mean_jacobian(norm, lm, ids))

    @torch.no_grad()
    def effects(self, directions: Tensor, n: int) -> LogitEffects:
        """Effects of `directions [S, D]` on the logits; blocked over both."""
        V = self.unembedding.vocabulary
        n = min(n, V)
        width = max(n, min(V, MOST_LOGITS // 256))
        parts = [self._effects(rows, n, width) for rows in directions.split(256)]
        return LogitEffects(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))

    def _effects(self, directions: Tensor, n: int, width: int) -> LogitEffects:
        moved = directions.to(self.jacobian) @ self.jacobian.T
        head = self.unembedding.lm.model.get_submodule(self.unembedding.path or "")
        moved = moved.to(next(head.parameters()))
        rest = torch.zeros_like(moved[:1])
        total = torch.zeros(len(moved), dtype=torch.float64, device=moved.device)
        ends: list[tuple[Tensor, Tensor]] = []
        for start in range(0, self.unembedding.vocabulary, width):
            stop = min(start + width, self.unembedding.vocabulary)
            logits = self.unembedding.logits(moved, start, stop)
            logits = logits - self.unembedding.logits(rest, start, stop)  # the head's bias
            total += logits.double().sum(1)
            for sign in (1, -1):
                values, tokens = (sign * logits).topk(min(n, stop - start), dim=1)
                ends.append((values, tokens + start))
        mean = (total / self.unembedding.vocabulary).float().unsqueeze(1)
        found: list[Tensor] = []
        for which, sign in ((0, 1), (1, -1)):
            values = torch.cat([pair[0] for pair in ends[which::2]], 1)
            tokens = torch.cat([pair[1] for pair in ends[which::2]], 1)
            values, order = values.topk(n, dim=1)
            found += [tokens.gather(1, order), sign * values - mean]
        return LogitEffects(*found)
