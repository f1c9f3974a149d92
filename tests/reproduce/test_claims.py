import pytest

from resae.evaluation.intervals import Interval
from resae.reproduce.claims import (
    COSINE_CLAIM,
    FVU_CLAIM,
    GAP_CLAIM,
    LOSS_CLAIMS,
    PROBING_CLAIM,
    Verdict,
    below,
    findings_of,
    summary_of,
)
from resae.reproduce.jobs import MAPS_ALONE, Job, Kind
from resae.reproduce.losses import Setting, read_losses
from resae.reproduce.settings import StudyConfig

CONFIG = StudyConfig("tiny", documents=6)
HARD = [1.0, 1.5, 2.0, 1.2, 0.8, 1.6]
"""Loss of raw SAEs on each document, times its 10 tokens."""
EQUAL_K = next(
    c.text for c in LOSS_CLAIMS if c.text.startswith("online, ReSAE loses less than raw")
)
HALF = next(c.text for c in LOSS_CLAIMS if c.at_most is not None)


def evaluation(losses, loop=None, fvu=0.2, cosine=0.5):
    """Result of an evaluation with these losses online and teacher-forced."""
    clean = {"loop": None, "mode": None, "ce": [20.0] * 6, "tokens": [10] * 6}
    ways = [
        (m, lp) for m in ("online", "teacher_forced") for lp in ({loop, "open"} if loop else {None})
    ]
    replaced = [
        {"loop": lp, "mode": m, "ce": [20 + 10 * x for x in losses], "tokens": [10] * 6}
        for m, lp in ways
    ]
    return {
        "row_sums": [clean, *replaced],
        "reconstruction": [
            {"loop": lp, "fvu_stream": fvu} for lp in ({loop, "open"} if loop else {None})
        ],
        "redundancy": [{"mean_max_cos": cosine}],
        "replacement": [{"active_total": 4}],
    }


def table_of(methods, spacing="far", k=32, seeds=(0,)):
    """The table of a study in which these methods were evaluated."""
    results = {
        Job(Kind.EVALUATE, spacing, 0 if name == MAPS_ALONE else k, name, seed): found
        for name, found in methods.items()
        for seed in seeds
    }
    return read_losses(list(results), results.get, CONFIG)


def judged(table, claim):
    return [f for f in findings_of(table, {}) if f.claim == claim]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ((-0.2, -0.3, -0.1), Verdict.HOLDS),
        ((0.2, 0.1, 0.3), Verdict.FAILS),
        ((-0.2, -0.5, 0.1), Verdict.OPEN),
    ],
)
def test_an_interval_decides(found, verdict):
    assert below(Interval(*found), 0.0) is verdict


@pytest.mark.parametrize(
    ("factors", "less", "half"),
    [
        ([0.5] * 6, Verdict.HOLDS, Verdict.HOLDS),
        ([0.8] * 6, Verdict.HOLDS, Verdict.FAILS),
        ([1.2] * 6, Verdict.FAILS, Verdict.FAILS),
        ([0.5, 1.5, 0.7, 1.3, 1.0, 1.01], Verdict.OPEN, Verdict.FAILS),
    ],
    ids=["half", "less", "more", "open"],
)
def test_less_than_raw_and_half_of_raw_are_different_claims(factors, less, half):
    ours = evaluation([f * x for f, x in zip(factors, HARD, strict=True)], "closed")
    table = table_of({"raw": evaluation(HARD), "resae_closed": ours})
    (of_less,), (of_half,) = judged(table, EQUAL_K), judged(table, HALF)
    assert (of_less.verdict, of_half.verdict) == (less, half)
    mean_ours = sum(f * x for f, x in zip(factors, HARD, strict=True)) / 6
    assert of_less.difference.value == pytest.approx(mean_ours - sum(HARD) / 6)
    assert of_less.ratio.value == pytest.approx(mean_ours / (sum(HARD) / 6))


def test_claims_without_their_measurements_are_absent():
    table = table_of({"raw": evaluation(HARD)})
    assert {f.claim for f in findings_of(table, {})} == {PROBING_CLAIM}
    (probing,) = judged(table, PROBING_CLAIM)
    assert probing.verdict is Verdict.UNTESTED
    assert "not measured" in probing.numbers


def test_fvu_cosines_and_maps_are_judged_by_value():
    methods = {
        "raw": evaluation(HARD, fvu=0.2, cosine=0.6),
        "resae_closed": evaluation(HARD, "closed", fvu=0.1, cosine=0.3),
    }
    table = table_of(methods)
    assert judged(table, FVU_CLAIM)[0].verdict is Verdict.FAILS  # the paper's is the higher one
    assert judged(table, COSINE_CLAIM)[0].verdict is Verdict.HOLDS
    found = findings_of(table, {"far": [0.3, 0.7], "near": [0.8, 0.9]})
    (gap,) = [f for f in found if f.claim == GAP_CLAIM]
    assert (gap.verdict, gap.numbers) == (Verdict.HOLDS, "0.500 far, 0.850 near")
    found = findings_of(table, {"far": [0.9, 0.9], "near": [0.8, 0.9]})
    assert [f.verdict for f in found if f.claim == GAP_CLAIM] == [Verdict.FAILS]


def test_the_maps_alone_are_compared_at_every_k():
    results = {
        Job(Kind.EVALUATE, "far", method=MAPS_ALONE): evaluation([2 * x for x in HARD]),
        Job(Kind.EVALUATE, "far", 16, "resae_closed"): evaluation(HARD, "closed"),
        Job(Kind.EVALUATE, "far", 64, "resae_closed", 1): evaluation(HARD, "closed"),
    }
    table = read_losses(list(results), results.get, CONFIG)
    claim = "online, ReSAE loses less than the maps alone"
    found = judged(table, claim)
    assert [(f.setting, f.verdict) for f in found] == [
        ("far, k = 16", Verdict.HOLDS),
        ("far, k = 64", Verdict.HOLDS),
    ]
    assert table[Setting("far", 32)].keys() == {MAPS_ALONE}


def test_methods_are_compared_over_the_seeds_that_both_have():
    results = {
        Job(Kind.EVALUATE, "far", 32, "raw", 0): evaluation(HARD),
        Job(Kind.EVALUATE, "far", 32, "raw", 1): evaluation([100.0] * 6),
        Job(Kind.EVALUATE, "far", 32, "resae_closed", 0): evaluation(HARD, "closed"),
    }
    (found,) = judged(read_losses(list(results), results.get, CONFIG), EQUAL_K)
    assert found.difference.value == pytest.approx(0.0)


def test_the_outcome_of_a_claim_names_its_settings():
    table = table_of({"raw": evaluation(HARD), "resae_closed": evaluation([0.5] * 6, "closed")})
    worse = table_of(
        {"raw": evaluation(HARD), "resae_closed": evaluation([3.0] * 6, "closed")}, "near"
    )
    found = judged(table | worse, EQUAL_K)
    assert summary_of(found[:1]) == "holds"
    assert summary_of(found) == "holds (far, k = 32), does not hold (near, k = 32)"
