import ast
import inspect
import itertools
from dataclasses import is_dataclass

import pytest
import tiny
import torch

from resae import AffineOnly, Method, evaluate
from resae.evaluation import rows as evaluation_rows
from resae.evaluation.comparison import collapse_difference, forward_passes
from resae.report import rows as report_rows

COLUMNS = {
    "replacement": "method loop mode layers k active_total ce_clean ce delta_ce ce_recovered_zero "
    "ce_recovered_mean kl tokens sinks",
    "reconstruction": "method loop k layer fvu_stream fvu_target l0 dead_fraction fvu_with_sinks "
    "sinks",
    "redundancy": "method k mean_max_cos share_over_0_5 share_over_0_7 share_over_0_9 random_floor",
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
        assert list(row) == COLUMNS[table].split()


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
