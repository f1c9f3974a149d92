import json
import subprocess
import sys
from pathlib import Path

import pytest

from resae import ReSAE
from resae.cli import main
from resae.demo import DemoConfig, Plan, findings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo at one k and with fewer tokens: what holds at full size must hold here too."""
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--k", "8", "--train-tokens", "100000"]
    assert main([*arguments, "--held-out-rows", "32"]) == 0
    return out


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo / "report.json").read_text())


def delta(report, method, mode, loop, layers=3):
    (row,) = [
        r
        for r in report["replacement"]
        if (r["method"], r["mode"], r["loop"], len(r["layers"])) == (method, mode, loop, layers)
    ]
    return row["delta_ce"]


def test_online_resae_loses_less_than_0_6_of_what_raw_saes_lose(report):
    ours, raw = delta(report, "resae", "online", "closed"), delta(report, "raw", "online", None)
    assert 0 < ours < 0.6 * raw


def test_closed_loop_loses_less_than_open_with_clean_codes(report):
    closed, opened = (delta(report, "resae", "teacher_forced", x) for x in ("closed", "open"))
    assert 0 < closed < opened


def test_residual_dictionaries_are_as_different_as_random_directions(report):
    rows = {r["method"]: r for r in report["redundancy"]}
    assert rows["resae"]["mean_max_cos"] < rows["resae"]["random_floor"] + 0.05
    assert rows["raw"]["mean_max_cos"] > rows["raw"]["random_floor"] + 0.2


def test_the_bench_of_interventions_runs_dry_on_it(demo, tmp_path):
    command = [sys.executable, "bench/interventions.py", str(demo), "--dry", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / "interventions.md").read_text()
    cosines = [line.split(" | ")[3] for line in text.splitlines() if "| blocks." in line]
    assert len(cosines) == 2 * 2 * 2
    assert all(0.2 < float(cosine) < 1 for cosine in cosines)
    assert "| replaced |" in text
    assert "| two latents a layer edited |" in text


def test_residual_against_the_stream_before_replacement_loses_the_gain(report):
    before = delta(report, "resae", "online", "open")
    assert before > 1.5 * delta(report, "resae", "online", "closed")


def test_controls_are_there_beside_the_method(report):
    methods = {"raw", "raw_equal_total", "identity", "resae", "affine_only"}
    assert {r["method"] for r in report["replacement"]} == methods
    totals = {r["method"]: r["active_total"] for r in report["replacement"]}
    assert totals["raw_equal_total"] == totals["resae"] == totals["identity"] == 24
    assert totals["raw"] == 8
    assert totals["affine_only"] == 0
    assert {r["hop"] for r in report["affine"] if r["method"] == "resae"} == {
        "blocks.1.hook_resid_post → blocks.3.hook_resid_post",
        "blocks.3.hook_resid_post → blocks.5.hook_resid_post",
    }
    learned = [r["r2"] for r in report["affine"] if r["method"] == "resae"]
    identity = [r["r2"] for r in report["affine"] if r["method"] == "identity"]
    assert all(a > b > 0.5 for a, b in zip(learned, identity, strict=True))


def test_teacher_forced_collapse_is_said_and_exact(report):
    assert report["teacher_forced_collapse"] == 0.0
    assert any("exactly 0" in sentence for sentence in report["findings"])


def test_the_first_layer_of_resae_is_the_raw_one(demo):
    """Same data, same seed, nothing to predict it from: the same autoencoder, bit for bit."""
    raw, ours = (ReSAE.load(demo / "stacks" / f"{name}_k8").sae(0) for name in ("raw", "resae"))
    for a, b in zip(raw.parameters(), ours.parameters(), strict=True):
        assert (a == b).all()


def test_everything_is_written(demo, report):
    assert report["schema_version"] == 1
    assert report["config"]["model"] == "embedded"
    assert len(report["samples"]) == 6
    assert all(s["replaced"] > 0 for s in report["samples"] if "replaced online" in s["how"])
    assert (demo / "report.html").stat().st_size > 50_000
    assert len(list((demo / "figures").iterdir())) == 5
    assert len(list((demo / "stacks").iterdir())) == 4


def test_a_stack_of_the_demo_can_be_used_by_hand(demo, tmp_path, capsys):
    stack = str(demo / "stacks" / "resae_k8")
    assert main(["generate", stack, "--prompt", "In the", "--max-new-tokens", "4"]) == 0
    assert "layers replaced online" in capsys.readouterr().out
    assert main(["eval", stack, "--out", str(tmp_path)]) == 2
    assert "name it with --data" in capsys.readouterr().err
    arguments = ["--data", "embedded", "--held-out-rows", "2", "--out", str(tmp_path)]
    assert main(["eval", stack, *arguments]) == 0
    assert (tmp_path / "report.json").exists()


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
    rows = [
        {"method": m, "loop": loop, "mode": mode, "k": 8, "layers": ["a", "b"], "delta_ce": value}
        for (m, loop), value in losses.items()
        for mode in ("online", "teacher_forced", "error_added")
    ]
    rows += [
        {"method": "affine_only", "loop": None, "mode": mode, "k": None, "layers": ["a", "b"],
         "delta_ce": 0.4} for mode in ("online", "teacher_forced", "error_added")
    ]  # fmt: skip
    redundancy = [
        {"method": m, "k": 8, "mean_max_cos": value, "random_floor": 0.3}
        for m, value in (("raw", 0.6), ("identity", 0.33), ("resae", better))
    ]
    return {"replacement": rows, "redundancy": redundancy}


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


def test_plan_corrects_its_estimate_by_the_speed_it_meets(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("resae.demo.time.perf_counter", lambda: clock[0])
    lines = []
    plan = Plan({"first": 10.0, "second": 90.0}, lines.append)
    plan.stage("first")
    assert "[1/2] first" in lines[-1]
    assert "about 100 s left" in lines[-1]
    clock[0] = 30.0  # three times slower than expected
    plan.stage("second")
    assert "[2/2] second" in lines[-1]
    assert "about 210 s left" in lines[-1]


@pytest.mark.parametrize(
    "k", [(), (8, 4), (8, 8), (200,)], ids=["none", "falling", "twice", "large"]
)
def test_impossible_k_are_refused_before_any_work(k):
    with pytest.raises(ValueError, match="demo: k="):
        DemoConfig(k=k)


def test_one_layer_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        DemoConfig(layers=("3",))


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
