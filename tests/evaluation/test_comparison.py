import ast
import inspect
import itertools
from dataclasses import is_dataclass

import numpy as np
import pytest
import tiny
import torch

from resae import AffineOnly, AffinePredictor, Method, evaluate, replacement
from resae.evaluation import rows as evaluation_rows
from resae.evaluation.comparison import collapse_difference, forward_passes
from resae.evaluation.intervals import Bootstrap, interval
from resae.evaluation.methods import subsets_of
from resae.report import rows as report_rows
from resae.stack.stack import new_stack

COLUMNS = {
    "replacement": "method loop mode layers k active_total ce_clean ce delta_ce ce_recovered_zero "
    "ce_recovered_mean kl tokens sinks reference difference sum_of_single",
    "ablation": "ablation layers ce delta_ce kl tokens",
    "reconstruction": "method loop k layer fvu_stream fvu_target l0 dead_fraction fvu_with_sinks "
    "sinks explained_variance explained_variance_legacy cosine norm_ratio reconstruction_bias "
    "reference difference",
    "density": "method loop k layer tokens alive_fraction over_1_percent over_10_percent "
    "activity_over_1_percent activity_over_10_percent edges counts",
    "redundancy": "method k mean_max_cos share_over_0_5 share_over_0_7 share_over_0_9 random_floor "
    "layers_per_latent mean_max_cos_within mean_max_cos_transported share_over_0_5_transported "
    "share_over_0_7_transported share_over_0_9_transported layers_per_latent_transported maps_of",
}


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def batches():
    ids = tiny.ids(6, 12)
    ids[:, 0] = ids[2, 7] = 0
    return list(ids.split(2))


@pytest.fixture(scope="module")
def evaluation(lm, batches):
    stack = tiny.stack(lm)
    methods = [
        Method("raw", tiny.stack(lm, "none"), 4, subsets=((tiny.NAMES[-1],),)),
        Method("resae", stack, 4),
        Method("exact", tiny.exact_stack(lm), 64),
        Method("affine_only", AffineOnly(stack), None),
    ]
    return evaluate(lm, methods, batches)


@pytest.fixture(scope="module")
def report(evaluation):
    return evaluation.to_dict()


def one(rows, **wanted):
    (row,) = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return row


@pytest.mark.parametrize("table", COLUMNS)
def test_rows_are_flat_and_have_the_agreed_columns(report, table):
    assert report[table]
    for row in report[table]:
        values = [name for name in row if not name.endswith(("_low", "_high"))]
        assert values == COLUMNS[table].split()
        for name in (name.removesuffix("_low") for name in row if name.endswith("_low")):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert (low is None) == (high is None) == (row[name] is None), name
            assert low is None or low <= high


def test_every_method_is_measured_in_every_mode_and_loop(report):
    cases = {(r["method"], r["mode"], r["loop"], len(r["layers"])) for r in report["replacement"]}
    modes = ("online", "teacher_forced", "error_added")
    expected = {("raw", mode, None, 3) for mode in modes} | {("raw", "teacher_forced", None, 1)}
    expected |= {
        (n, m, loop, 3) for n in ("resae", "exact") for m in modes for loop in ("open", "closed")
    }
    expected |= {("affine_only", mode, None, 3) for mode in modes}
    assert cases == expected


def test_sums_of_single_rows_are_those_of_the_row_alone(lm, batches, evaluation):
    clean, *replaced = evaluation.row_sums
    assert clean.method is None
    third = batches[1][:1]  # with a special token inside: not counted
    (alone,) = evaluate(
        lm, [Method("affine_only", AffineOnly(tiny.stack(lm)), None)], [third]
    ).row_sums[:1]
    assert clean.tokens == [10, 10, 9, 10, 10, 10]
    assert clean.ce[2] == pytest.approx(alone.ce[0])
    assert alone.tokens == [9]
    for sums, row in zip(replaced, evaluation.replacement, strict=True):
        assert (sums.method, sums.loop, sums.mode) == (row.method, row.loop, row.mode)
        assert sum(sums.ce) / sum(sums.tokens) == pytest.approx(row.ce)


def test_numbers_are_those_of_a_computation_by_hand(lm, batches, report):
    from resae import replacement

    stack = tiny.stack(lm)
    total, clean_total, count = 0.0, 0.0, 0
    for ids in batches:
        counted = ids[:, :-1] != 0
        with replacement(lm, stack, loop="closed"):
            new = lm.logits(ids)
        for logits, name in ((new, "new"), (lm.logits(ids), "clean")):
            log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
            value = -log_p[counted].double().sum().item()
            if name == "new":
                total += value
            else:
                clean_total += value
        count += int(counted.sum())
    row = one(report["replacement"], method="resae", mode="online", loop="closed")
    assert row["tokens"] == count == 6 * 11 - 7
    assert row["ce"] == pytest.approx(total / count, rel=1e-5)
    assert row["ce_clean"] == pytest.approx(clean_total / count, rel=1e-5)
    assert row["delta_ce"] == pytest.approx((total - clean_total) / count, rel=1e-4)


def test_ablations_are_of_the_replaced_layers_at_the_replaced_tokens(lm, batches, report):
    points = lm.hook_points(tiny.LAYERS)
    total, count = 0.0, 0
    for ids in batches:
        special = (ids == 0).unsqueeze(-1)
        put = {p: (lambda x, s=special: torch.where(s, x, 0.0)) for p in points}
        logits = lm.replace(ids, put)
        log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        counted = ids[:, :-1] != 0
        total -= float(log_p[counted].double().sum())
        count += int(counted.sum())
    row = one(report["replacement"], method="resae", mode="online", loop="closed")
    zero = total / count
    expected = (zero - row["ce"]) / (zero - row["ce_clean"])
    assert row["ce_recovered_zero"] == pytest.approx(expected, rel=1e-4)


def test_intervals_and_differences_are_those_of_the_sums_of_rows(evaluation):
    """Of 6 rows, with the same resamples for every method."""
    clean, *replaced = evaluation.row_sums
    bootstrap = Bootstrap(6)
    deltas = {}
    for sums, row in zip(replaced, evaluation.replacement, strict=True):
        delta = bootstrap.per_token(np.subtract(sums.ce, clean.ce), clean.tokens)
        deltas[row.method, row.loop, row.mode, len(row.layers)] = delta
        expected = pytest.approx((row.delta_ce, row.delta_ce_low, row.delta_ce_high))
        assert interval(delta) == expected
    for row in evaluation.replacement:
        theirs = deltas.get(("raw", None, row.mode, len(row.layers)))
        assert (row.reference is None) == (row.method in ("raw", "exact"))  # exact: another k
        if row.reference is not None:
            ours = deltas[row.method, row.loop, row.mode, len(row.layers)]
            found = (row.difference, row.difference_low, row.difference_high)
            assert interval(ours - theirs) == pytest.approx(found)


def test_one_layer_costs_the_same_in_every_mode(lm, batches):
    """With nothing replaced before it, the running stream is the clean one."""
    stack = tiny.stack(lm, "none", layers=(1,))
    rows = evaluate(lm, [Method("one", stack, 4)], batches).replacement
    assert [row.mode for row in rows] == ["teacher_forced", "online", "error_added"]
    for row in rows[1:]:
        assert row.delta_ce == pytest.approx(rows[0].delta_ce, abs=1e-6)
        assert row.kl == pytest.approx(rows[0].kl, rel=1e-5)


def test_any_set_of_layers_is_replaced_and_single_ones_are_summed(lm, batches):
    stack = tiny.stack(lm)
    method = Method("resae", stack, 4, subsets=subsets_of(tiny.NAMES, "all"))
    assert len(method.subsets) == 6
    evaluation = evaluate(lm, [method], batches)
    rows = {(row.loop, row.mode, tuple(row.layers)): row for row in evaluation.replacement}
    for loop in ("open", "closed"):
        single = [rows[loop, "teacher_forced", (name,)].delta_ce for name in tiny.NAMES]
        whole = rows[loop, "online", tuple(tiny.NAMES)]
        assert whole.sum_of_single == pytest.approx(sum(single))
        assert whole.sum_of_single_low < whole.sum_of_single < whole.sum_of_single_high
        two = rows[loop, "online", tuple(tiny.NAMES[:2])]
        assert two.sum_of_single == pytest.approx(sum(single[:2]))
        assert rows[loop, "teacher_forced", (tiny.NAMES[0],)].sum_of_single is None
    # Online, layers that are not replaced leave the stream alone, and the chain runs on.
    pair = (tiny.NAMES[0], tiny.NAMES[2])
    with replacement(lm, stack, loop="closed", layers=list(pair)):
        logits = [lm.logits(ids) for ids in batches]
    assert rows["closed", "online", pair].ce == pytest.approx(ce_of(logits, batches), rel=1e-5)
    ablated = {(row.ablation, tuple(row.layers)): row for row in evaluation.ablation}
    assert len(ablated) == 2 * 7
    row = rows["closed", "online", pair]
    zero = ablated["zero", pair]
    recovered = (zero.ce - row.ce) / (zero.ce - row.ce_clean)
    assert row.ce_recovered_zero == pytest.approx(recovered)
    assert zero.delta_ce == pytest.approx(zero.ce - row.ce_clean)


def test_latents_of_a_shared_dictionary_are_spread_over_layers(lm, batches):
    """With one autoencoder at every layer its latents fire at some, or all, of them."""
    layers = lm.hook_points(tiny.LAYERS)
    shared = new_stack(
        [p.name for p in layers],
        AffinePredictor("none"),
        d_in=lm.d_model,
        d_sae=32,
        k=(8,) * 3,
        shared=True,
    )
    raw = tiny.stack(lm, "none")
    methods = [
        Method("mlsae", shared.eval(), 8),
        Method("raw", raw, 4),
        Method("resae", tiny.stack(lm), 4),
    ]
    evaluation = evaluate(lm, methods, batches)
    (row,) = evaluation.shared_latents
    assert row.method == "mlsae"
    assert 1 < row.effective_layers <= row.layers_per_latent <= 3
    assert 2 / 3 + 0.3 > row.variance >= row.variance_of_latent >= row.variance_of_token > 0
    maps = {row.method: row.maps_of for row in evaluation.redundancy}
    assert maps == {"raw": "resae", "resae": "resae"}  # of one dictionary there is no redundancy


def ce_of(logits, batches):
    """Mean cross-entropy over positions whose input is not special (0)."""
    total = count = 0
    for scores, ids in zip(logits, batches, strict=True):
        counted = ids[:, :-1] != 0
        log_p = scores[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        total -= float(log_p[counted].double().sum())
        count += int(counted.sum())
    return total / count


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(lm, batches, tmp_path, caplog):
    methods = [Method("resae", tiny.stack(lm), 4, subsets=subsets_of(tiny.NAMES, "each"))]
    file = tmp_path / "sums.safetensors"
    seen = []

    def stop_after_two(done):
        seen.append(done)
        if done == 2:
            raise Stopped

    options = {"checkpoint": file, "checkpoint_seconds": 0}
    means = []
    whole = evaluate(lm, methods, batches, on_means=means.append)
    assert means == [1, 2, 3]
    with pytest.raises(Stopped):
        evaluate(lm, methods, batches, on_batch=stop_after_two, **options)
    assert file.exists()
    kept = file.read_bytes()
    progress = {"on_means": means.append, "on_batch": seen.append}
    assert evaluate(lm, methods, batches, **progress, **options) == whole
    assert means == [1, 2, 3]  # not again
    assert seen == [1, 2, 3]
    assert not file.exists()
    # Of other weights, or other tokens, it is not continued.
    file.write_bytes(kept)
    other = [Method("resae", tiny.stack(lm), 4, subsets=methods[0].subsets)]
    other[0].stack.sae(2).b_dec.data += 1e-3
    seen.clear()
    assert evaluate(lm, other, batches, on_batch=seen.append, **options) != whole
    assert seen == [1, 2, 3]
    assert "sums.safetensors holds the sums of another model, other stacks or" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_sums_do_not_grow_with_the_text(lm, tmp_path):
    """They are in the file: per document, latent and dimension."""
    sizes = []
    for rows in (4, 16):
        file = tmp_path / f"{rows}"
        with pytest.raises(Stopped):
            evaluate(
                lm,
                [Method("resae", tiny.stack(lm), 4)],
                list(tiny.ids(rows, 12).split(2)),
                documents=[row * 4 // rows for row in range(rows)],
                on_batch=lambda done: stop_if(done == 2),
                checkpoint=file,
                checkpoint_seconds=0,
            )
        sizes.append(file.stat().st_size)
    assert sizes[0] == sizes[1]


def stop_if(reached):
    if reached:
        raise Stopped


def test_a_perfect_stack_loses_nothing(report):
    for row in report["replacement"]:
        if row["method"] == "exact":
            assert abs(row["delta_ce"]) < 1e-2
            assert row["kl"] < 1e-3
            assert row["ce_recovered_zero"] == pytest.approx(1, abs=0.05)
    for row in report["reconstruction"]:
        if row["method"] == "exact":
            assert row["fvu_stream"] < 1e-4
            assert row["dead_fraction"] == 0


def test_reconstruction_rows_agree_with_the_streams_of_all_tokens(lm, batches, report):
    points = lm.hook_points(tiny.LAYERS)
    stack = tiny.stack(lm)
    xs = [
        torch.cat([lm.capture(ids, points)[p][ids != 0] for ids in batches]).double()
        for p in points
    ]
    x_hats = stack([x.float() for x in xs], loop="closed").x_hats
    x, x_hat = xs[2], x_hats[2].double()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    row = one(report["reconstruction"], method="resae", loop="closed", layer=tiny.NAMES[2])
    assert row["fvu_stream"] == pytest.approx(float(fvu.detach()), rel=1e-4)
    target = x - stack.predictor(2, x_hats).double()
    fvu = (x - x_hat).square().sum() / (target - target.mean(0)).square().sum()
    assert row["fvu_target"] == pytest.approx(float(fvu.detach()), rel=1e-4)
    assert 0 < row["l0"] <= 4


def test_raw_targets_are_the_stream(report):
    for row in report["reconstruction"]:
        if row["method"] == "raw":
            assert row["fvu_target"] == pytest.approx(row["fvu_stream"], rel=1e-6)
        if row["method"] == "affine_only":
            assert row["fvu_target"] is None


def test_collapse_of_teacher_forcing_is_exact(lm, batches):
    assert collapse_difference(lm, tiny.stack(lm), batches[0]) == 0.0


def test_cost_is_counted_in_passes(lm, batches):
    """Over the whole batch: before, the model is tried on one row."""
    passes = []
    lm = tiny.pythia()
    lm.blocks[0].register_forward_hook(lambda _module, args, _out: passes.append(len(args[0])))
    methods = [Method("resae", tiny.stack(lm), 4)]
    evaluate(lm, methods, batches[:1])
    assert passes.count(len(batches[0])) == forward_passes(methods)


def test_bad_input_is_named(lm, batches):
    method = Method("resae", tiny.stack(lm), 4)
    with pytest.raises(ValueError, match="no held-out tokens"):
        evaluate(lm, [method], [])
    with pytest.raises(ValueError, match="different models"):
        evaluate(tiny.gemma2(), [method], batches)
    with pytest.raises(ValueError, match="'reference' is no method here; expected one of resae"):
        evaluate(lm, [method], batches, reference="reference")
    with pytest.raises(ValueError, match="2 documents for 6 rows"):
        evaluate(lm, [method], batches, documents=[1, 2])
    broken = tiny.stack(lm)
    broken.sae(1).b_dec.data[0] = float("nan")
    with pytest.raises(ValueError, match="is NaN"):
        evaluate(lm, [Method("resae", broken, 4)], batches)


ROWS = [
    cls
    for module in (evaluation_rows, report_rows)
    for cls in vars(module).values()
    if is_dataclass(cls) and cls.__module__ == module.__name__
]


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_every_column_is_documented_and_rows_cannot_be_changed(cls):
    tree = ast.parse(inspect.getsource(cls)).body[0]
    documented = {
        field.target.id
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert documented == set(vars(cls).get("__annotations__", {}))
    assert cls.__dataclass_params__.frozen
