"""Sink tokens: the rule, and that every place which leaves special tokens alone follows it."""

import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from resae import AffineOnly, ReSAE, evaluate, replacement
from resae.data.activations import (
    ModelActivations,
    WithoutSinks,
    capture_tokens,
    measure_sinks,
)
from resae.data.batches import ActivationBatches
from resae.data.cache import ActivationCache
from resae.data.rows import TokenRows
from resae.evaluation.methods import Method
from resae.evaluation.metrics import VarianceUnexplained
from resae.models.sinks import SinkRule
from resae.storage import load_json, save_json
from resae.training import FitConfig, RunConfig, fit_maps, run
from resae.training.calibration import Calibration

LOUD = 7
"""A token that is a sink at every layer of `lm`."""


@pytest.fixture(scope="module")
def lm():
    """A model in which the stream of one token is a hundred times as long as that of the others."""
    model = tiny.pythia()
    embedding = model.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        embedding.weight[LOUD] *= 3_000
    return model


@pytest.fixture(scope="module")
def rule(lm):
    return SinkRule.measured(capture_tokens(lm, tiny.ids(16, 16), lm.hook_points(tiny.LAYERS)))


@pytest.fixture
def stack(lm, rule):
    made = tiny.stack(lm)
    made.sinks = rule
    return made


def with_sink(rows=2, length=10, at=4):
    ids = tiny.ids(rows, length)
    ids[0, at] = LOUD
    return ids


def untouched(lm, stack, ids, layer=3, **options):
    """`[B, T]` bool: the tokens whose stream is the one before replacement at a selected layer,
    and the counts there."""
    seen = {}
    point = lm.hook_point(layer)
    with lm.hooked({point: lambda x: seen.update(before=x)}), replacement(lm, stack) as active:
        with lm.hooked({point: lambda x: seen.update(after=x)}):
            lm.model(ids, use_cache=False, **options)
        counts = active.counts[-1]
    return (seen["before"] == seen["after"]).all(-1), counts


# -- the rule --------------------------------------------------------------------------------------


def test_a_sink_is_longer_than_the_factor_times_the_median():
    x = torch.tensor([[3.0, 4.0], [0.0, 5.0], [60.0, 0.0], [30.0, 40.0], [5.0, 0.0]])
    rule = SinkRule.measured([x, x / 2])
    assert rule == SinkRule((5.0, 2.5), 10.0)
    assert rule.at(0, x).tolist() == [False, False, True, False, False]  # 50 is not above 10 × 5
    assert rule.anywhere([x, x]).tolist() == [False, False, True, True, False]
    assert rule.rescaled([2.0, 4.0]) == SinkRule((10.0, 10.0), 10.0)
    with pytest.raises(ValueError, match="no tokens to take the median norm of"):
        SinkRule.measured([x[:0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("longest", [1.0, 9.99, 10.5, float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 16, 400])
def test_a_stream_said_to_have_no_sink_has_none(tokens, longest, dtype):
    """And a single token of ordinary length, as generation has them, is said to be none."""
    x = nn.functional.normalize(torch.randn(tokens, 1, 8), dim=-1)
    x[tokens // 2] *= longest
    stream, rule = x.to(dtype), SinkRule((1.0,), 10.0)
    found = rule.at(0, stream) | stream.isnan().any(-1)
    assert not (rule.has_none(0, stream) and bool(found.any()))
    assert rule.has_none(0, stream) == (tokens <= 16 and longest == 1.0 or tokens * longest < 10)


def test_norms_of_half_precision_do_not_overflow():
    x = torch.full((3, 400), 60.0, dtype=torch.float16)
    x[0] = 60_000.0  # its squares, and its norm, are beyond float16
    assert SinkRule.measured([x]).at(0, x).tolist() == [True, False, False]


# -- activations -----------------------------------------------------------------------------------


def test_sinks_are_left_out_of_captured_activations_at_all_layers(lm, rule):
    ids, points = with_sink(), lm.hook_points(tiny.LAYERS)
    whole = capture_tokens(lm, ids, points)
    for x, kept in zip(whole, capture_tokens(lm, ids, points, sinks=rule), strict=True):
        assert torch.equal(kept, torch.cat([x[:4], x[5:]]))


def rows_with_sinks(lm):
    texts = [[100 + (17 * i + 5 * j) % 900 for i in range(90)] for j in range(8)]
    for text in texts:
        text[20::31] = [LOUD] * len(text[20::31])
    return TokenRows(texts, lm.tokenizer, 16)


def test_a_cache_serves_every_rule_and_gives_the_batches_of_the_model(lm, tmp_path):
    rows, points = rows_with_sinks(lm), lm.hook_points([0, 1])
    model = ModelActivations(lm, rows, points)
    cache = ActivationCache(tmp_path / "cache", model)
    rule = measure_sinks(model)
    assert rule == measure_sinks(cache)
    sizes = {"batch_tokens": 16, "buffer_tokens": 64}
    sources = [
        ActivationBatches(lm, rows, points, **sizes, cache=WithoutSinks(activations, rule))
        for activations in (model, cache)
    ]
    positions = []
    batches = [source.batches() for source in sources]
    for _ in range(60):  # beyond one epoch
        (ours, position), (theirs, _) = map(next, batches)
        positions.append((position, ours))
        assert all(map(torch.equal, ours, theirs))
        assert len(ours[0]) == 16
        assert not rule.anywhere(ours).any()
    assert positions[-1][0].epoch == 1
    assert sources[0].activations.left_out > 20
    again = sources[1].batches(positions[20][0])
    for _, expected in positions[21:40]:
        assert all(map(torch.equal, next(again)[0], expected))
    plain = ActivationBatches(lm, rows, points, **sizes, cache=cache).batches()
    assert any(rule.anywhere(next(plain)[0]).any() for _ in range(8))


# -- replacement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "teacher_forced", "error_added"])
def test_sinks_and_first_tokens_are_not_replaced_and_counted(lm, stack, mode):
    ids = with_sink()
    with replacement(lm, stack, mode=mode) as active:
        lm.logits(ids)
    for count in active.counts:
        assert count.prefill == (1, 17, 0, 3)
        assert (count.replaced, count.skipped, count.sinks) == (17, 0, 3)
    with replacement(lm, stack, mode=mode, replace_special=True) as active:
        lm.logits(ids)
    assert active.counts[0].prefill == (1, 20, 0, 0)
    stack.sinks = None
    with replacement(lm, stack, mode=mode) as active:
        lm.logits(ids)
    assert active.counts[0].prefill == (1, 20, 0, 0)


@pytest.mark.parametrize("kind", [ReSAE, AffineOnly])
def test_what_is_left_alone_is_the_stream_itself(lm, stack, kind):
    replaced = stack if kind is ReSAE else AffineOnly(stack)
    kept, counts = untouched(lm, replaced, with_sink())
    expected = torch.zeros(2, 10, dtype=torch.bool)
    expected[:, 0] = expected[0, 4] = True
    assert torch.equal(kept, expected)
    assert counts.sinks == 3


def test_a_token_that_became_a_sink_is_left_alone_at_all_later_layers(lm, stack):
    """Its reconstruction was not put in there, so that no chain leads on from it."""
    ids = tiny.ids(2, 10)
    huge = 1e9
    seen = []
    with (
        lm.hooked({lm.hook_point(1): seen.append}),
        replacement(lm, stack, layers=[0]),
    ):
        lm.logits(ids)
    norms = seen[0].norm(dim=-1)
    norms[:, 0] = 0
    longest, second = norms.flatten().topk(2).values.tolist()
    stack.sinks = SinkRule((huge, (longest + second) / 2, huge), 1.0)
    kept, counts = untouched(lm, stack, ids)
    assert torch.equal(kept, (norms == longest) | (norms == 0))
    assert counts.sinks == 3
    with replacement(lm, stack) as active:
        lm.logits(ids)
    assert [count.sinks for count in active.counts] == [2, 3, 3]


def test_first_tokens_are_found_behind_padding_and_in_packed_rows(lm, stack):
    ids = tiny.ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    kept, counts = untouched(lm, stack, ids, attention_mask=mask)
    assert kept[0].tolist() == [True] * 4 + [False] * 4
    assert kept[1].tolist() == [True] + [False] * 7
    assert counts.prefill == (1, 11, 3, 2)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    kept, counts = untouched(lm, stack, ids[:1], position_ids=packed)
    assert torch.equal(kept, packed == 0)
    assert counts.sinks == 3


def test_cached_generation_leaves_alone_what_the_whole_pass_does(lm, stack):
    ids = with_sink(rows=1, length=12, at=8)
    with replacement(lm, stack) as active:
        whole = lm.logits(ids)
        cache, steps = None, []
        for part in ids.split([5, *[1] * 7], 1):
            out = lm.model(part, use_cache=True, **{lm.cache_name: cache})
            cache = out[lm.cache_name]
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    count = active.counts[0]
    assert count.prefill == (2, 12 + 5 - 3, 0, 3)
    assert count.decode == (7, 6, 0, 1)


def test_sinks_are_never_edited(lm, stack):
    edit = {"layer": 0, "action": "add", "vector": [1.0] * 32}
    with replacement(lm, stack, interventions=[edit]) as active:
        lm.logits(with_sink())
    assert active.edits is not None
    assert active.edits.counts[0].changed == {None: 17}


# -- evaluation and files --------------------------------------------------------------------------


def test_fvu_is_reported_with_and_without_sinks(lm, stack):
    ids, points = with_sink(rows=3), lm.hook_points(tiny.LAYERS)
    without = deepcopy_without_rule(stack)
    methods = [Method("resae", stack, 4), Method("no rule", without, 4)]
    evaluation = evaluate(lm, methods, [ids])
    xs = capture_tokens(lm, ids, points)
    x_hats = stack(xs, loop="open").x_hats
    kept = torch.arange(30) != 4
    for layer in range(3):
        row = evaluation.reconstruction[layer]
        expected = []
        for tokens in (kept, torch.ones_like(kept)):
            fvu = VarianceUnexplained()
            fvu.add(xs[layer][tokens], x_hats[layer][tokens])
            expected.append(fvu.fvu())
        assert row.loop == "open"
        assert row.sinks == 1
        assert (row.fvu_stream, row.fvu_with_sinks) == pytest.approx(expected)
    counts = {(row.method, row.mode): row.sinks for row in evaluation.replacement}
    assert counts["resae", "online"] == counts["resae", "teacher_forced"] == 4
    assert counts["no rule", "online"] == 0


def deepcopy_without_rule(stack):
    other = stack.at_k(4)
    other.sinks = None
    return other


def test_a_stack_keeps_its_rule(stack, rule, tmp_path):
    stack.save_pretrained(tmp_path / "stack")
    assert ReSAE.load(tmp_path / "stack").sinks == rule
    assert stack.at_k(2).sinks == rule
    norm = f"{rule.median_norms[0]:.4g}"
    assert norm in str(stack.generate_model_card())
    path = tmp_path / "stack" / "resae.json"
    description = load_json(path, "stack")
    for wrong in ({"factor": 10.0}, {"factor": 10.0, "median_norms": [1.0]}, [1.0]):
        save_json(path, description | {"sinks": wrong})
        with pytest.raises(ValueError, match="resae.json.*sinks|sinks in resae.json"):
            ReSAE.load(tmp_path / "stack")
    del description["sinks"]  # of an earlier version
    save_json(path, description)
    assert ReSAE.load(tmp_path / "stack").sinks is None
    stack.rescale_([2.0, 2.0, 2.0])
    assert stack.sinks == rule.rescaled([2.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="2 median norms for 3 hook points"):
        ReSAE(tiny.NAMES, stack.predictor, list(stack.saes), sinks=SinkRule((1.0, 1.0)))


def test_training_leaves_sinks_out_and_records_the_rule(lm, tmp_path, caplog):
    """A factor that a random model's tokens exceed: the same run with cache, and resumed."""
    caplog.set_level(logging.INFO, logger="resae")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    words = " ".join(f"{i} and the earth was without form" for i in range(800))
    (tmp_path / "text.txt").write_text(words)
    config = RunConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "text.txt"),
        layers=("0", "1"),
        k=4,
        d_sae=64,
        context_tokens=24,
        held_out_rows=4,
        train_tokens=1024,
        batch_tokens=128,
        buffer_tokens=512,
        calibration_tokens=1024,
        buffer_dtype="float32",
        sink_factor=1.05,
        out=str(tmp_path / "run"),
    )
    done = run(config)
    assert done.stack is not None
    rule = done.stack.sinks
    assert rule is not None
    assert rule.factor == 1.05
    assert "left out so far, of norms above 1.05 × the median" in caplog.text
    file = tmp_path / "run" / "calibration.safetensors"
    calibration = Calibration.load(file, "previous")
    assert calibration.sinks == rule
    assert ReSAE.load(tmp_path / "run").sinks == rule
    cached = run(replace(config, out=str(tmp_path / "cached"), cache=str(tmp_path / "cache")))
    assert same(cached.stack, done.stack)
    steps = iter([False] * 4 + [True])
    config = replace(config, out=str(tmp_path / "stopped"))
    assert run(config, stopping=nullcontext(lambda: next(steps))).stack is None
    resumed = run(replace(config, resume=True))
    assert resumed.stack is not None
    assert resumed.stack.sinks == rule
    assert same(resumed.stack, done.stack)
    plain = run(replace(config, out=str(tmp_path / "plain"), sink_factor=0.0))
    assert plain.stack is not None
    assert plain.stack.sinks is None
    assert not same(plain.stack, done.stack)
    maps = fit_maps(
        FitConfig(
            **{name: getattr(config, name) for name in ("model", "data", "layers", "sink_factor")},
            context_tokens=24,
            held_out_rows=4,
            calibration_tokens=1024,
            out=str(tmp_path / "maps"),
        )
    )
    fitted = Calibration.load(maps / "calibration.safetensors", "previous")
    assert fitted.sinks == rule
    torch.testing.assert_close(fitted.predictor.A, calibration.predictor.A)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)
