"""Measured before the first step: affine maps, scales and means."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resae.models.sinks import SinkRule
from resae.stack.affine import AffinePredictor
from resae.stack.fit import Moments, fit_predictor
from resae.stack.stack import ReSAE
from resae.storage import load_tensors, save_tensors
from resae.strict_json import brief


class Calibration(NamedTuple):
    """Maps, scales, means and sink tokens fixed before training, in raw units of the
    activations."""

    predictor: AffinePredictor
    scale: list[float]
    """RMS of each layer."""
    mean: list[Tensor]
    """L × `[D]`."""
    sinks: SinkRule | None = None
    """Rule of the tokens that were left out; None: none were."""

    def keeping_first(self) -> "Calibration":
        """The same with the scale of the first layer rounded to a power of two, which brings an
        autoencoder into units of training and back without changing a bit."""
        return self._replace(scale=[power_of_two(self.scale[0]), *self.scale[1:]])

    def save(self, path: Path) -> None:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        fixed = {"scale": scale, "mean": torch.stack(self.mean)}
        if self.sinks is not None:
            norms = torch.tensor(self.sinks.median_norms, dtype=torch.float64)
            factor = torch.tensor([self.sinks.factor], dtype=torch.float64)
            fixed |= {"median_norm": norms, "sink_factor": factor}
        save_tensors(path, self.predictor.tensors() | fixed)

    @classmethod
    def load(cls, path: Path, kind: str) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, or holds other maps than those of `kind`.
        """
        predictor, tensors = AffinePredictor.load(path, kind), load_tensors(path, "calibration")
        scale, mean = (tensors.get(name, torch.zeros(0)) for name in ("scale", "mean"))
        floating = scale.is_floating_point() and mean.is_floating_point()
        fits = floating and scale.ndim == 1 and mean.ndim == 2 and len(scale) == len(mean) > 0
        maps = 0 if kind == "none" else len(scale) - 1
        widths = {len(c) for c in predictor.c} | {mean.shape[-1]}
        if not fits or predictor.n_maps != maps or len(widths) > 1 or not bool((scale > 0).all()):
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(
                f"calibration: {path} does not hold scales above 0 and means of {kind!r} maps, but "
                f"{brief(found)}; fit the maps anew"
            )
        return cls(predictor, scale.tolist(), list(mean), _sinks_in(tensors, scale, path))


def _sinks_in(tensors: Mapping[str, Tensor], scale: Tensor, path: Path) -> SinkRule | None:
    """The rule of sink tokens; None in a file without."""
    norms, factor = tensors.get("median_norm"), tensors.get("sink_factor")
    if norms is None and factor is None:
        return None
    if (
        norms is None
        or factor is None
        or norms.shape != scale.shape
        or factor.shape != (1,)
        or not bool((torch.cat([norms, factor]) > 0).all())
    ):
        raise ValueError(
            f"calibration: {path} does not hold a median norm above 0 per layer and the factor of "
            f"sink tokens; fit the maps anew"
        )
    return SinkRule(tuple(norms.tolist()), float(factor))


def calibrate(
    kind: str,
    moments: Moments,
    *,
    ridge: float,
    map_type: str = "full",
    rank: int | None = None,
    sinks: SinkRule | None = None,
) -> Calibration:
    """Maps, scales and means from the moments of the calibration tokens, without those that are
    `sinks`."""
    return Calibration(
        fit_predictor(kind, moments, ridge=ridge, map_type=map_type, rank=rank),
        moments.scale(),
        [moments.mean(layer).float() for layer in range(moments.n_layers)],
        sinks,
    )


def boost_calibration(base_stack: ReSAE, moments: Moments) -> Calibration:
    """Calibration for boosting a stack: its own maps and rule of sinks, and scales rounded to
    powers of two, which bring its weights into units of training and back without changing a
    bit."""
    return Calibration(
        base_stack.predictor,
        [power_of_two(s) for s in moments.scale()],
        [moments.mean(layer).float() for layer in range(moments.n_layers)],
        base_stack.sinks,
    )


def power_of_two(scale: float) -> float:
    """The power of two nearest to a scale, by which weights are divided without changing a bit."""
    return 2.0 ** round(math.log2(scale))


Reconstruct = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""L activations `[N, D]` → L reconstructions of them."""


def sum_moments(
    kind: str,
    batches: Iterable[Sequence[Tensor]],
    *,
    tokens: int,
    d_in: int,
    n_layers: int,
    reconstruct: Reconstruct | None = None,
) -> Moments:
    """Moments of the first `tokens` tokens of `batches` of L activations `[N, D]`, and of their
    reconstructions, if maps shall take these."""
    moments = Moments(n_layers, d_in, kind, on_reconstructions=reconstruct is not None)
    for xs in batches:
        left = tokens - moments.count
        xs = [x[:left] for x in xs]
        moments.add(xs, reconstruct(xs) if reconstruct else ())
        if moments.count >= tokens:
            break
    return moments
