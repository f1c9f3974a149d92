"""Affine maps between selected layers: x_l ≈ Σ_{sources j} x_j A_lj + c_l, fitted in closed form.

    none          nothing is predicted: every layer has an ordinary SAE
    identity      x_l ≈ x_{l-1} + c_l, c_l the mean difference
    previous      x_l ≈ x_{l-1} A_l + c_l                              ReSAE, arXiv 2605.27819
    all_previous  x_l ≈ Σ_{j<l} x_j A_lj + c_l                         after LIMe, arXiv 2502.09245

The maps of the last two have a form: `full`, `scalar` α_lj·I, `diagonal`, or `low_rank`
skip_lj·I + U V: a stream keeps most of what it was, which no low rank alone could say.

One pass over calibration activations sums first and second moments in float64, block by block
`[D, D]`, only the blocks that the predictor needs: 2·N·D² FLOPs each. The ridge is relative to the
mean eigenvalue of the sources' covariance, after each layer is divided by its RMS, so that one
value suits every layer and model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resae.choices import FORMS, KINDS
from resae.metrics import VarianceUnexplained
from resae.storage import load_tensors, save_tensors
from resae_kernels.reference import accumulation_dtype


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
    """The affine maps of a stack. `A[l-1] [s·D, D]`, `c[l-1] [D]` predict layer l.

    Sources are stacked in layer order, the most recent last (`reference.affine_predict`). For kind
    "none" there are no maps; "identity" holds `A = I` so that every kind runs the same code.

    Args:
        A: per map what its form holds (`FORMS`): `A [s·D, D]`, `alpha [s]`, `diagonal [s, D]`, or
            `U [s·D, r]`, `V [r, D]`, `skip [s]`.
    """

    def __init__(
        self,
        kind: str,
        A: Sequence[Tensor | tuple[Tensor, ...]] = (),
        c: Sequence[Tensor] = (),
        *,
        form: str = "full",
    ):
        super().__init__()
        _check_kind(kind)
        self.kind = kind
        self.form = form
        self.n_maps = len(A)
        for layer, (A_l, c_l) in enumerate(zip(A, c, strict=True), start=1):
            parts = A_l if isinstance(A_l, tuple) else (A_l,)
            for name, part in zip(FORMS[form], parts, strict=True):
                self.register_buffer(f"{name}_{layer}", part)
            self.register_buffer(f"c_{layer}", c_l)

    @property
    def A(self) -> list[Tensor]:
        """Dense maps `[s·D, D]`; made on each call unless the form is "full"."""
        return [self._dense(layer) for layer in range(1, self.n_maps + 1)]

    @property
    def c(self) -> list[Tensor]:
        return [self.get_buffer(f"c_{layer}") for layer in range(1, self.n_maps + 1)]

    @property
    def rank(self) -> int | None:
        """r of the form "low_rank"."""
        return self._parts(1)[1].shape[0] if self.form == "low_rank" else None

    def _parts(self, layer: int) -> tuple[Tensor, ...]:
        # Not by get_buffer, which takes as long as a prediction for one token.
        return tuple(getattr(self, f"{name}_{layer}") for name in FORMS[self.form])

    def _dense(self, layer: int) -> Tensor:
        parts = self._parts(layer)
        if self.form == "full":
            return parts[0]
        rows = parts[-1].reshape(len(parts[-1]), -1).expand(-1, len(self.c[layer - 1]))
        dense = torch.cat([torch.diag(row) for row in rows])
        return dense + parts[0] @ parts[1] if self.form == "low_rank" else dense

    def forward(self, layer: int, previous: Sequence[Tensor]) -> Tensor | None:
        """The prediction of selected layer `layer` from the layers before it, each `[..., D]`, in
        the maps' dtype.

        Without dense products where the form is cheaper: s·D multiplications per token and, of low
        rank, (s + 1)·r·D more, against s·D².

        None where nothing is predicted: the first layer, and every layer of kind "none".
        """
        if layer == 0 or self.kind == "none":
            return None
        parts, c = self._parts(layer), getattr(self, f"c_{layer}")
        if self.form != "full":
            sources = [previous[j] for j in sources_of(self.kind, layer)]
            return (_moved(parts, sources) + c.to(accumulation_dtype(c.dtype))).to(c.dtype)
        A = parts[0]
        width, D = A.shape
        recent = previous[layer - 1]
        if width != D:
            recent = torch.cat(list(previous[layer - width // D : layer]), dim=-1)
        if A.dtype.itemsize > 2:
            flat = recent.reshape(-1, width).to(A.dtype)
            return torch.addmm(c, flat, A).view(*recent.shape[:-1], D)
        # A product of half-precision numbers is summed in float32 and rounded once by itself; the
        # specification would first make a wide copy of A at every call.
        return torch.nn.functional.linear(recent.to(A.dtype), A.T, c)

    def one_map(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """`(A [D, D], c)` of which the prediction of layer ≥ 1 is `x A + c`, x being the layer
        before; None: it is another sum."""
        if self.form != "full":
            return None
        A, c = getattr(self, f"A_{layer}"), getattr(self, f"c_{layer}")
        return None if len(A) != len(c) else (A, c)

    def rescaled(self, factors: Sequence[float]) -> "AffinePredictor":
        """The same maps for activations multiplied by `factors`, one per layer."""
        A, c = [], []
        for layer in range(1, self.n_maps + 1):
            per_source = [factors[layer] / factors[j] for j in sources_of(self.kind, layer)]
            A.append(_times_per_source(self.form, self._parts(layer), per_source))
            c.append(self.get_buffer(f"c_{layer}") * factors[layer])
        return AffinePredictor(self.kind, A, c, form=self.form)

    def tensors(self) -> dict[str, Tensor]:
        """`A.1`, `c.1`, …: the maps by the names they have in files."""
        layers = range(1, self.n_maps + 1)
        names = (*FORMS[self.form], "c")
        return {f"{name}.{i}": self.get_buffer(f"{name}_{i}") for name in names for i in layers}

    def save(self, path: Path) -> None:
        save_tensors(path, self.tensors() or {"none": torch.zeros(0)})

    @classmethod
    def load(cls, path: Path, kind: str) -> "AffinePredictor":
        """Read what `save` wrote; the names of the tensors say the form."""
        tensors = load_tensors(path, "affine maps")
        form = next((f for f, names in FORMS.items() if f"{names[0]}.1" in tensors), "full")
        layers = sorted(int(name[2:]) for name in tensors if name.startswith("c."))
        maps = [tuple(tensors[f"{name}.{i}"] for name in FORMS[form]) for i in layers]
        return cls(kind, maps, [tensors[f"c.{i}"] for i in layers], form=form)


def _moved(parts: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """`Σ_j x_j A_j` of sources `[..., D]` for a form that is not full."""
    *low_rank, factors = (part.to(accumulation_dtype(part.dtype)) for part in parts)
    wide = [x.to(factors.dtype) for x in sources]
    moved = wide[0] * factors[0]  # factors: [s] or [s, D]
    for x, factor in zip(wide[1:], factors[1:], strict=True):
        moved = moved + x * factor
    if low_rank:
        U, V = low_rank
        moved = moved + torch.cat(wide, dim=-1) @ U @ V
    return moved


def _times_per_source(
    form: str, parts: Sequence[Tensor], factors: Sequence[float]
) -> tuple[Tensor, ...]:
    """A map times one factor per source. The rows of every part but V belong to one source after
    the other."""
    scaled = []
    for name, part in zip(FORMS[form], parts, strict=True):
        if name != "V":
            rows = torch.tensor(factors, dtype=torch.float64)
            rows = rows.repeat_interleave(len(part) // len(factors)).to(part)
            part = part * rows.reshape(-1, *[1] * (part.ndim - 1))
        scaled.append(part)
    return tuple(scaled)


def check_form(kind: str, form: str, rank: int | None, what: str = "affine fit") -> None:
    """Raise ValueError unless a predictor of this kind can have this form."""
    if form not in FORMS:
        raise ValueError(f"{what}: unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if form != "full" and kind not in ("previous", "all_previous"):
        raise ValueError(
            f"{what}: form={form!r} for predictor {kind!r}; only 'previous' and 'all_previous' "
            f"have forms"
        )
    if (form == "low_rank") != (rank is not None) or (rank is not None and rank < 1):
        raise ValueError(
            f"{what}: form={form!r} with rank={rank}; expected a rank of at least 1 for "
            f"'low_rank', and none for the others"
        )


def fit_predictor(
    kind: str,
    moments: Moments,
    *,
    ridge: float = 1e-4,
    form: str = "full",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> AffinePredictor:
    """Ridge least squares from moments: `A = (Σ_ss + λI)⁻¹ Σ_st`, `c = μ_t − μ_s A`; in the cheap
    forms the minimum of the same sum, penalty included, among the maps of the form.

    Args:
        kind: one of `KINDS`; the moments must have been summed for it, or for "all_previous".
        ridge: λ relative to the mean eigenvalue of the sources' covariance (each layer divided by
            its RMS).
        form: one of `FORMS`. rank: r of "low_rank", at most D.

    Raises:
        ValueError: unknown kind or form, negative ridge, no tokens, or a singular system at ridge
            0.
    """
    _check_kind(kind)
    check_form(kind, form, rank)
    if ridge < 0:
        raise ValueError(f"affine fit: ridge={ridge}, expected ≥ 0")
    if kind == "none":
        return AffinePredictor(kind)
    moments._require_tokens(2)
    scale = moments.scale()
    D = len(moments.sums[0])
    if rank is not None and rank > D:
        raise ValueError(f"affine fit: rank={rank} exceeds the width {D} of the activations")
    maps, offsets = [], []
    for target in range(1, len(scale)):
        sources = sources_of(kind, target)
        means = [moments.mean(j) for j in sources]
        if kind == "identity":
            parts: tuple[Tensor, ...] = (torch.eye(D, dtype=torch.float64),)
        else:
            units = [scale[target] / scale[j] for j in sources]
            fitted = _solve(moments, sources, target, scale, ridge, form, rank)
            parts = _times_per_source(form, fitted, units)
        moved = torch.cat(means) @ parts[0] if form == "full" else _moved(parts, means)
        maps.append(tuple(part.to(dtype) for part in parts))
        offsets.append((moments.mean(target) - moved).to(dtype))
    return AffinePredictor(kind, maps, offsets, form=form)


def _solve(
    moments: Moments,
    sources: range,
    target: int,
    scale: Sequence[float],
    ridge: float,
    form: str,
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

    if form == "full":
        return (solve(gram, cross),)
    # The diagonals of the blocks: [D, s, s] and [D, s, 1].
    grams = gram.view(s, D, s, D).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    crosses = cross.view(s, D, D).diagonal(dim1=1, dim2=2).T.unsqueeze(-1)
    if form == "diagonal":
        return (solve(grams, crosses).squeeze(-1).T.contiguous(),)
    alpha = solve(grams.sum(0), crosses.sum(0)).view(s)
    if form == "scalar":
        return (alpha,)
    assert rank is not None  # check_form
    B = solve(gram, cross)
    B.view(s, D, D).diagonal(dim1=1, dim2=2).sub_(alpha.unsqueeze(1))
    V = torch.linalg.eigh(B.T @ gram @ B).eigenvectors[:, D - rank :]
    return B @ V, V.T.contiguous(), alpha


def routing_shares(predictor: AffinePredictor, moments: Moments) -> list[list[float]]:
    """Of each prediction (layers 1 … L−1) the share of every source, `E‖(x_j − μ_j) A_lj‖²` over
    its sum over j: what a LIMe router's heat map shows (arXiv 2502.09245). Sources are correlated,
    so that a share is not a share of the explained variance."""
    shares = []
    for layer, A in enumerate(predictor.A, start=1):
        sources = sources_of(predictor.kind, layer)
        if len(sources) == 1:
            shares.append([1.0])
            continue
        blocks = A.double().cpu().split(A.shape[1])
        energy = [
            float(((moments.covariance(j, j) @ block) * block).sum())
            for j, block in zip(sources, blocks, strict=True)
        ]
        shares.append([e / max(sum(energy), 1e-300) for e in energy])
    return shares


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
