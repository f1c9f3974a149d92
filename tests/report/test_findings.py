from dataclasses import fields, replace
from typing import get_type_hints

from resae.evaluation.rows import (
    Evaluation,
    LayerPairRow,
    ReconstructionRow,
    RedundancyRow,
    ReplacementRow,
)
from resae.report.content import Report
from resae.report.findings import extra_findings, findings
from resae.report.rows import BoostRow, ElsewhereRow, FairRow, FvuRow, NestedFvuRow

EMPTY = {int: 0, float: 0.0, str: "", list[str]: [], list[int]: [], list[float]: []}


def made(cls, **values):
    """A row with these columns; those that do not matter are empty."""
    hints = get_type_hints(cls)
    return cls(**{f.name: values.get(f.name, EMPTY.get(hints[f.name])) for f in fields(cls)})


def report_of(replacement, **tables):
    config = {"model": "m", "data": "d", "layers": ["a"], "d_sae": 1, "train_tokens": 1}
    return Report(title="t", config=config, environment={}, replacement=replacement, **tables)


def rows_where(better):
    """Rows of a made-up report in which ReSAE loses `better` times what raw SAEs lose."""
    losses = {
        ("raw", None): 1.0,
        ("raw_equal_total", None): 0.8,
        ("identity", "open"): 0.9,
        ("identity", "closed"): 0.5,
        ("resae", "open"): 1.1,
        ("resae", "closed"): better,
    }
    measured = [(m, loop, 8, value) for (m, loop), value in losses.items()]
    rows = [
        made(ReplacementRow, method=m, loop=loop, mode=mode, k=k, layers=["a", "b"], delta_ce=value)
        for m, loop, k, value in (*measured, ("affine_only", None, None, 0.4))
        for mode in ("online", "teacher_forced", "error_added")
    ]
    redundancy = [
        made(RedundancyRow, method=m, k=8, mean_max_cos=value, random_floor=0.3)
        for m, value in (("raw", 0.6), ("identity", 0.33), ("resae", better))
    ]
    return Evaluation(rows, [], redundancy, [], [])


def test_findings_say_when_a_claim_does_not_hold():
    good, bad = findings(rows_where(0.31), 0.0), findings(rows_where(1.2), 0.0)
    assert any("below 0.6 at every k" in s and "NOT" not in s for s in good)
    assert any("NOT below 0.6" in s for s in bad)
    assert any("NOT within" in s for s in bad)
    assert any("the order VARIES" in s for s in bad)
    assert any("closed is below open" in s for s in good)
    assert any("ahead of the last at 1 of 1 k" in s for s in good)
    assert any("ahead of the last at 0 of 1 k" in s for s in bad)
    assert not any("less than ReSAE at" in s for s in good)
    assert any("less than ReSAE at k = 8" in s for s in bad)


def further_rows(ratio):
    """A report in which the further methods are `ratio` times what they are held against."""
    rows = [
        made(ReplacementRow, method=m, loop=loop, mode=mode, k=8, layers=["a"], delta_ce=value)
        for m, loop, value in (
            ("raw", None, 1.0), ("mlsae", None, 1.0), ("resae", "closed", 0.5),
            ("resae_closed", "closed", 0.5 * ratio), ("all_previous", "closed", 0.5),
        )
        for mode in ("online", "teacher_forced")
    ]  # fmt: skip
    fvu = FvuRow(k=8, layer="a", fvu=ratio, single=1.0, over_single=ratio - 1)
    change = {"rest": 0.005 * ratio, "csrc": -0.12 / ratio}
    return report_of(
        rows,
        affine=[LayerPairRow(m, "a", 0.9) for m in ("resae", "all_previous")],
        reconstruction=[
            made(ReconstructionRow, method=m, loop="closed", k=8, layer="a", fvu_stream=value)
            for m, value in (("resae", 0.2), ("resae_closed", 0.2 * ratio))
        ],
        mlsae=[fvu],
        hierarchical=[NestedFvuRow(**vars(fvu), truncated=1.01)],
        boost=[
            made(BoostRow, text=text, which=which, layer="a", change=value)
            for text, value in change.items()
            for which in ("after", "after, TopK alone")
        ],
    )


def test_findings_on_further_methods_say_when_a_bound_does_not_hold():
    good, bad = extra_findings(further_rows(0.9), 4), extra_findings(further_rows(1.25), 4)
    assert len(good) == len(bad) == 5
    assert "better at 1 of 1 k" in good[0]
    assert "worse at none of 1 k" in good[0]
    assert "last layer 0.180 against 0.200" in good[0]
    assert "better at 0 of 1 k" in bad[0]
    assert "worse at 1 of 1 k" in bad[0]
    assert "-10.0% at k = 8" in good[3]
    assert ": within 3 %" in good[3]
    assert "better than an ordinary SAE truncated to that k in 1 of 1" in good[3]
    assert "NOT within 3 %" in bad[3]
    assert "in 0 of 1" in bad[3]
    assert "never saw csrc and beside them others trained on it alone (k = 4)" in good[4]
    assert ": within the bounds" in good[4]
    assert "NOT within the bounds" in bad[4]
    plain = report_of(rows_where(0.3).replacement)
    assert extra_findings(plain, 4) == []  # nothing was asked for


def fair_rows(resae):
    """Fair rows in which ReSAE loses `resae`, raw SAEs 1.0, and less with each advantage."""
    losses = {"raw": 1.0, "raw_equal_total": 0.8, "raw_matched": 0.7, "raw_wide": 0.6}
    losses |= {"identity": 0.55, "resae": resae}
    sizes = {"k": 8, "k_per_layer": [8, 8], "teacher_forced": 0.4}
    rows = [
        made(FairRow, method=f"{name}{suffix}", online=loss, train_tokens=tokens, **sizes)
        for name, loss in losses.items()
        for suffix, tokens in (("", 200), ("_best_lr", 200), ("_long", 800))
    ]
    moved = {"k_per_layer": [9, 7], "online": 0.3, "teacher_forced": 0.6}
    return [*rows, replace(rows[0], method="resae_k_first", **moved)]


def test_findings_on_fair_rows_name_the_raw_saes_that_resae_is_not_ahead_of():
    def found(fair):
        return extra_findings(report_of(rows_where(0.3).replacement, fair=fair), 4)

    ahead, behind = (found(fair_rows(x)) for x in (0.5, 0.65))
    starts = ("At the usual", "Each at its own best", "After 800 tokens")
    assert all(s.startswith(x) for s, x in zip(ahead, starts, strict=False))
    for one, other in zip(ahead[:3], behind[:3], strict=True):
        assert one.count("ahead at 1 of 1 k") == 4
        assert other.count("ahead at 1 of 1 k") == 3
        assert other.endswith("have 0.600 (ReSAE is ahead at 0 of 1 k).")
    assert "online best with (9, 7), teacher-forced with (8, 8)" in ahead[3]
    grid = [
        replace(fair_rows(0.5)[0], method=f"raw_lr_{lr:g}", lr=[lr], online=loss)
        for lr, loss in ((4e-3, 0.9), (8e-3, 0.7), (1.6e-2, 0.8))
    ]
    (sentence,) = found(grid)
    assert sentence == "Least lost online among the learning rates: raw 0.700 at 0.008."
    short = [row for row in fair_rows(0.5) if row.method in ("raw", "resae", "raw_matched")]
    assert len(found(short)) == 1


def test_findings_elsewhere_say_where_residuals_gain_nothing():
    rows = [
        made(ElsewhereRow, where=where, method=method, mode="online", loop=loop, k=8,
             layers=["blocks.1.hook_mlp_out"], delta_ce=loss, of_raw=loss / 2)
        for where, resae in (("mlp_out", 1.9), ("all_blocks", 0.6))
        for method, loop, loss in (("raw", None, 2.0), ("raw_equal_total", None, 1.5),
                                   ("identity", "closed", 3.0), ("resae", "open", 9.0),
                                   ("resae", "closed", resae))
    ]  # fmt: skip
    report = report_of(rows_where(0.3).replacement, elsewhere=rows)
    none, gain = extra_findings(report, 4)
    assert "With 1.hook_mlp_out replaced" in none
    assert "0.95 of what raw SAEs lose, 1.27 of it at equal total: NO gain there." in none
    assert "0.30 of what raw SAEs lose, 0.40 of it at equal total." in gain
