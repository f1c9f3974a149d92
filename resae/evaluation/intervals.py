"""Intervals by the bootstrap: documents are drawn again with replacement.

A quantity is an array `[1 + R]`: its value on the documents as they are, then on R resamples. All
quantities of one `Bootstrap` have the same resamples, so that differences and ratios of them are
paired: what makes a document hard for every method cancels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
MOST_DRAWN = 10_000_000
"""Documents drawn in all resamples together, 80 MB: of more than 1,000 documents fewer resamples
are made, down to `FEWEST_RESAMPLES`."""
FEWEST_RESAMPLES = 1_000
LEVEL = 0.95
Quantity = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Bootstrap:
    """Resamples of `documents` documents.

    Args:
        resamples: None: as many as `MOST_DRAWN` allows.
        strata: stratum of each document; of every stratum as many are drawn as there are. None: all
            documents are one.
    """

    def __init__(
        self,
        documents: int,
        *,
        resamples: int | None = None,
        seed: int = 0,
        strata: Sequence[str] | None = None,
    ):
        if resamples is None:
            resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_DRAWN // documents))
        self.documents = documents
        generator = np.random.default_rng(seed)
        self._times = np.ones((1 + resamples, documents))
        held = np.asarray([""] * documents if strata is None else strata)
        for stratum in np.unique(held):
            members = np.flatnonzero(held == stratum)
            even = [1 / len(members)] * len(members)
            self._times[1:, members] = generator.multinomial(len(members), even, size=resamples)

    def total(self, sums: ArrayLike) -> Quantity:
        """Sum over documents of `sums [documents]`; of S columns `[documents, S]`, which are read
        once for all, `[1 + R, S]`."""
        return self._times @ np.asarray(sums, np.float64)

    def per_token(self, sums: ArrayLike, tokens: Sequence[int] | ArrayLike) -> Quantity:
        """Mean per token of what was summed over the tokens of each document."""
        return divided(self.total(sums), self.total(tokens))

    def columns(self, name: str, quantity: Quantity | None) -> dict[str, float | None]:
        """Columns `name`, `name_low` and `name_high` of a result row. The bounds are None where
        there is no interval: of a single document, or of a ratio that some resample does not
        define."""
        if quantity is None:
            return {name: None, f"{name}_low": None, f"{name}_high": None}
        low = high = None
        if self.documents > 1 and np.isfinite(quantity).all():
            _, low, high = interval(quantity)
        return {name: float(quantity[0]), f"{name}_low": low, f"{name}_high": high}


def divided(numerator: Quantity, denominator: Quantity) -> Quantity:
    """The ratio of two quantities; resamples in which the denominator is 0 are infinite or NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerator / denominator


def interval(quantity: Quantity) -> Interval:
    """Value and percentile interval of a quantity `[1 + R]`."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(quantity[1:], [tail, 1 - tail])
    return Interval(float(quantity[0]), float(low), float(high))
