"""Measured before the first step: affine maps, scales and means."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resae.stack.affine import AffinePredictor
from resae.stack.fit import Moments, fit_predictor
from resae.stack.stack import ReSAE
from resae.storage import load_tensors, save_tensors


class Calibration(NamedTuple):
    """Maps, scales and means fixed before training, in raw units of the activations."""

    predictor: AffinePredictor
    scale: list[float]
    """RMS of each layer."""
    mean: list[Tensor]
    """L × `[D]`."""

    def save(self, path: Path) -> None:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        fixed = {"scale": scale, "mean": torch.stack(self.mean)}
        save_tensors(path, self.predictor.tensors() | fixed)

    @classmethod
    def load(cls, path: Path, kind: str) -> "Calibration":
        tensors = load_tensors(path, "calibration")
        return cls(
            AffinePredictor.load(path, kind), tensors["scale"].tolist(), list(tensors["mean"])
        )


def calibrate(
    kind: str, moments: Moments, *, ridge: float, map_type: str = "full", rank: int | None = None
) -> Calibration:
    """Maps, scales and means from the moments of the calibration tokens."""
    return Calibration(
        fit_predictor(kind, moments, ridge=ridge, map_type=map_type, rank=rank),
        moments.scale(),
        [moments.mean(layer).float() for layer in range(len(moments.sums))],
    )


def boost_calibration(base_stack: ReSAE, moments: Moments) -> Calibration:
    """Calibration for boosting a stack: its own maps, and scales rounded to powers of two, which
    bring its weights into units of training and back without changing a bit."""
    return Calibration(
        base_stack.predictor,
        [2.0 ** round(math.log2(s)) for s in moments.scale()],
        [moments.mean(layer).float() for layer in range(len(moments.sums))],
    )


def sum_moments(
    kind: str, batches: Iterable[Sequence[Tensor]], *, tokens: int, d_in: int, n_layers: int
) -> Moments:
    """Moments of the first `tokens` tokens of `batches` of L activations `[N, D]`."""
    moments = Moments(n_layers, d_in, kind)
    for xs in batches:
        left = tokens - moments.count
        moments.add([x[:left] for x in xs])
        if moments.count >= tokens:
            break
    return moments
