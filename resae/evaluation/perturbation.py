"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR), after SAEBench.

Linear probes read the mean activation of a document. Latents are set to 0 at every token and what
the autoencoder did not reconstruct is kept, so that the stream loses Σ_i z_i d_i, d_i the direction
of latent i; the probes stay as they are. Mean and probe are linear: the logit of a document falls
by Σ_i z̄_i ⟨w, d_i⟩, z̄ the mean of its codes, and no second pass is needed. For one layer d_i is
its row of `W_dec`. For all layers of a stack with maps it is the row transported to the last layer,
whose reconstruction all codes are part of; without maps that is made of the last layer's alone.

TPP  ablating the latents of class i should cost its own probe accuracy, and no other probe:
     (a_i − a_i after) − mean over j ≠ i of (a_j − a_j after), averaged over classes i.
SCR  a probe is fitted where two attributes go together, such as code of one project against prose
     of another. Ablating the latents of one attribute should leave a probe of the other:
     (a after − a) / (a of a probe without the bias − a), in the direction in which the biased probe
     is worse.

The latents of a class are those with the largest effect on its probe, (mean of the class − mean of
the others) ⟨w, d_i⟩: for TPP with the first factor at least 0, for SCR by its absolute value.
Latents whose effect is not above 0 are never ablated.

SAEBench's probes are trained by 20 epochs of AdamW with an L1 penalty, these are logistic
regressions (`linear_probes`): numbers of the two are close and not equal.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resae.evaluation.intervals import Quantity
from resae.evaluation.linear_probes import fit_probe
from resae.evaluation.pooling import CodeSource, Pooled, PooledDocuments
from resae.evaluation.probing import Task
from resae.evaluation.scores import ALL_LAYERS, Measure, Score, ScoredDocuments, Units
from resae.stack.stack import ReSAE

SIZES = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of latents that are ablated."""
MOST_TRANSPORTED_BYTES = 1 << 32
"""Size of transported dictionaries above which all layers together are left out."""
LEAST_GAP = 1e-3
"""Gap between the accuracies of a clean and a biased probe below which SCR is 0."""


class Ablated(NamedTuple):
    """Latents that can be ablated, and the stream that they are part of."""

    units: Units
    directions: Tensor
    """`[M, D]`: change of the stream by one unit of each latent."""
    stream: int
    """Layer of the stream, by its position among the selected ones."""


def ablated_latents(
    sources: Sequence[CodeSource], pooled: PooledDocuments, names: Sequence[str]
) -> Iterator[Ablated]:
    """Latents of every source: layer by layer, then of all layers together; not together of boosted
    stacks with maps, and of those whose transported dictionaries would be too large."""
    for source, codes, active in zip(sources, pooled.codes, pooled.active, strict=True):
        stack, method, loop = source.stack, source.method.name, source.loop_name
        for i, name in enumerate(names):
            units = Units(method, loop, name, codes[i], active[i])
            yield Ablated(units, stack.sae(i).W_dec.detach(), i)
        directions = _in_last_layer(stack)
        if directions is not None and len(names) > 1:
            units = Units(method, loop, ALL_LAYERS, Pooled.join(codes), sum(active))
            yield Ablated(units, directions, len(names) - 1)


def _in_last_layer(stack: ReSAE) -> Tensor | None:
    """`[ΣM, D]`: change of the last layer's reconstruction by the latents of all layers."""
    if stack.chained:
        transported = stack.transported(MOST_TRANSPORTED_BYTES)
        return None if transported is None else torch.cat(transported.dictionaries[-1])
    *before, last = (stack.sae(i).W_dec.detach() for i in range(stack.n_layers))
    return torch.cat([*map(torch.zeros_like, before), last])


class LayerProbes(NamedTuple):
    """Probes of one layer's stream, one per task, and their logits."""

    weights: Tensor
    """`[D, C]` float64."""
    logits: Tensor
    """`[n, C]` of all documents, nothing ablated."""

    @classmethod
    def fitted(cls, stream: Pooled, tasks: Sequence[Task]) -> "LayerProbes":
        x = stream.dense()
        probes = [fit_probe(x[task.train], task.train_positive) for task in tasks]
        return cls(
            torch.stack([probe.weight for probe in probes], 1),
            torch.stack([probe.logits(x) for probe in probes], 1),
        )


class _Ablations:
    """Logits of probes after the N strongest latents of a task were ablated."""

    def __init__(self, ablated: Ablated, probes: LayerProbes):
        self.pooled = ablated.units.pooled
        self.probes = probes
        self.on_logits = ablated.directions.cpu().double() @ probes.weights
        """`[M, C]`: logit of each probe per unit of each latent."""

    def strongest(self, task: Task, probe: int, most: int, *, signed: bool) -> Tensor:
        """At most `most` latents with the largest effect on a probe, the strongest first."""
        difference = task.difference(self.pooled)
        if signed:
            difference = difference.clamp_min(0)
        effects = difference * self.on_logits[:, probe]
        effects = effects if signed else effects.abs()
        effects, latents = effects.topk(min(most, len(effects)))
        return latents[effects > 0]

    def logits(
        self, latents: Tensor, probe: int, documents: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """`[S, m]`: the logits of a probe on documents `[m]` without the first `size` latents, for
        each of S sizes."""
        clean = self.probes.logits[documents, probe]
        shares = self.pooled.columns(latents)[documents] * self.on_logits[latents, probe]
        lost = torch.cat([torch.zeros(len(documents), 1).double(), shares.cumsum(1)], 1)
        return clean - lost[:, [min(size, len(latents)) for size in sizes]].T


def probe_perturbation(
    ablated: Iterable[Ablated],
    channels: Sequence[Pooled],
    tasks: Sequence[Task],
    documents: ScoredDocuments,
    *,
    sizes: Sequence[int] = SIZES,
    on_units: Callable[[int], None] | None = None,
) -> list[Score]:
    """TPP of every set of latents.

    Args:
        channels: means of the streams of all layers, over the same documents.
        tasks: one per class (`one_against_rest`).
        documents: the test documents.
        sizes: numbers of latents that are ablated.
        on_units: called with the number of `ablated` done.
    """
    probes = _probes_of(channels, tasks)
    clean = [
        [
            documents.accuracy(task.test, _right(of_layer.logits[task.test, j], task))
            for j, task in enumerate(tasks)
        ]
        for of_layer in probes
    ]
    names = [task.name for task in tasks]
    scores: list[Score] = []
    for done, found in enumerate(ablated, start=1):
        ablations = _Ablations(found, probes[found.stream])
        before = clean[found.stream]
        intended: list[Quantity] = []
        unintended: list[Quantity] = []
        for i, task in enumerate(tasks):
            latents = ablations.strongest(task, i, max(sizes), signed=True)
            drops = [
                before[j]
                - documents.accuracy(
                    other.test, _right(ablations.logits(latents, j, other.test, sizes), other)
                )
                for j, other in enumerate(tasks)
            ]
            intended.append(drops[i])
            unintended.append(np.mean(drops[:i] + drops[i + 1 :], axis=0))
        for s, size in enumerate(sizes):
            values = [a[s] - b[s] for a, b in zip(intended, unintended, strict=True)]
            parts = {
                name: float(np.mean([part[s][0] for part in drops]))
                for name, drops in (("intended", intended), ("unintended", unintended))
            }
            scores.append(_score(Measure.TPP, found, size, names, values, parts))
        if on_units is not None:
            on_units(done)
    return scores


class BiasedTasks(NamedTuple):
    """Two attributes of documents, and a task in which they go together."""

    name: str
    first: Task
    """One attribute, the other in equal parts on both sides."""
    second: Task
    """The other attribute, the first in equal parts on both sides."""
    biased: Task
    """Both at once."""


def biased_tasks(
    train: Sequence[tuple[str, str] | None], test: Sequence[tuple[str, str] | None]
) -> list[BiasedTasks]:
    """Tasks for every pair of first attributes, which may go together with the second ones in two
    ways.

    Args:
        train, test: both attributes of every document, in the order of the pooled ones; None: not
            used. Of the second there are two values.

    Raises:
        ValueError: other than two values of the second attribute, or a combination without
            documents.
    """
    seconds = sorted({pair[1] for pair in train if pair is not None})
    firsts = sorted({pair[0] for pair in train if pair is not None})
    if len(seconds) != 2 or len(firsts) < 2:
        raise ValueError(
            f"scr: {len(firsts)} classes and {len(seconds)} values of the second attribute, "
            f"expected at least 2 and exactly 2; choose another attribute column, or leave scr out"
        )
    return [
        _biased(train, test, (a, b), pair)
        for a, b in combinations(firsts, 2)
        for pair in (seconds, seconds[::-1])
    ]


def _biased(
    train: Sequence[tuple[str, str] | None],
    test: Sequence[tuple[str, str] | None],
    firsts: tuple[str, str],
    seconds: Sequence[str],
) -> BiasedTasks:
    (a, b), (p, q) = firsts, seconds
    corners = [(a, p), (a, q), (b, p), (b, q)]
    of_train = {corner: _members(train, corner, 0) for corner in corners}
    of_test = {corner: _members(test, corner, len(train)) for corner in corners}
    for name, group in (("training", of_train), ("test", of_test)):
        few = min(corners, key=lambda corner: len(group[corner]))
        if len(group[few]) < 2:
            raise ValueError(
                f"scr: {len(group[few])} {name} documents with {few[0]!r} and {few[1]!r}, expected "
                f"at least 2; give more, or leave scr out"
            )
    # The biased task has two corners, the others four: all are of equal size.
    n = min(map(len, of_train.values())) // 2
    m = min(map(len, of_test.values()))

    def task(name: str, positive: Sequence[tuple[str, str]], negative: Sequence[tuple[str, str]]):
        each = 2 * n // len(positive)
        sides = [torch.cat([of_train[c][:each] for c in side]) for side in (positive, negative)]
        tests = [torch.cat([of_test[c][:m] for c in side]) for side in (positive, negative)]
        return Task(name, *_joined(sides), *_joined(tests))

    return BiasedTasks(
        f"{a}+{p} / {b}+{q}",
        task(f"{a} / {b}", corners[:2], corners[2:]),
        task(f"{p} / {q}", corners[::2], corners[1::2]),
        task("both", corners[:1], corners[3:]),
    )


def _members(
    pairs: Sequence[tuple[str, str] | None], wanted: tuple[str, str], first: int
) -> Tensor:
    return torch.tensor([first + i for i, pair in enumerate(pairs) if pair == wanted])


def _joined(sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    documents = torch.cat(list(sides))
    return documents, torch.arange(len(documents)) < len(sides[0])


def correlation_removal(
    ablated: Iterable[Ablated],
    channels: Sequence[Pooled],
    biased: Sequence[BiasedTasks],
    documents: ScoredDocuments,
    *,
    sizes: Sequence[int] = SIZES,
    on_units: Callable[[int], None] | None = None,
) -> list[Score]:
    """SCR of every set of latents; arguments as of `probe_perturbation`.

    Args:
        biased: from `biased_tasks`.
    """
    tasks = [task for b in biased for task in (b.first, b.second, b.biased)]
    probes = _probes_of(channels, tasks)
    scores: list[Score] = []
    for done, found in enumerate(ablated, start=1):
        ablations = _Ablations(found, probes[found.stream])
        values = [
            _removal(ablations, three, 3 * i, documents, sizes) for i, three in enumerate(biased)
        ]
        names = [three.name for three in biased]
        for s, size in enumerate(sizes):
            scores.append(_score(Measure.SCR, found, size, names, [v[s] for v in values], {}))
        if on_units is not None:
            on_units(done)
    return scores


def _removal(
    ablations: _Ablations,
    three: BiasedTasks,
    first_probe: int,
    documents: ScoredDocuments,
    sizes: Sequence[int],
) -> Quantity:
    """SCR for each of S sizes `[S, 1 + R]`, in the direction in which the biased probe is worse."""
    unbiased, biased = (three.first, three.second), first_probe + 2
    logits = ablations.probes.logits

    def accuracy(probe: int, task: Task) -> Quantity:
        return documents.accuracy(task.test, _right(logits[task.test, probe], task))

    kept, removed = sorted((0, 1), key=lambda i: float(accuracy(biased, unbiased[i])[0, 0]))
    task, spurious = unbiased[kept], unbiased[removed]
    before, clean = accuracy(biased, task), accuracy(first_probe + kept, task)
    gap = clean - before
    latents = ablations.strongest(spurious, first_probe + removed, max(sizes), signed=False)
    after = ablations.logits(latents, biased, task.test, sizes)
    gained = documents.accuracy(task.test, _right(after, task)) - before
    return np.where(gap < LEAST_GAP, 0.0, gained / np.maximum(gap, LEAST_GAP))


def _probes_of(channels: Sequence[Pooled], tasks: Sequence[Task]) -> list[LayerProbes]:
    return [LayerProbes.fitted(stream, tasks) for stream in channels]


def _right(logits: Tensor, task: Task) -> Tensor:
    """`[S, m]` bool: test documents of a task on the right side, by logits `[S, m]` or `[m]`."""
    return (logits.reshape(-1, len(task.test)) > 0) == task.test_positive


def _score(
    measure: Measure,
    found: Ablated,
    size: int,
    names: Sequence[str],
    values: Sequence[Quantity],
    parts: Mapping[str, float],
) -> Score:
    units = found.units
    return Score(
        measure,
        units.method,
        units.loop,
        units.layer,
        units.pooled.shape[1],
        units.active,
        size,
        np.mean(values, axis=0),
        {name: float(value[0]) for name, value in zip(names, values, strict=True)},
        dict(parts),
    )
