"""Closed-form fit of the affine maps between layers.

One pass over calibration activations sums first and second moments in float64, block by block
`[D, D]`, only the blocks that the predictor needs: 2·N·D² FLOPs each. The ridge is relative to the
mean eigenvalue of the sources' covariance, after each layer is divided by its RMS, so that one
value suits every layer and model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resae.choices import PredictorKind, check_map_type
from resae.stack.affine import AffinePredictor, apply_map, sources_of, times_per_source


class Moments:
    """Streamed first and second moments of the activations at L hook points, in float64.

    Args:
        on_reconstructions: the maps shall take reconstructions of the earlier layers in place of
            their activations; `add` then needs both.
    """

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        kind: str = "all_previous",
        *,
        on_reconstructions: bool = False,
    ):
        PredictorKind.check(kind, "Moments: kind")
        self.kind = kind
        self.n_layers = n_layers
        self.on_reconstructions = on_reconstructions
        self.count = 0
        rows = n_layers * (2 if on_reconstructions else 1)
        self.sums = [torch.zeros(d_in, dtype=torch.float64) for _ in range(rows)]
        """Sums of the L activations, then of the L reconstructions if maps take these; the rows of
        `squares` and `blocks` have the same order."""
        self.squares = torch.zeros(rows, dtype=torch.float64)
        self.blocks: dict[tuple[int, int], Tensor] = {}
        for layer in range(n_layers):
            sources = self.rows_of(sources_of(kind, layer)) if kind != "identity" else ()
            for i in sources:
                for j in (*sources, layer):
                    if (j, i) not in self.blocks:
                        self.blocks[i, j] = torch.zeros(d_in, d_in, dtype=torch.float64)

    def rows_of(self, sources: range) -> range:
        """Rows of what maps take of these layers."""
        first = self.n_layers if self.on_reconstructions else 0
        return range(first + sources.start, first + sources.stop)

    def add(self, xs: Sequence[Tensor], reconstructions: Sequence[Tensor] = ()) -> None:
        """Add N tokens: L activations `[N, D]`, and as many reconstructions of them where the maps
        take these.

        Raises:
            ValueError: NaN or inf, or another number of tensors.
        """
        wide = [x.double() for x in (*xs, *reconstructions)]
        if len(wide) != len(self.sums):
            raise ValueError(
                f"Moments: {len(xs)} activations and {len(reconstructions)} reconstructions for "
                f"{self.n_layers} layers, on_reconstructions={self.on_reconstructions}"
            )
        for layer, x in enumerate(wide):
            total = x.sum(0)
            if not bool(total.isfinite().all()):
                what = "activations" if layer < self.n_layers else "reconstructions"
                raise ValueError(
                    f"{what} of selected layer {layer % self.n_layers} hold NaN or inf; load the "
                    f"model in float32 or bfloat16 (float16 overflows in some models)"
                )
            self.sums[layer] += total.cpu()
            self.squares[layer] += x.square().sum().cpu()
        for (i, j), block in self.blocks.items():
            block += (wide[i].T @ wide[j]).cpu()
        self.count += len(wide[0])

    def scale(self) -> list[float]:
        """RMS of each layer: the activations divided by it have a mean squared entry of 1."""
        return self.rms()[: self.n_layers]

    def rms(self) -> list[float]:
        """RMS of each row: of the activations, then of the reconstructions."""
        self.require_tokens(1)
        d_in = len(self.sums[0])
        return [max(float(s / (self.count * d_in)) ** 0.5, 1e-12) for s in self.squares]

    def mean(self, layer: int) -> Tensor:
        """`[D]` float64, the mean activation, or, from row L on, reconstruction."""
        self.require_tokens(1)
        return self.sums[layer] / self.count

    def covariance(self, i: int, j: int) -> Tensor:
        """`[D, D]` float64, centred."""
        block = self.blocks[i, j] if (i, j) in self.blocks else self.blocks[j, i].T
        return block / self.count - torch.outer(self.mean(i), self.mean(j))

    def require_tokens(self, n: int) -> None:
        if self.count < n:
            raise ValueError(
                f"affine fit: {self.count} calibration tokens, expected at least {n}; the dataset "
                f"is empty or too short"
            )


def fit_predictor(
    kind: str,
    moments: Moments,
    *,
    ridge: float = 1e-4,
    map_type: str = "full",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> AffinePredictor:
    """Ridge least squares from moments: `A = (Σ_ss + λI)⁻¹ Σ_st`, `c = μ_t − μ_s A`; for the
    cheap map types the minimum of the same sum, penalty included, among the maps of that type.

    Args:
        kind: one of `PredictorKind`; the moments must have been summed for it, or for
            "all_previous".
        ridge: λ relative to the mean eigenvalue of the sources' covariance (each layer divided by
            its RMS).
        map_type: one of `MapType`. rank: r of "low_rank", at most D.

    Raises:
        ValueError: unknown kind or map type, negative ridge, no tokens, or a singular system at
            ridge 0.
    """
    PredictorKind.check(kind, "affine fit: predictor")
    check_map_type(kind, map_type, rank)
    if ridge < 0:
        raise ValueError(f"affine fit: ridge={ridge}, expected ≥ 0")
    if kind == "none":
        return AffinePredictor(kind)
    moments.require_tokens(2)
    scale = moments.rms()
    D = len(moments.sums[0])
    if rank is not None and rank > D:
        raise ValueError(f"affine fit: rank={rank} exceeds the width {D} of the activations")
    maps, offsets = [], []
    for target in range(1, moments.n_layers):
        sources = moments.rows_of(sources_of(kind, target))
        means = [moments.mean(j) for j in sources]
        if kind == "identity":
            parts: tuple[Tensor, ...] = (torch.eye(D, dtype=torch.float64),)
        else:
            units = [scale[target] / scale[j] for j in sources]
            fitted = _solve(moments, sources, target, scale, ridge, map_type, rank)
            parts = times_per_source(map_type, fitted, units)
        mapped = torch.cat(means) @ parts[0] if map_type == "full" else apply_map(parts, means)
        maps.append(tuple(part.to(dtype) for part in parts))
        offsets.append((moments.mean(target) - mapped).to(dtype))
    return AffinePredictor(kind, maps, offsets, map_type=map_type)


def _solve(
    moments: Moments,
    sources: range,
    target: int,
    scale: Sequence[float],
    ridge: float,
    map_type: str,
    rank: int | None,
) -> tuple[Tensor, ...]:
    """The parts of one map, in units of each layer's RMS.

    With `G = Σ_ss + λI` and `X = Σ_st`, of blocks `[D, D]` per source: scalar `α = (tr G_ij)⁻¹
    (tr X_i)`; diagonal the same dimension by dimension; low rank first the scalar, then `B V Vᵀ`
    of what it lacks to the full map, B, with the r first eigenvectors V of `Bᵀ G B` (reduced-rank
    regression, Izenman 1975).
    """
    s, D = len(sources), len(moments.sums[0])
    gram = torch.cat(
        [
            torch.cat([moments.covariance(i, j) / (scale[i] * scale[j]) for j in sources], dim=1)
            for i in sources
        ]
    )
    cross = torch.cat([moments.covariance(i, target) / (scale[i] * scale[target]) for i in sources])
    gram.diagonal().add_(ridge * gram.diagonal().mean())

    def solve(gram: Tensor, cross: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            raise ValueError(
                f"affine fit: the covariance of the sources of selected layer {target} is singular "
                f"({moments.count} tokens, ridge {ridge}); use more calibration tokens or a ridge "
                f"> 0"
            )
        return torch.cholesky_solve(cross, factor)

    if map_type == "full":
        return (solve(gram, cross),)
    # The diagonals of the blocks: [D, s, s] and [D, s, 1].
    grams = gram.view(s, D, s, D).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    crosses = cross.view(s, D, D).diagonal(dim1=1, dim2=2).T.unsqueeze(-1)
    if map_type == "diagonal":
        return (solve(grams, crosses).squeeze(-1).T.contiguous(),)
    alpha = solve(grams.sum(0), crosses.sum(0)).view(s)
    if map_type == "scalar":
        return (alpha,)
    assert rank is not None  # check_map_type
    B = solve(gram, cross)
    B.view(s, D, D).diagonal(dim1=1, dim2=2).sub_(alpha.unsqueeze(1))
    V = torch.linalg.eigh(B.T @ gram @ B).eigenvectors[:, D - rank :]
    return B @ V, V.T.contiguous(), alpha
