"""Scores of latents on labelled documents, with intervals: the rows of probe.json.

A score is a mean over the classes of one dataset. Its interval is of the test documents, which are
drawn again with replacement, the same ones for every method; fitted probes stay as they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from resae.choices import Choice
from resae.evaluation.intervals import Bootstrap, Quantity, interval
from resae.evaluation.pooling import CodeSource, Pooled, PooledDocuments

ALL_LAYERS = "all layers"
CHANNELS = "channels"
"""Method name of the model's own channels."""
RESAMPLES = 2_000


class Measure(Choice):
    """Scores of latents on labelled documents."""

    PROBING = "probing"
    TPP = "tpp"
    SCR = "scr"


class Units(NamedTuple):
    """Latents or channels to score."""

    method: str
    loop: str | None
    layer: str
    pooled: Pooled
    active: float | None


@dataclass(frozen=True)
class Score:
    """One score of one method."""

    measure: Measure
    method: str
    loop: str | None
    layer: str
    units: int
    active: float | None
    size: int | None
    quantity: Quantity
    classes: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Scores with the same key are compared between methods."""
        return self.measure, self.layer, self.size


@dataclass(frozen=True)
class ScoreRow:
    """One score of one method, and its difference from the first method."""

    data: str
    """Labelled dataset; `mean` over several."""
    measure: str
    """`probing`: accuracy of sparse probes; `tpp`: targeted probe perturbation; `scr`: spurious
    correlation removal."""
    method: str
    """Name of the method; `channels`: the residual stream itself."""
    loop: str | None
    """`open` or `closed`; None where both agree."""
    layer: str
    """Hook point, or `all layers`: their latents side by side."""
    units: int
    """Number of latents or channels to choose from."""
    active: float | None
    """Active latents per token; None for channels."""
    size: int | None
    """Units that a probe uses (probing) or that are ablated (tpp, scr); None: all of them."""
    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Its upper end."""
    difference: float | None
    """From the first method with the same measure, layer and size, paired; None: this is it."""
    difference_low: float | None
    difference_high: float | None
    classes: dict[str, float]
    """Score of each class; of `scr`, of each pair of attributes that go together."""
    parts: dict[str, float]
    """Parts of `tpp`: drop of the intended probe, mean drop of the others."""


def score_rows(data: str, scores: Sequence[Score]) -> list[ScoreRow]:
    """Rows of the scores of one dataset; differences are from the first score with the same key."""
    first: dict[tuple[str, str, int | None], Score] = {}
    rows: list[ScoreRow] = []
    for score in scores:
        compared = first.setdefault(score.key, score)
        value = interval(score.quantity)
        apart = None if compared is score else interval(score.quantity - compared.quantity)
        rows.append(
            ScoreRow(
                data,
                str(score.measure),
                score.method,
                score.loop,
                score.layer,
                score.units,
                score.active,
                score.size,
                *value,
                *(apart or (None, None, None)),
                score.classes,
                score.parts,
            )
        )
    return rows


def mean_scores(of_datasets: Sequence[Sequence[Score]]) -> list[Score]:
    """Scores averaged over datasets, each with resamples of its own documents; those that not every
    dataset has are left out."""
    found: dict[tuple[object, ...], list[Score]] = {}
    for scores in of_datasets:
        for score in scores:
            found.setdefault((score.method, score.loop, *score.key), []).append(score)
    return [
        Score(
            **vars(group[0])
            | {
                "quantity": np.mean([score.quantity for score in group], axis=0),
                "classes": {},
                "parts": {},
            }
        )
        for group in found.values()
        if len(group) == len(of_datasets)
    ]


def units_of(
    sources: Sequence[CodeSource], pooled: PooledDocuments, names: Sequence[str]
) -> Iterable[Units]:
    """Latents of every source, then the channels: layer by layer, then all layers together."""
    for source, codes, active in zip(sources, pooled.codes, pooled.active, strict=True):
        yield from _layers(source.method.name, source.loop_name, names, codes, active)
    yield from _layers(CHANNELS, None, names, pooled.channels, None)


def _layers(
    method: str,
    loop: str | None,
    names: Sequence[str],
    pooled: Sequence[Pooled],
    active: Sequence[float] | None,
) -> Iterable[Units]:
    of_layers: Sequence[float | None] = active or [None] * len(names)
    for name, layer, mean in zip(names, pooled, of_layers, strict=True):
        yield Units(method, loop, name, layer, mean)
    if len(names) > 1:
        joined = Pooled.join(pooled)
        yield Units(method, loop, ALL_LAYERS, joined, sum(active) if active else None)


class ScoredDocuments:
    """The test documents of one dataset, and resamples of them that all scores share. Each class is
    drawn again by itself, since tasks are balanced by class.

    Args:
        labels: class of each test document.
        first: number of the first of them among all documents.
        seed: of the resamples; one for each dataset.
    """

    def __init__(
        self, labels: Sequence[str], *, first: int, seed: int = 0, resamples: int = RESAMPLES
    ):
        self._first = first
        self._size = len(labels)
        self._bootstrap = Bootstrap(len(labels), resamples=resamples, seed=seed, strata=labels)

    def accuracy(self, documents: Tensor, right: Tensor) -> Quantity:
        """Accuracy of S probes on the documents of these numbers `[m]`, as S quantities
        `[S, 1 + R]`; `right [S, m]` bool."""
        columns = np.zeros((self._size, len(right) + 1))
        place = (documents - self._first).numpy()
        columns[place, :-1] = right.double().T.numpy()
        columns[place, -1] = 1
        totals = self._bootstrap.total(columns).T
        return totals[:-1] / totals[-1]
