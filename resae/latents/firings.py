"""The firings of one layer's latents in a block of rows, sorted for look-ups.

A firing is a latent that is active at a token. A block holds B rows of T tokens; firings are sorted
by `key = latent · B·T + token`, so that those of one latent in one row lie together, and a latent's
act at any token is one binary search away: nothing as large as `[tokens, M]` is made.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resae_kernels import SparseCode


class Peaks(NamedTuple):
    """The strongest firing of each latent in each row in which it fires; P of them."""

    latents: Tensor
    """`[P]` int64, ascending."""
    values: Tensor
    """`[P]` float32, acts."""
    tokens: Tensor
    """`[P]` int64, number of the token within the block."""


@dataclass(frozen=True)
class Firings:
    """Firings of a block of rows of T tokens, sorted by latent and then by token."""

    keys: Tensor
    """`[F]` int64, ascending."""
    values: Tensor
    """`[F]` float32, acts > 0."""
    block_tokens: int
    """B·T."""
    row_tokens: int
    """T."""

    @classmethod
    def of(
        cls, code: SparseCode, tokens: Tensor, *, block_tokens: int, row_tokens: int
    ) -> "Firings":
        """Firings of a code `[N, k]`, on the CPU.

        Args:
            tokens: `[N]` int64, number of each token within the block.
        """
        acts, indices = code.acts.detach().float().cpu(), code.indices.cpu()
        active = acts > 0
        keys = (indices * block_tokens + tokens.unsqueeze(1))[active]
        keys, order = keys.sort()
        return cls(keys, acts[active][order], block_tokens, row_tokens)

    @property
    def latents(self) -> Tensor:
        """`[F]` int64."""
        return self.keys.div(self.block_tokens, rounding_mode="floor")

    def peaks(self) -> Peaks:
        """The strongest firing per latent and row, the first of equal ones."""
        if not len(self.keys):
            none = self.keys.new_zeros(0)
            return Peaks(none, self.values.new_zeros(0), none)
        pairs = self.keys.div(self.row_tokens, rounding_mode="floor")  # latent and row
        begins = torch.ones_like(pairs, dtype=torch.bool)
        begins[1:] = pairs[1:] != pairs[:-1]
        pair_of = begins.cumsum(0) - 1
        largest = self.values.new_zeros(int(pair_of[-1]) + 1)
        largest.scatter_reduce_(0, pair_of, self.values, "amax")
        at = (self.values == largest[pair_of]).nonzero().squeeze(1)
        first = torch.full_like(largest, len(pairs), dtype=torch.int64)
        first.scatter_reduce_(0, pair_of[at], at, "amin")
        return Peaks(self.latents[first], largest, self.keys[first] % self.block_tokens)

    def windows(self, latents: Tensor, starts: Tensor, window: int) -> Tensor:
        """Acts of `latents [E]` at `window` tokens from the tokens `starts [E]` on: `[E, window]`,
        0 where a latent does not fire."""
        first = latents * self.block_tokens + starts
        bounds = torch.searchsorted(self.keys, torch.stack([first, first + window]))
        counts = bounds[1] - bounds[0]
        which = torch.arange(len(latents)).repeat_interleave(counts)
        within = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        firing = bounds[0][which] + within
        acts = self.values.new_zeros(len(latents), window)
        acts[which, self.keys[firing] - first[which]] = self.values[firing]
        return acts
