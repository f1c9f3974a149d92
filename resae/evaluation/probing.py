"""Sparse probing: how well a few latents tell the class of a document (SAEBench's protocol).

One task per class, this class against the others in equal numbers. On the training documents the k
units with the largest |mean of the class − mean of the others| are chosen, and a logistic
regression is fitted on these k; its accuracy on test documents is averaged over classes. Units are
the latents of one layer, those of all layers of a stack together, or the channels of the residual
stream. Among all layers this choice prefers those whose stream is longer: means are not scaled.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resae.data.labelled import LabelledTexts
from resae.evaluation.linear_probes import fit_probe
from resae.evaluation.pooling import Pooled
from resae.evaluation.scores import Measure, Score, ScoredDocuments, Units


class Task(NamedTuple):
    """Documents of two kinds to tell apart, by their numbers among the pooled ones."""

    name: str
    train: Tensor
    """`[n]` int64."""
    train_positive: Tensor
    """`[n]` bool."""
    test: Tensor
    """`[m]` int64."""
    test_positive: Tensor
    """`[m]` bool."""

    def difference(self, pooled: Pooled) -> Tensor:
        """`[M]` float64: mean of the positive − mean of the other training documents."""
        positive = self.train_positive.double()
        weights = torch.zeros(pooled.shape[0], dtype=torch.float64)
        weights[self.train] = positive / positive.sum() - (1 - positive) / (1 - positive).sum()
        return pooled.weighted_sum(weights)


def one_against_rest(texts: LabelledTexts, seed: int = 42) -> list[Task]:
    """A task per class. Documents are numbered from the first of training to the last of testing;
    the others are drawn evenly from the other classes."""
    generator = torch.Generator().manual_seed(seed)
    n_train = len(texts.train.labels)
    tasks: list[Task] = []
    for name in texts.classes:
        train = _balanced(texts.train.labels, name, generator)
        test, test_positive = _balanced(texts.test.labels, name, generator)
        tasks.append(Task(name, *train, test + n_train, test_positive))
    return tasks


def sparse_probing(
    units: Iterable[Units],
    tasks: Sequence[Task],
    documents: ScoredDocuments,
    *,
    ks: Sequence[int] = (1, 2, 5),
    on_units: Callable[[int], None] | None = None,
) -> list[Score]:
    """Accuracy of probes on the k best units, and of channels on all of them.

    Args:
        units: latents and channels of the same documents.
        documents: the test documents.
        ks: numbers of units of a probe.
        on_units: called with the number of `units` done.
    """
    names = [task.name for task in tasks]
    scores: list[Score] = []
    for done, found in enumerate(units, start=1):
        sizes, right = probed(found, tasks, ks)
        accuracies = [
            documents.accuracy(task.test, of_task)
            for task, of_task in zip(tasks, right, strict=True)
        ]
        for i, size in enumerate(sizes):
            of_size = [accuracy[i] for accuracy in accuracies]
            scores.append(
                Score(
                    Measure.PROBING,
                    found.method,
                    found.loop,
                    found.layer,
                    found.pooled.shape[1],
                    found.active,
                    size,
                    np.mean(of_size, axis=0),
                    {name: float(a[0]) for name, a in zip(names, of_size, strict=True)},
                )
            )
        if on_units is not None:
            on_units(done)
    return scores


def probed(
    units: Units, tasks: Sequence[Task], ks: Sequence[int]
) -> tuple[list[int | None], list[Tensor]]:
    """Sizes of S probes, and per task `[S, m]` bool: the test documents that each puts on the right
    side. The last probe of channels has all of them, size None."""
    pooled = units.pooled
    ks = [k for k in ks if k <= pooled.shape[1]]
    dense = [pooled.dense()] if units.active is None else []
    right: list[Tensor] = []
    for task in tasks:
        x = pooled.columns(best_units(task, pooled, max(ks, default=0)))
        inputs = [*(x[:, :k] for k in ks), *dense]
        right.append(torch.stack([_right(task, part) for part in inputs]))
    return [*ks, *(None for _ in dense)], right


def best_units(task: Task, pooled: Pooled, k: int) -> Tensor:
    """`[k]` units whose means differ most between the two kinds of documents, the best first."""
    return task.difference(pooled).abs().topk(k).indices


def _right(task: Task, x: Tensor) -> Tensor:
    """`[m]` bool: test documents on the right side of a probe of `x [n, p]` that is fitted on
    training documents."""
    probe = fit_probe(x[task.train], task.train_positive)
    return (probe.logits(x[task.test]) > 0) == task.test_positive


def _balanced(
    labels: Sequence[str], name: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Documents of a class and as many others; where there are fewer others, fewer of both."""
    numbers = {
        label: torch.tensor([i for i, other in enumerate(labels) if other == label])
        for label in sorted(set(labels))
    }
    own = numbers.pop(name)
    each = -(-len(own) // len(numbers))
    others = torch.cat([_drawn(group, each, generator) for group in numbers.values()])
    others = _drawn(others, len(own), generator)
    own = own[: len(others)]
    positive = torch.arange(len(own) + len(others)) < len(own)
    return torch.cat([own, others]), positive


def _drawn(numbers: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return numbers[torch.randperm(len(numbers), generator=generator)[:size]]
