"""Sparse probing against the protocol written out with dense tensors, one document at a time."""

import json

import numpy as np
import pytest
import tiny
import torch

from resae import Method
from resae.cli import main
from resae.data.labelled import Documents, LabelledTexts
from resae.evaluation.linear_probes import fit_probe
from resae.evaluation.pooling import CodeSource, Pooled, most_bytes, pool_documents
from resae.evaluation.probing import one_against_rest, probed, sparse_probing
from resae.evaluation.scores import (
    ALL_LAYERS,
    ScoredDocuments,
    Units,
    mean_scores,
    score_rows,
    units_of,
)
from resae.models.sinks import SinkRule

LENGTHS = [7, 1, 12, 5, 9, 12, 3, 8, 4, 6, 2]


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def ids():
    """Documents that begin with BOS; one has it in its middle too, one nothing else."""
    rows = tiny.ids(len(LENGTHS), 12).tolist()
    found = [[0, *row[:n]] for row, n in zip(rows, LENGTHS, strict=True)]
    found[2][5] = 0
    found[1] = [0]
    return found


def sparse(x: torch.Tensor) -> Pooled:
    """A dense `[n, M]` as what pooling gives."""
    documents, units = x.nonzero(as_tuple=True)
    return Pooled(tuple(x.shape), documents.int(), units.int(), x[documents, units].float())


def test_a_probe_is_the_minimum_whatever_the_scale_of_a_column():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1e-3, 1.0, 30.0, 1e3]).double() + torch.tensor([5.0, 0, -90, 1e4])
    positive = x[:, 2] + 90 + 10 * torch.randn(300, generator=generator) > 0
    probe = fit_probe(x, positive, C=0.5)
    weight = probe.weight.clone().requires_grad_()
    bias = probe.bias.clone().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        x @ weight + bias, positive.double(), reduction="sum"
    )
    (loss + weight.square().sum()).backward()
    slack = x.std(0) * 1e-3 + 1e-3
    assert (weight.grad - bias.grad * x.mean(0)).abs().lt(slack).all()
    assert abs(float(bias.grad)) < 1e-3
    assert (probe.logits(x) > 0).eq(positive).double().mean() > 0.85


@pytest.mark.parametrize("sinks", [False, True])
def test_pooled_documents_are_the_means_of_their_tokens(lm, ids, sinks):
    stacks = [tiny.stack(lm, "none", k=3), tiny.stack(lm, "previous", k=4, d_sae=(64, 48, 64))]
    points = lm.hook_points(tiny.LAYERS)
    if sinks:
        xs = lm.capture(torch.tensor([ids[5]]), points)
        norms = [float(x[0, 1:].norm(dim=1).median()) for x in xs.values()]
        stacks[0].sinks = SinkRule(tuple(norms), 1.1)
    methods = [Method("raw", stacks[0], 3), Method("resae", stacks[1], 4)]
    sources = [CodeSource(method, loop) for method in methods for loop in method.loops]
    assert len(sources) == 3
    pooled = pool_documents(lm, sources, ids)
    tokens = 0
    for document, row in enumerate(ids):
        captured = lm.capture(torch.tensor([row]), points)
        xs = [captured[point][0] for point in points]
        kept = torch.tensor(row) != 0
        if sinks:
            kept &= ~stacks[0].sinks.anywhere(xs)
        xs = [x[kept] for x in xs]
        tokens += len(xs[0])
        for layer, x in enumerate(xs):
            mean = x.double().sum(0) / max(1, len(x))
            torch.testing.assert_close(
                pooled.channels[layer].dense()[document], mean, rtol=1e-4, atol=1e-5
            )
        for source, of_layers in zip(sources, pooled.codes, strict=True):
            codes = source.stack.encode(xs, loop=source.loop or "open")
            for found, code in zip(of_layers, codes, strict=True):
                dense = torch.zeros(len(code.acts), found.shape[1]).scatter_add_(
                    1, code.indices, code.acts
                )
                mean = dense.double().sum(0) / max(1, len(dense))
                torch.testing.assert_close(found.dense()[document], mean, rtol=1e-4, atol=1e-5)
    assert pooled.tokens == tokens
    assert sinks == (tokens < sum(map(len, ids)) - len(ids) - 1)
    assert all(0 < active <= 4 for of_layers in pooled.active for active in of_layers)
    held = sum(12 * len(p.values) for of_layers in pooled.codes for p in of_layers)
    assert held <= most_bytes(sources, len(ids), 13)
    joined = Pooled.join(pooled.codes[1])
    assert joined.shape == (len(ids), 64 + 48 + 64)
    side_by_side = torch.cat([p.dense() for p in pooled.codes[1]], 1)
    assert joined.dense().equal(side_by_side)
    assert joined.columns(torch.tensor([70, 3])).equal(side_by_side[:, [70, 3]])
    weights = torch.randn(len(ids), dtype=torch.float64)
    torch.testing.assert_close(joined.weighted_sum(weights), side_by_side.T @ weights)


@pytest.fixture(scope="module")
def labelled():
    """Three classes of unequal size; unit c fires mostly in class c, the others at random."""
    generator = torch.Generator().manual_seed(2)
    labels = ["a"] * 40 + ["b"] * 30 + ["c"] * 20 + ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    texts = LabelledTexts(
        "made", Documents([""] * 90, labels[:90]), Documents([""] * 60, labels[90:])
    )
    x = torch.rand(150, 12, generator=generator)
    x = x * (torch.rand(150, 12, generator=generator) < 0.4)
    for i, label in enumerate(labels):
        x[i, "abc".index(label)] += 0.6
    return texts, x


def test_tasks_are_balanced_and_their_others_even(labelled):
    tasks = one_against_rest(labelled[0])
    assert [task.name for task in tasks] == ["a", "b", "c"]
    labels = labelled[0].train.labels + labelled[0].test.labels
    for task in tasks:
        for numbers, positive in (
            (task.train, task.train_positive),
            (task.test, task.test_positive),
        ):
            assert [labels[i] == task.name for i in numbers.tolist()] == positive.tolist()
            assert positive.sum() * 2 == len(positive)
            assert len(set(numbers.tolist())) == len(numbers)
        assert task.train.max() < 90 <= task.test.min()
        others = [labels[i] for i in task.test.tolist() if labels[i] != task.name]
        assert sorted(others.count(name) for name in set(others)) == [10, 10]


def test_sparse_probing_is_the_protocol(labelled):
    """Of each task: the k largest differences of means, a logistic regression, its accuracy."""
    texts, x = labelled
    tasks = one_against_rest(texts)
    units = Units("raw", None, "layer", sparse(x), 2.0)
    documents = ScoredDocuments(texts.test.labels, first=90)
    scores = sparse_probing([units], tasks, documents, ks=(1, 3, 99))
    assert [score.size for score in scores] == [1, 3]
    for score in scores:
        accuracies = []
        for task in tasks:
            train = x[task.train].double()
            apart = train[task.train_positive].mean(0) - train[~task.train_positive].mean(0)
            best = apart.abs().argsort(descending=True)[: score.size]
            assert "abc".index(task.name) in best
            probe = fit_probe(train[:, best], task.train_positive)
            told = probe.logits(x[task.test][:, best].double()) > 0
            accuracies.append(float((told == task.test_positive).double().mean()))
        assert list(score.classes.values()) == pytest.approx(accuracies)
        assert score.quantity[0] == pytest.approx(np.mean(accuracies))
        assert score.quantity[0] > 0.75
        assert 0.01 < score.quantity[1:].std() < 0.08


def test_a_probe_of_all_units_is_of_channels_alone(labelled):
    texts, x = labelled
    tasks = one_against_rest(texts)
    channels = Units("channels", None, "layer", sparse(x), None)
    assert probed(channels, tasks, (2,))[0] == [2, None]
    assert probed(channels._replace(active=1.0), tasks, (2,))[0] == [2]


def test_differences_are_paired_with_the_first_method_and_means_are_over_datasets(labelled):
    texts, x = labelled
    tasks = one_against_rest(texts)
    units = [Units(name, None, "layer", sparse(x), 2.0) for name in ("raw", "same")]
    worse = sparse(torch.where(torch.arange(12) == 0, 0, x))
    units.append(Units("worse", None, "layer", worse, 2.0))
    scores = [
        sparse_probing(units, tasks, ScoredDocuments(texts.test.labels, first=90, seed=s), ks=(1,))
        for s in (0, 1)
    ]
    raw, same, less = score_rows("made", scores[0])
    assert (raw.difference, raw.data, raw.measure) == (None, "made", "probing")
    assert (same.difference, same.difference_low, same.difference_high) == (0, 0, 0)
    assert less.value - raw.value == pytest.approx(less.difference)
    assert less.difference_high < 0
    assert less.difference_high - less.difference_low < (raw.high - raw.low) + (
        less.high - less.low
    )
    assert raw.low < raw.value < raw.high
    mean = score_rows("mean", mean_scores(scores))[0]
    assert mean.value == raw.value  # the same documents twice
    assert mean.high - mean.low < raw.high - raw.low  # in resamples of their own


def test_units_are_of_every_layer_and_of_all_together(lm, ids):
    method = Method("raw", tiny.stack(lm, "none", k=3), 3)
    pooled = pool_documents(lm, [CodeSource(method, None)], ids)
    found = list(units_of([CodeSource(method, None)], pooled, tiny.NAMES))
    assert [(u.method, u.layer) for u in found] == [
        (name, layer) for name in ("raw", "channels") for layer in (*tiny.NAMES, ALL_LAYERS)
    ]
    assert [u.pooled.shape[1] for u in found] == [64] * 3 + [192] + [32] * 3 + [96]
    assert found[3].active == pytest.approx(9, abs=0.5)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    """Stacks of a small model, and texts of three classes in one file."""
    folder = tmp_path_factory.mktemp("probe")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    for kind in ("none", "previous"):
        tiny.stack(lm, kind).save_pretrained(folder / kind)
    words = {"cat": "The cat sat on the mat", "code": "def f(x): return x + 1", "1": "and the king"}
    lines = [
        {"text": f"{text} {i}", "label": int(label) if label == "1" else label, "half": i % 2}
        for label, text in words.items()
        for i in range(10)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, lines[:10])))
    (folder / "plain.txt").write_text("text")
    (folder / "gap.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a", "label": null}')
    return folder


def probe(folder, *arguments):
    runs = [str(folder / "none"), str(folder / "previous"), "--model", str(folder / "model")]
    return main(["probe", *runs, "--context-tokens", "16", *arguments])


def test_the_command_prints_a_table_and_writes_it(folder, tmp_path, capsys):
    data = str(folder / "texts.jsonl")
    given = ["--data", f"{data},embedded", "--k", "1,2", "--out", str(tmp_path)]
    given += ["--ablated", "3"]
    # Column label of the file, domain of the embedded corpus.
    assert probe(folder, *given, "--train-documents", "6", "--test-documents", "3") == 0
    out = capsys.readouterr().out
    assert "3 classes, 18 documents to fit probes on and 6 to score them on; " in out
    assert "7 classes, 42 documents to fit probes on and 21 to score them on; " in out
    assert "3 times through the autoencoders of 3 layers; means take at most 0." in out
    report = json.loads((tmp_path / "probe.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe.json"]
    rows = report["scores"]
    # raw, ReSAE open and closed: 2 sizes; channels: all of them too; 4 sets of layers each. Only
    # the embedded corpus has a second attribute.
    probed = [row for row in rows if row["measure"] == "probing"]
    assert len(probed) == 3 * (3 * 4 * 2 + 4 * 3)
    assert [sum(row["measure"] == m for row in rows) for m in ("tpp", "scr")] == [3 * 12, 12]
    assert {row["data"] for row in probed} == {data, "embedded", "mean"}
    assert {row["layer"] for row in rows} == {*tiny.NAMES, ALL_LAYERS}
    assert {(row["method"], row["loop"]) for row in rows} == {
        ("raw", None), ("resae", "open"), ("resae", "closed"), ("channels", None)
    }  # fmt: skip
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"]
    for row in probed:
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert (row["difference"] is None) == (
            row["method"] == "raw" or (row["method"] == "channels" and row["size"] is None)
        )
    shown = rows[0]
    assert "spurious correlation removal, embedded, 95 % intervals; columns: latents ablated" in out
    assert f"{shown['value']:.3f} [{shown['low']:.3f}, {shown['high']:.3f}]" in out


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("texts.jsonl", ["--label-column", "kind"], "has no column 'kind' but text, label, half"),
        ("one.jsonl", [], "column 'label' holds 1 classes, expected at least 2"),
        ("gap.jsonl", [], "column 'label' holds NoneType in row 1 (from 0), expected texts or"),
        ("plain.txt", [], "holds plain text without columns; expected .jsonl"),
        ("absent.jsonl", [], "no such file"),
        ("texts.jsonl", ["--measures", "scr"], "scr needs a second label; name its column with"),
        ("texts.jsonl", ["--measures", "tcav"], "--measures='tcav', expected 'probing', 'tpp' or"),
    ],
)
def test_bad_texts_are_refused_in_one_line_before_the_model_runs(
    folder, tmp_path, capsys, data, options, message
):
    given = ["--data", str(folder / data), *options, "--out", str(tmp_path)]
    assert probe(folder, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
