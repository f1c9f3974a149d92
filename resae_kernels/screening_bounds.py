"""Constants and bounds of screening, for all its implementations (mathematics: `screened.py`)."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FAILURE = 1e-12
"""Probability, over the dither, that the statistical margin misses a latent of a given row."""
ROUNDING = 2.0**-20
"""Bound on the rounding of float32 sums, relative to the norms or the bias that go into them, with
room to spare."""
STEPS = 126
"""Quantisation steps on either side of zero; one less than int8 has, for the dither."""
SAMPLES = 128
"""Entries of the weight that are compared at each call, to notice writes that torch does not count:
one each of this many rows, evenly spaced. Each lies in memory by itself, so that more of them would
cost as much time as screening saves."""
LANES = 32
"""Latents are padded to a multiple of this in the 8-bit copy."""


class StaleCopyError(Exception):
    """An exact score lies outside its bounds: the copy is of another weight."""


class ScreenedRows(NamedTuple):
    """Codes of N rows."""

    acts: Tensor
    """`[N, k]`"""
    indices: Tensor
    """`[N, k]` int64"""
    rows_left: Tensor | None
    """`[n]` int64: rows without a code here, left to the exact path; None if there are none."""
    candidates: int | Tensor
    """(Row, latent) pairs that were scored exactly. Triton, which never waits for the device: of
    each row, `[N]` int32; negative where the row took the exact path."""
    n_active: Tensor | None = None
    """`[N]` int32: latents above their thresholds; None: there were no thresholds."""


class ScreeningCopy(Protocol):
    """An 8-bit copy of one weight, and screening with it."""

    def encode(
        self,
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        threshold: Tensor | None = None,
    ) -> ScreenedRows:
        """Codes of `x − prediction − pre_bias`, `[N, D]`; with `threshold [M]` of the latents above
        it.

        Raises:
            StaleCopyError: the weight has changed since the copy was made.
        """
        ...


class Bounds(NamedTuple):
    """λ of every latent, up to factors of each row: `factors @ terms`."""

    terms: Tensor
    """`[1, M']` statistical, `[2, M']` certain: of the weight's error and of its copy's norm."""
    ratio: float
    """Statistical: the weight's steps over its norms, of the median latent; certain: 0."""


def draw_dither(seed: int, D: int) -> tuple[Tensor, Tensor]:
    """Dither of the residual, u on [0, 1), and of the weight, v − ½ on [−½, ½): `[D]` float32."""
    generator = torch.Generator("cpu").manual_seed(seed)
    dither, weight_dither = torch.rand(2, D, generator=generator, dtype=torch.float32)
    return dither, weight_dither - 0.5


def certain_bounds(error: Tensor, norm: Tensor, D: int) -> Bounds:
    """Bounds from ‖w − ŵ‖ and ‖ŵ‖ `[M']`, widened by the largest rounding error of float32 sums of
    D terms."""
    return Bounds(torch.stack([error, norm]) * (1 + D * 2.0**-22), 0.0)


def statistical_bounds(steps: Tensor, size: Tensor, M: int, D: int) -> Bounds:
    """Bounds from the steps s and norms ‖w‖ `[M']` of the weight.

    λ² = c² (s² ‖r‖² + t² ‖ŵ‖²) ≤ c² h² (ratio² ‖r‖² + t²), with ‖ŵ‖ bounded for every dither of the
    weight; widened by the largest rounding error of float32 sums of D terms.
    """
    ratio = float((steps / size.clamp_min(1e-30))[:M].median())
    h = torch.maximum(size + steps * (math.sqrt(D) / 2), steps / ratio)
    widened = 1.01 + D**1.5 * 2.0**-25
    return Bounds(h.unsqueeze(0) * (widened * math.sqrt(math.log(2 * M / FAILURE) / 6)), ratio)
