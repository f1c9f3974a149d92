"""Affine maps between selected layers: x_l ≈ Σ_{sources j} x_j A_lj + c_l.

    none          nothing is predicted: every layer has an ordinary SAE
    identity      x_l ≈ x_{l-1} + c_l, c_l the mean difference
    previous      x_l ≈ x_{l-1} A_l + c_l                              ReSAE, arXiv 2605.27819
    all_previous  x_l ≈ Σ_{j<l} x_j A_lj + c_l                         after LIMe, arXiv 2502.09245

The maps of the last two have a type: `full`, `scalar` α_lj·I, `diagonal`, or `low_rank`
skip_lj·I + U V (the skip, because a residual stream mostly stays the same from layer to layer).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from resae.choices import MapType, PredictorKind
from resae.storage import load_tensors, save_tensors
from resae_kernels.types import accumulation_dtype

MAP_TENSORS: dict[str, tuple[str, ...]] = {
    MapType.FULL: ("A",),
    MapType.SCALAR: ("alpha",),
    MapType.DIAGONAL: ("diagonal",),
    MapType.LOW_RANK: ("U", "V", "skip"),
}
"""Map type → names of the tensors that one map of it has."""


def sources_of(kind: str, layer: int) -> range:
    """Positions of the layers that predict layer `layer` of the selection."""
    if layer == 0 or kind == "none":
        return range(0)
    return range(0 if kind == "all_previous" else layer - 1, layer)


def transport_rows(A: Sequence[Tensor], layer: int, rows: Tensor) -> list[Tensor | None]:
    """Directions `[b, D]` of one layer at every selected layer: themselves there, transported
    through the maps at later ones (`resae_kernels.transport`), None where no map leads.

    Args:
        A: per layer 1 … L−1 the maps `[s·D, D]` from the s layers before it; used in `rows`' dtype.
    """
    found: list[Tensor | None] = [None] * (len(A) + 1)
    found[layer] = rows
    for m in range(layer + 1, len(found)):
        sources = A[m - 1].to(rows).split(rows.shape[1])
        parts = zip(found[m - len(sources) : m], sources, strict=True)
        terms = [here @ source for here, source in parts if here is not None]
        found[m] = torch.stack(terms).sum(0) if terms else None
    return found


class AffinePredictor(nn.Module):
    """The affine maps of a stack. `A[l-1] [s·D, D]`, `c[l-1] [D]` predict layer l.

    Sources are stacked in layer order, the most recent last (`reference.affine_predict`). For kind
    "none" there are no maps; "identity" holds `A = I` so that every kind runs the same code.

    Args:
        A: per map the tensors of its type (`MAP_TENSORS`): `A [s·D, D]`, `alpha [s]`,
            `diagonal [s, D]`, or `U [s·D, r]`, `V [r, D]`, `skip [s]`.
    """

    def __init__(
        self,
        kind: str,
        A: Sequence[Tensor | tuple[Tensor, ...]] = (),
        c: Sequence[Tensor] = (),
        *,
        map_type: str = "full",
    ):
        super().__init__()
        PredictorKind.check(kind, "AffinePredictor: kind")
        self.kind = kind
        self.map_type = map_type
        self.n_maps = len(A)
        for layer, (A_l, c_l) in enumerate(zip(A, c, strict=True), start=1):
            parts = A_l if isinstance(A_l, tuple) else (A_l,)
            for name, part in zip(MAP_TENSORS[map_type], parts, strict=True):
                self.register_buffer(f"{name}_{layer}", part)
            self.register_buffer(f"c_{layer}", c_l)

    @property
    def A(self) -> list[Tensor]:
        """Dense maps `[s·D, D]`; made on each call unless the map type is "full"."""
        return [self._dense(layer) for layer in range(1, self.n_maps + 1)]

    @property
    def c(self) -> list[Tensor]:
        return [self.get_buffer(f"c_{layer}") for layer in range(1, self.n_maps + 1)]

    @property
    def rank(self) -> int | None:
        """r of map type "low_rank"."""
        return self._parts(1)[1].shape[0] if self.map_type == "low_rank" else None

    def _parts(self, layer: int) -> tuple[Tensor, ...]:
        # Not by get_buffer, which takes as long as a prediction for one token.
        return tuple(getattr(self, f"{name}_{layer}") for name in MAP_TENSORS[self.map_type])

    def _dense(self, layer: int) -> Tensor:
        parts = self._parts(layer)
        if self.map_type == "full":
            return parts[0]
        rows = parts[-1].reshape(len(parts[-1]), -1).expand(-1, len(self.c[layer - 1]))
        dense = torch.cat([torch.diag(row) for row in rows])
        return dense + parts[0] @ parts[1] if self.map_type == "low_rank" else dense

    def forward(self, layer: int, previous: Sequence[Tensor]) -> Tensor | None:
        """The prediction of selected layer `layer` from the layers before it, each `[..., D]`, in
        the maps' dtype.

        Without dense products where the map type is cheaper: s·D multiplications per token, for
        low rank (s + 1)·r·D more, instead of s·D².

        None where nothing is predicted: the first layer, and every layer of kind "none".
        """
        if layer == 0 or self.kind == "none":
            return None
        parts, c = self._parts(layer), getattr(self, f"c_{layer}")
        if self.map_type != "full":
            sources = [previous[j] for j in sources_of(self.kind, layer)]
            return (apply_map(parts, sources) + c.to(accumulation_dtype(c.dtype))).to(c.dtype)
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
        if self.map_type != "full":
            return None
        A, c = getattr(self, f"A_{layer}"), getattr(self, f"c_{layer}")
        return None if len(A) != len(c) else (A, c)

    def rescaled(self, factors: Sequence[float]) -> "AffinePredictor":
        """The same maps for activations multiplied by `factors`, one per layer."""
        A, c = [], []
        for layer in range(1, self.n_maps + 1):
            per_source = [factors[layer] / factors[j] for j in sources_of(self.kind, layer)]
            A.append(times_per_source(self.map_type, self._parts(layer), per_source))
            c.append(self.get_buffer(f"c_{layer}") * factors[layer])
        return AffinePredictor(self.kind, A, c, map_type=self.map_type)

    def tensors(self) -> dict[str, Tensor]:
        """`A.1`, `c.1`, …: the maps by the names they have in files."""
        layers = range(1, self.n_maps + 1)
        names = (*MAP_TENSORS[self.map_type], "c")
        return {f"{name}.{i}": self.get_buffer(f"{name}_{i}") for name in names for i in layers}

    def save(self, path: Path) -> None:
        save_tensors(path, self.tensors() or {"none": torch.zeros(0)})

    @classmethod
    def load(cls, path: Path, kind: str) -> "AffinePredictor":
        """Read what `save` wrote; the names of the tensors give the map type.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, or holds other maps than those of `kind`.
        """
        tensors = load_tensors(path, "affine maps")
        map_type = next(
            (f for f, names in MAP_TENSORS.items() if f"{names[0]}.1" in tensors), "full"
        )
        layers = range(1, 1 + sum(name.startswith("c.") for name in tensors))
        _require_maps(tensors, kind, map_type, layers, f"affine maps: {path}")
        maps = [tuple(tensors[f"{name}.{i}"] for name in MAP_TENSORS[map_type]) for i in layers]
        return cls(kind, maps, [tensors[f"c.{i}"] for i in layers], map_type=map_type)


def _require_maps(
    tensors: Mapping[str, Tensor], kind: str, map_type: str, layers: Sequence[int], what: str
) -> None:
    """Raise ValueError unless these are the maps of `layers`, of one width and floating type."""
    PredictorKind.check(kind, f"{what}: predictor")
    names = (*MAP_TENSORS[map_type], "c")
    first = tensors.get("c.1", torch.zeros(1))
    D = first.shape[0] if first.ndim == 1 else -1
    U = tensors.get("U.1")
    r = U.shape[1] if map_type == "low_rank" and U is not None and U.ndim == 2 else -1
    for i in layers:
        s = len(sources_of(kind, i))
        shapes = {"A": (s * D, D), "alpha": (s,), "diagonal": (s, D), "skip": (s,)} | {
            "U": (s * D, r),
            "V": (r, D),
            "c": (D,),
        }
        for name in names:
            found = tensors.get(f"{name}.{i}")
            if found is None or found.shape != shapes[name] or found.dtype != first.dtype:
                got = "none" if found is None else f"{list(found.shape)} of {found.dtype}"
                raise ValueError(
                    f"{what} does not hold the maps of predictor {kind!r}, {map_type}: {name}.{i} "
                    f"is {got}, expected {list(shapes[name])} of {first.dtype}; restore the file"
                )
    if not first.is_floating_point() or (kind == "none" and layers):
        raise ValueError(
            f"{what} holds {len(layers)} maps of {first.dtype}, expected "
            f"{'none' if kind == 'none' else 'floating point'}; restore the file"
        )


def apply_map(parts: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """`Σ_j x_j A_j` of sources `[..., D]` for a map type that is not full."""
    *low_rank, factors = (part.to(accumulation_dtype(part.dtype)) for part in parts)
    wide = [x.to(factors.dtype) for x in sources]
    mapped = wide[0] * factors[0]  # factors: [s] or [s, D]
    for x, factor in zip(wide[1:], factors[1:], strict=True):
        mapped = mapped + x * factor
    if low_rank:
        U, V = low_rank
        mapped = mapped + torch.cat(wide, dim=-1) @ U @ V
    return mapped


def times_per_source(
    map_type: str, parts: Sequence[Tensor], factors: Sequence[float]
) -> tuple[Tensor, ...]:
    """A map times one factor per source. The rows of every part but V belong to one source after
    the other."""
    scaled = []
    for name, part in zip(MAP_TENSORS[map_type], parts, strict=True):
        if name != "V":
            rows = torch.tensor(factors, dtype=torch.float64)
            rows = rows.repeat_interleave(len(part) // len(factors)).to(part)
            part = part * rows.reshape(-1, *[1] * (part.ndim - 1))
        scaled.append(part)
    return tuple(scaled)
