"""Redundancy between the dictionaries of different layers: every latent against every other.

    cosine of latent u of layer i with latent v of layer j > i:
        raw          ⟨u, v⟩ / (‖u‖ ‖v‖)
        transported  ⟨u T, v⟩ / (‖u T‖ ‖v‖), T the chain of maps from layer i to layer j

All pairs are looked at, tile by tile: B latents of one layer by B of another, each pair of layers
once, L (L − 1) M² D FLOPs. Products are in float64 and cosines are rounded to float32
at the end, so that they do not depend on B. At once there are one tile and its two sides,
`12 B² + 24 B D` bytes: 0.4 GB at B = 4,096 and D = 2,304, whatever M is; and one float32 per latent
and layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from resae.stack.affine import transport_rows

BLOCK_ROWS = 4096
"""Latents on each side of a tile."""
ALIKE = 0.7
"""Cosine above which `layers_per_latent` counts two latents as one."""


@dataclass(frozen=True)
class Redundancy:
    """Redundancy between the dictionaries of different layers."""

    mean_max_cos: float
    """Mean over latents of the largest cosine with a latent of another layer."""
    share_over_0_5: float
    """Share of latents whose largest cosine is above 0.5."""
    share_over_0_7: float
    """Share of latents whose largest cosine is above 0.7."""
    share_over_0_9: float
    """Share of latents whose largest cosine is above 0.9."""
    random_floor: float
    """`mean_max_cos` of random directions in the same numbers."""
    layers_per_latent: float | None = None
    """Mean number of layers that have a latent of a cosine above 0.7, its own layer included."""
    mean_max_cos_within: float | None = None
    """Mean over latents of the largest cosine with another latent of the same layer."""
    mean_max_cos_transported: float | None = None
    """`mean_max_cos` after the earlier latent is transported through the maps to the later layer;
    None without maps."""
    share_over_0_5_transported: float | None = None
    """`share_over_0_5` of transported latents."""
    share_over_0_7_transported: float | None = None
    """`share_over_0_7` of transported latents."""
    share_over_0_9_transported: float | None = None
    """`share_over_0_9` of transported latents."""
    layers_per_latent_transported: float | None = None
    """`layers_per_latent` of transported latents."""


HISTOGRAM_EDGES = [round(-0.2 + 0.02 * i, 2) for i in range(61)]
"""Bin edges for the largest cosines: −0.2 to 1 in steps of 0.02."""


class LargestCosines:
    """For each latent of each dictionary `[M_l, D]`, its largest (signed) cosine with a latent of
    each layer, itself left out. Latents of zero norm have none.

    Args:
        A: maps `[s·D, D]` of layers 1 … L−1, through which earlier latents are transported; None:
            latents are compared as they are.
        within: whether to compare latents of one layer too, for `same_layer`.
        block_rows: latents on each side of a tile; no cosine depends on it.

    Raises:
        ValueError: a single dictionary.
    """

    def __init__(
        self,
        dictionaries: Sequence[Tensor],
        A: Sequence[Tensor] | None = None,
        *,
        within: bool = False,
        block_rows: int = BLOCK_ROWS,
    ):
        if len(dictionaries) < 2:
            raise ValueError(
                f"redundancy: got {len(dictionaries)} dictionaries, expected at least 2"
            )
        self.dictionaries = [W.detach() for W in dictionaries]
        self._maps = None if A is None else [a.detach().double() for a in A]
        self._block_rows = block_rows
        L = len(dictionaries)
        self.of_layers = [
            torch.full((len(W), L), -torch.inf, device=W.device) for W in self.dictionaries
        ]
        """Per layer `[M_l, L]` float32; −inf where there is none."""
        for i in range(L):
            for j in range(i if within else i + 1, L):
                self._compare(i, j)

    def _blocks(self, layer: int, to: int) -> Iterator[tuple[slice, Tensor]]:
        """Unit latents `[b, D]` of a layer in float64, transported to a layer `to`; zeros for those
        of zero norm."""
        W = self.dictionaries[layer]
        for start in range(0, len(W), self._block_rows):
            rows = slice(start, start + self._block_rows)
            directions = W[rows].double()
            if self._maps is not None:
                moved = transport_rows(self._maps[:to], layer, directions)[to]
                assert moved is not None  # every layer is predicted from the one before it
                directions = moved
            directions = directions.to(self.dictionaries[to].device)
            yield rows, directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-30)

    def _compare(self, i: int, j: int) -> None:
        """Look at all pairs of latents of layers i ≤ j."""
        earlier, later = self.of_layers[i][:, j], self.of_layers[j][:, i]
        for rows, u in self._blocks(i, j):
            for columns, v in self._blocks(j, j):
                tile = (u @ v.T).float()
                tile.masked_fill_((u == 0).all(1).unsqueeze(1) | (v == 0).all(1), -torch.inf)
                if i == j and rows == columns:
                    tile.fill_diagonal_(-torch.inf)
                largest = tile.amax(1).to(earlier.device)
                earlier[rows] = torch.maximum(earlier[rows], largest)
                if i < j:
                    later[columns] = torch.maximum(later[columns], tile.amax(0))

    def other_layers(self) -> Tensor:
        """`[Σ M_l]`: the largest cosine of each latent with one of another layer; latents that have
        none left out."""
        L = len(self.of_layers)
        found = [
            table[:, [layer for layer in range(L) if layer != own]].amax(1).cpu()
            for own, table in enumerate(self.of_layers)
        ]
        largest = torch.cat(found)
        return largest[largest > -torch.inf]

    def same_layer(self) -> Tensor:
        """`[Σ M_l]`: the largest cosine of each latent with another one of its layer."""
        largest = torch.cat([table[:, own].cpu() for own, table in enumerate(self.of_layers)])
        return largest[largest > -torch.inf]

    def layers_per_latent(self, alike: float = ALIKE) -> float:
        """Mean number of layers that have a latent of a cosine above `alike`, its own included."""
        counts = []
        for own, table in enumerate(self.of_layers):
            is_alike = table.cpu() > alike
            is_alike[:, own] = True
            counts.append(is_alike[(table > -torch.inf).any(1).cpu()].sum(1))
        return float(torch.cat(counts).double().mean())

    def histogram(self) -> list[int]:
        """Counts of `other_layers` between `HISTOGRAM_EDGES`."""
        edges = torch.tensor(HISTOGRAM_EDGES)
        inside = self.other_layers().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
        return torch.histogram(inside, edges).hist.long().tolist()


def redundancy(
    largest: LargestCosines, transported: LargestCosines | None = None, seed: int = 0
) -> Redundancy:
    """Summary of the cosines between layers, with the floor of random directions."""
    shapes = tuple((*W.shape, str(W.device)) for W in largest.dictionaries)
    of_raw = _summary(largest)
    of_transported = {} if transported is None else _summary(transported)
    return Redundancy(
        **of_raw,
        random_floor=_random_floor(shapes, seed),
        mean_max_cos_within=float(largest.same_layer().double().mean()),
        **{f"{name}_transported": value for name, value in of_transported.items()},
    )


@cache
def _random_floor(shapes: tuple[tuple[int, int, str], ...], seed: int) -> float:
    """Mean largest cosine of random directions in dictionaries of these sizes on these devices:
    methods that are compared have the same, and it costs as much as one of them."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(M, D, generator=generator).to(device) for M, D, device in shapes]
    return float(LargestCosines(random).other_layers().double().mean())


def _summary(largest: LargestCosines) -> dict[str, float]:
    cosines = largest.other_layers()
    shares = {
        f"share_over_{str(bound).replace('.', '_')}": float((cosines > bound).double().mean())
        for bound in (0.5, 0.7, 0.9)
    }
    mean = float(cosines.double().mean())
    return {"mean_max_cos": mean, **shares, "layers_per_latent": largest.layers_per_latent()}
