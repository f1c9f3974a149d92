"""TPP and SCR against latents that are ablated token by token, and scores written out."""

import numpy as np
import pytest
import tiny
import torch
from test_probing import sparse

from resae import Method
from resae.data.labelled import EMBEDDED_ATTRIBUTES, load_labelled
from resae.evaluation.linear_probes import fit_probe
from resae.evaluation.perturbation import (
    Ablated,
    ablated_latents,
    biased_tasks,
    correlation_removal,
    probe_perturbation,
)
from resae.evaluation.pooling import CodeSource, pool_documents
from resae.evaluation.probing import Task
from resae.evaluation.scores import ALL_LAYERS, ScoredDocuments, Units
from resae_kernels import SparseCode


@pytest.mark.parametrize("kind", ["none", "previous"])
def test_directions_are_what_the_stream_loses_by_an_ablation(kind):
    """The mean of decode(z without the latents) + error, document by document."""
    lm = tiny.pythia()
    stack = tiny.stack(lm, kind, k=4)
    method = Method(kind, stack, 4)
    sources = [CodeSource(method, loop) for loop in method.loops]
    ids = [[0, *row] for row in tiny.ids(3, 9).tolist()]
    pooled = pool_documents(lm, sources, ids)
    found = list(ablated_latents(sources, pooled, tiny.NAMES))
    assert len(found) == 4 * len(sources)
    points = lm.hook_points(tiny.LAYERS)
    gone = torch.zeros(192, dtype=torch.bool)
    gone[::3] = True
    for s, source in enumerate(sources):
        for document, row in enumerate(ids):
            captured = lm.capture(torch.tensor([row]), points)
            xs = [captured[point][0, 1:] for point in points]
            codes = source.stack.encode(xs, loop=source.loop or "open")
            x_hats = stack.decode(codes)
            for i, ablated in enumerate(found[4 * s : 4 * s + 4]):
                together = ablated.units.layer == ALL_LAYERS
                assert together == (i == 3)
                cut = [
                    SparseCode(
                        c.acts.masked_fill(gone[64 * m * together :][c.indices], 0), c.indices
                    )
                    if together or m == i
                    else c
                    for m, c in enumerate(codes)
                ]
                layer = ablated.stream
                after = stack.decode(cut)[layer] + xs[layer] - x_hats[layer]
                codes_here = ablated.units.pooled.dense()[document]
                mask = gone[: len(codes_here)]
                lost = (codes_here * mask) @ ablated.directions.double()
                expected = pooled.channels[layer].dense()[document] - lost
                torch.testing.assert_close(after.double().mean(0), expected, atol=1e-4, rtol=1e-4)
                assert lost.norm() > 0.1


C, M, D = 3, 30, 8


@pytest.fixture(scope="module")
def made():
    """Streams that are sums of latents; latent 10 c + i fires in class c."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(240) % C
    codes = torch.rand(240, M, generator=generator)
    codes *= torch.rand(240, M, generator=generator) < 0.2
    for c in range(C):
        own = torch.rand(240, 4, generator=generator) * (labels == c)[:, None]
        codes[:, 10 * c : 10 * c + 4] += own
    directions = torch.randn(M, D, generator=generator)
    stream = codes @ directions + 0.3 * torch.randn(240, D, generator=generator)
    tasks = []
    for c in range(C):
        numbers = torch.arange(240)
        train, test = numbers[:150], numbers[150:]
        tasks.append(Task(str(c), train, labels[train] == c, test, labels[test] == c))
    units = Units("raw", None, "layer", sparse(codes), 5.0)
    documents = ScoredDocuments([str(int(c)) for c in labels[150:]], first=150, resamples=50)
    return codes.double(), stream, tasks, Ablated(units, directions, 0), documents


def accuracy(probe, x, task):
    told = probe.logits(x[task.test].double()) > 0
    return float((told == task.test_positive).double().mean())


def strongest(task, codes, directions, probe, size, signed):
    train = codes[task.train]
    apart = train[task.train_positive].mean(0) - train[~task.train_positive].mean(0)
    on_logit = directions.double() @ probe.weight
    effects = apart.clamp_min(0) * on_logit if signed else (apart * on_logit).abs()
    order = effects.argsort(descending=True)[:size]
    return order[effects[order] > 0]


def without(stream, codes, directions, latents):
    return stream.double() - codes[:, latents] @ directions[latents].double()


def test_tpp_is_its_definition(made):
    codes, stream, tasks, ablated, documents = made
    sizes = (2, 5, 500)
    scores = probe_perturbation([ablated], [sparse(stream)], tasks, documents, sizes=sizes)
    x = stream.float().double()
    probes = [fit_probe(x[t.train], t.train_positive) for t in tasks]
    assert [score.size for score in scores] == list(sizes)
    for score in scores:
        expected = []
        for i, task in enumerate(tasks):
            latents = strongest(task, codes, ablated.directions, probes[i], score.size, True)
            assert score.size > 2 or set((latents // 10).tolist()) == {i}
            after = without(x, codes, ablated.directions, latents)
            drops = [
                accuracy(p, x, t) - accuracy(p, after, t)
                for p, t in zip(probes, tasks, strict=True)
            ]
            expected.append(drops[i] - np.mean([d for j, d in enumerate(drops) if j != i]))
        assert list(score.classes.values()) == pytest.approx(expected, abs=1e-9)
        assert score.quantity[0] == pytest.approx(np.mean(expected))
        assert score.parts["intended"] - score.parts["unintended"] == pytest.approx(
            score.quantity[0]
        )
    assert scores[1].quantity[0] > 0.05


def test_scr_is_its_definition(made):
    codes, stream, _, ablated, documents = made
    # First attribute: class 0 or others; second: a latent that nothing else has to do with.
    generator = torch.Generator().manual_seed(5)
    second = torch.rand(240, generator=generator) < 0.5
    codes = codes.clone()
    codes[:, 29] = second * 1.5
    directions = ablated.directions
    stream = (codes.float() @ directions).double()
    first = torch.arange(240) % C == 0
    pairs = [("ab"[int(f)], "pq"[int(s)]) for f, s in zip(first, second, strict=True)]
    biased = biased_tasks(pairs[:150], pairs[150:])
    assert [b.name for b in biased] == ["a+p / b+q", "a+q / b+p"]
    latents = Ablated(ablated.units._replace(pooled=sparse(codes.float())), directions, 0)
    scores = correlation_removal(
        [latents], [sparse(stream.float())], biased, documents, sizes=(1, 4)
    )
    x = stream.float().double()
    for score in scores:
        for b in biased:
            both = fit_probe(x[b.biased.train], b.biased.train_positive)
            task, spurious = sorted((b.first, b.second), key=lambda t: accuracy(both, x, t))
            before = accuracy(both, x, task)
            clean = accuracy(fit_probe(x[task.train], task.train_positive), x, task)
            removed = strongest(
                spurious,
                codes,
                directions,
                fit_probe(x[spurious.train], spurious.train_positive),
                score.size,
                False,
            )
            after = accuracy(both, without(x, codes, directions, removed), task)
            assert clean - before > 0.02
            assert score.classes[b.name] == pytest.approx((after - before) / (clean - before))


def test_biased_tasks_are_of_equal_size_and_their_corners_even():
    texts = load_labelled(train_documents=12, test_documents=6)
    biased = biased_tasks(texts.train.pairs, texts.test.pairs)
    assert [b.name for b in biased] == [
        "code+Python / prose+SQLite", "code+SQLite / prose+Python"
    ]  # fmt: skip
    labels = texts.train.labels + texts.test.labels
    for b in biased:
        for task in (b.first, b.second, b.biased):
            assert len(task.train) == 24
            assert task.train_positive.sum() == 12
        for part, each in ((b.first.train, 6), (b.first.test, 6), (b.second.train, 6)):
            found = [labels[i] for i in part.tolist()]
            assert {name: found.count(name) for name in set(found)} == dict.fromkeys(
                EMBEDDED_ATTRIBUTES, each
            )
    with pytest.raises(ValueError, match="2 classes and 1 values of the second attribute"):
        biased_tasks([("a", "p"), ("b", "p")], [("a", "p")])
    corners = [(a, p) for a in "ab" for p in "pq"] * 2
    fewer = [corner for corner in corners if corner != ("a", "q")]
    with pytest.raises(ValueError, match="scr: 0 test documents with 'a' and 'q', expected at"):
        biased_tasks(corners, fewer)
