"""Affine maps between selected layers: x_l ≈ Σ_{sources j} x_j A_lj + c_l, fitted in closed form.

    none          nothing is predicted: every layer has an ordinary SAE
    identity      x_l ≈ x_{l-1} + c_l, c_l the mean difference
    previous      x_l ≈ x_{l-1} A_l + c_l                              ReSAE, arXiv 2605.27819
    all_previous  x_l ≈ Σ_{j<l} x_j A_lj + c_l                         after LIMe, arXiv 2502.09245

One pass over calibration activations sums first and second moments in float64, block by block
`[D, D]`, only the blocks that the predictor needs: 2·N·D² FLOPs each. The ridge is relative to the
mean eigenvalue of the sources' covariance, after each layer is divided by its RMS, so that one
value suits every layer and model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resae.metrics import VarianceUnexplained
from resae.storage import load_tensors, save_tensors
from resae_kernels.reference import affine_predict

KINDS = ("none", "identity", "previous", "all_previous")


def sources_of(kind: str, layer: int) -> range:
    """Positions of the layers that predict layer `layer` of the selection."""
    if layer == 0 or kind == "none":
        return range(0)
    return range(0 if kind == "all_previous" else layer - 1, layer)


class Moments:
    """Streamed first and second moments of the activations at L hook points, in float64."""

    def __init__(self, n_layers: int, d_in: int, kind: str = "all_previous"):
        _check_kind(kind)
        self.kind = kind
        self.count = 0
        self.sums = [torch.zeros(d_in, dtype=torch.float64) for _ in range(n_layers)]
        self.squares = torch.zeros(n_layers, dtype=torch.float64)
        self.blocks: dict[tuple[int, int], Tensor] = {}
        for layer in range(n_layers):
            sources = sources_of(kind, layer) if kind != "identity" else ()
            for i in sources:
                for j in (*sources, layer):
                    if i <= j:
                        self.blocks[i, j] = torch.zeros(d_in, d_in, dtype=torch.float64)

    def add(self, xs: Sequence[Tensor]) -> None:
        """Add N tokens: L activations `[N, D]`. Raises ValueError on NaN or inf."""
        wide = [x.double() for x in xs]
        for layer, x in enumerate(wide):
            total = x.sum(0)
            if not bool(total.isfinite().all()):
                raise ValueError(
                    f"activations of selected layer {layer} hold NaN or inf; load the model in "
                    f"float32 or bfloat16 (float16 overflows in some models)"
                )
            self.sums[layer] += total.cpu()
            self.squares[layer] += x.square().sum().cpu()
        for (i, j), block in self.blocks.items():
            block += (wide[i].T @ wide[j]).cpu()
        self.count += len(wide[0])

    def scale(self) -> list[float]:
        """RMS of each layer: the activations divided by it have a mean squared entry of 1."""
        self._require_tokens(1)
        d_in = len(self.sums[0])
        return [max(float(s / (self.count * d_in)) ** 0.5, 1e-12) for s in self.squares]

    def mean(self, layer: int) -> Tensor:
        """`[D]` float64, the mean activation."""
        self._require_tokens(1)
        return self.sums[layer] / self.count

    def covariance(self, i: int, j: int) -> Tensor:
        """`[D, D]` float64, centred."""
        block = self.blocks[i, j] if (i, j) in self.blocks else self.blocks[j, i].T
        return block / self.count - torch.outer(self.mean(i), self.mean(j))

    def _require_tokens(self, n: int) -> None:
        if self.count < n:
            raise ValueError(
                f"affine fit: {self.count} calibration tokens, expected at least {n}; the dataset "
                f"is empty or too short"
            )


class AffinePredictor(nn.Module):
    """The affine maps of a stack. Buffers `A[l-1] [s·D, D]`, `c[l-1] [D]` predict layer l.

    Sources are stacked in layer order, the most recent last (`reference.affine_predict`). For kind
    "none" there are no maps; "identity" holds `A = I` so that every kind runs the same code.
    """

    def __init__(self, kind: str, A: Sequence[Tensor] = (), c: Sequence[Tensor] = ()):
        super().__init__()
        _check_kind(kind)
        self.kind = kind
        self.n_maps = len(A)
        for layer, (A_l, c_l) in enumerate(zip(A, c, strict=True), start=1):
            self.register_buffer(f"A_{layer}", A_l)
            self.register_buffer(f"c_{layer}", c_l)

    @property
    def A(self) -> list[Tensor]:
        return [self.get_buffer(f"A_{layer}") for layer in range(1, self.n_maps + 1)]

    @property
    def c(self) -> list[Tensor]:
        return [self.get_buffer(f"c_{layer}") for layer in range(1, self.n_maps + 1)]

    def forward(self, layer: int, previous: Sequence[Tensor]) -> Tensor | None:
        """The prediction of selected layer `layer` from the layers before it, each `[..., D]`, in
        the maps' dtype.

        None where nothing is predicted: the first layer, and every layer of kind "none".
        """
        if layer == 0 or self.kind == "none":
            return None
        A, c = self.get_buffer(f"A_{layer}"), self.get_buffer(f"c_{layer}")
        if A.dtype.itemsize > 2:
            return affine_predict(previous[:layer], A, c)
        # A product of half-precision numbers is summed in float32 and rounded once by itself; the
        # specification would first make a wide copy of A at every call.
        recent = torch.cat(list(previous[layer - len(A) // A.shape[1] : layer]), dim=-1)
        return torch.nn.functional.linear(recent.to(A.dtype), A.T, c)

    def rescaled(self, factors: Sequence[float]) -> "AffinePredictor":
        """The same maps for activations multiplied by `factors`, one per layer."""
        A, c = [], []
        for layer in range(1, self.n_maps + 1):
            maps = self.get_buffer(f"A_{layer}")
            sources = sources_of(self.kind, layer)
            per_source = torch.tensor([factors[layer] / factors[j] for j in sources])
            rows = per_source.repeat_interleave(maps.shape[1]).to(maps)
            A.append(maps * rows.unsqueeze(1))
            c.append(self.get_buffer(f"c_{layer}") * factors[layer])
        return AffinePredictor(self.kind, A, c)

    def tensors(self) -> dict[str, Tensor]:
        """`A.1`, `c.1`, …: the maps by the names they have in files."""
        maps = {f"A.{layer}": A for layer, A in enumerate(self.A, start=1)}
        return maps | {f"c.{layer}": c for layer, c in enumerate(self.c, start=1)}

    def save(self, path: Path) -> None:
        save_tensors(path, self.tensors() or {"none": torch.zeros(0)})

    @classmethod
    def load(cls, path: Path, kind: str) -> "AffinePredictor":
        tensors = load_tensors(path, "affine maps")
        layers = sorted(int(name[2:]) for name in tensors if name.startswith("A."))
        return cls(kind, [tensors[f"A.{i}"] for i in layers], [tensors[f"c.{i}"] for i in layers])


def fit_predictor(
    kind: str, moments: Moments, *, ridge: float = 1e-4, dtype: torch.dtype = torch.float32
) -> AffinePredictor:
    """Ridge least squares from moments: `A = (Σ_ss + λI)⁻¹ Σ_st`, `c = μ_t − μ_s A`.

    Args:
        kind: one of `KINDS`; the moments must have been summed for it, or for "all_previous".
        ridge: λ relative to the mean eigenvalue of the sources' covariance (each layer divided by
            its RMS).

    Raises:
        ValueError: unknown kind, negative ridge, no tokens, or a singular system at ridge 0.
    """
    _check_kind(kind)
    if ridge < 0:
        raise ValueError(f"affine fit: ridge={ridge}, expected ≥ 0")
    if kind == "none":
        return AffinePredictor(kind)
    moments._require_tokens(2)
    scale = moments.scale()
    maps, offsets = [], []
    for target in range(1, len(scale)):
        sources = sources_of(kind, target)
        D = len(moments.sums[0])
        if kind == "identity":
            A = torch.eye(D, dtype=torch.float64)
        else:
            A = _solve(moments, sources, target, scale, ridge)
        mean = torch.cat([moments.mean(j) for j in sources])
        maps.append(A.to(dtype))
        offsets.append((moments.mean(target) - mean @ A).to(dtype))
    return AffinePredictor(kind, maps, offsets)


def _solve(
    moments: Moments, sources: range, target: int, scale: Sequence[float], ridge: float
) -> Tensor:
    """`A [s·D, D]` in raw units, solved in units of each layer's RMS."""
    gram = torch.cat(
        [
            torch.cat([moments.covariance(i, j) / (scale[i] * scale[j]) for j in sources], dim=1)
            for i in sources
        ]
    )
    cross = torch.cat([moments.covariance(i, target) / (scale[i] * scale[target]) for i in sources])
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise ValueError(
            f"affine fit: the covariance of the sources of selected layer {target} is singular "
            f"({moments.count} tokens, ridge {ridge}); use more calibration tokens or a ridge > 0"
        )
    A = torch.cholesky_solve(cross, factor)
    rows = torch.tensor([scale[target] / scale[j] for j in sources], dtype=torch.float64)
    return A * rows.repeat_interleave(A.shape[1]).unsqueeze(1)


def r2_per_layer(predictor: AffinePredictor, batches: Iterable[Sequence[Tensor]]) -> list[float]:
    """R² of each prediction (layers 1 … L−1) on held-out activations: 1 − Σ‖x−pred‖²/Σ‖x−x̄‖²."""
    sums: dict[int, VarianceUnexplained] = {}
    for xs in batches:
        for layer in range(1, len(xs)):
            prediction = predictor(layer, xs)
            if prediction is not None:
                sums.setdefault(layer, VarianceUnexplained()).add(xs[layer], prediction)
    return [1.0 - s.fvu() for s in sums.values()]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown predictor {kind!r}; choose one of {', '.join(KINDS)}")
