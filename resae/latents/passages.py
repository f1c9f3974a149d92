"""The n passages of each latent with the highest priority, kept while text streams by.

A passage is a window of W tokens around a token at which the latent fires, at most one per row of
text. Kept per passage: priority, act at that token, number of the token in the text, and the act at
each token of the window as a share of the act at its peak.
"""

import torch
from torch import Tensor

from resae.latents.firings import Firings, Peaks

PARTS = ("priorities", "values", "places", "shares")
"""Names of the tensors of `Passages`."""
BEFORE = 3 / 4
"""Share of a window that lies before the peak: a model reads what came before."""


def window_starts(positions: Tensor, window: int, row_tokens: int) -> Tensor:
    """First position in its row of the window around each position: inside the row."""
    before = round((window - 1) * BEFORE)
    return (positions - before).clamp(0, row_tokens - window)


class Passages:
    """n passages of each of M latents, in no order.

    Attributes:
        priorities: `[M, n]` float32, −1 where there is no passage.
        values: `[M, n]` float32, act at the peak.
        places: `[M, n]` int64, number of the peak's token in the text; −1: no passage.
        shares: `[M, n, W]` float16, act at each token of the window over that at the peak.
    """

    def __init__(self, M: int, n: int, window: int):
        self.priorities = torch.full((M, n), -1.0)
        self.values = torch.zeros(M, n)
        self.places = torch.full((M, n), -1)
        self.shares = torch.zeros(M, n, window, dtype=torch.float16)

    @staticmethod
    def bytes_per_latent(n: int, window: int) -> int:
        return n * (4 + 4 + 8 + 2 * window)

    def offer(self, peaks: Peaks, priorities: Tensor, firings: Firings, first_token: int) -> None:
        """Keep those peaks of a block whose priority is among the n highest of their latent.

        Args:
            priorities: `[P]` ≥ 0.
            first_token: number in the text of the block's first token.
        """
        n = self.priorities.shape[1]
        least = self.priorities.amin(1) if n else self.priorities.new_zeros(len(self.priorities))
        wanted = (n > 0) & (priorities > least[peaks.latents])
        latents, tokens = peaks.latents[wanted], peaks.tokens[wanted]
        values, priorities = peaks.values[wanted], priorities[wanted]
        if not len(latents):
            return
        # Into a table [U, n] of the U latents concerned, n at most of each; then joined with what
        # they have.
        order = priorities.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]
        touched, which, counts = latents[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[which]
        order, which, rank = order[rank < n], which[rank < n], rank[rank < n]
        offered = torch.full((len(touched), n), -1.0)
        offered[which, rank] = priorities[order]
        source = torch.zeros(len(touched), n, dtype=torch.int64)
        source[which, rank] = order
        joined = torch.cat([self.priorities[touched], offered], 1)
        best = joined.topk(n, dim=1, sorted=False).indices
        # As many are offered and kept as fall out: one by one into their places.
        falls = torch.ones(len(touched), 2 * n, dtype=torch.bool).scatter_(1, best, False)[:, :n]
        row, place = falls.nonzero(as_tuple=True)
        slot = best.masked_select(best >= n) - n
        real = offered[row, slot] >= 0
        row, place, new = row[real], place[real], source[row, slot][real]
        at = (touched[row], place)
        self.priorities[at] = priorities[new]
        self.values[at] = values[new]
        self.places[at] = tokens[new] + first_token
        T, window = firings.row_tokens, self.shares.shape[2]
        starts = tokens[new] - tokens[new] % T + window_starts(tokens[new] % T, window, T)
        acts = firings.windows(latents[new], starts, window)
        self.shares[at] = (acts / values[new].unsqueeze(1)).half()
