import json
import sys

import interventions
import pytest
import torch

from resae import ReSAE
from resae.cli import main
from resae.console import ProgressEstimate
from resae.demo.comparison import BOOST_DOMAIN, run_demo
from resae.demo.recipes import ELSEWHERE, EXTRA_METHODS, FAIR_METHODS, RECIPES
from resae.demo.stages import DemoConfig
from resae.report.page import write_report


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo at one k and with fewer tokens: what holds at full size must hold here too."""
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--out", str(out), "--k", "8", "--train-tokens", "100000"]
    arguments += ["--tune-tokens", "25600"]
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


def test_the_bench_of_interventions_runs_dry_on_it(demo, tmp_path, monkeypatch):
    command = ["interventions.py", str(demo), "--dry", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert interventions.main() == 0
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
    methods = {"raw", "raw_equal_total", "identity", "resae", "resae_online", "affine_only"}
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


def test_tuned_online_resae_loses_less_at_a_fidelity_that_stays(report):
    tuned, before = (delta(report, m, "online", "closed") for m in ("resae_online", "resae"))
    assert tuned < 0.9 * before
    fvu = {
        (r["method"], r["layer"]): r["fvu_stream"]
        for r in report["reconstruction"]
        if r["loop"] == "closed"
    }
    for layer in report["config"]["layers"]:
        assert fvu["resae_online", layer] < 1.25 * fvu["resae", layer]
    assert any("Tuned online" in sentence for sentence in report["findings"])


def test_teacher_forced_collapse_is_said_and_exact(report):
    assert report["teacher_forced_collapse"] == 0.0
    assert any("difference 0)" in sentence for sentence in report["findings"])


def test_the_first_layer_of_resae_is_the_raw_one(demo):
    """Same data, same seed, nothing to predict it from: the same autoencoder, bit for bit."""
    raw, ours = (ReSAE.load(demo / "stacks" / f"{name}_k8").sae(0) for name in ("raw", "resae"))
    for a, b in zip(raw.parameters(), ours.parameters(), strict=True):
        assert (a == b).all()


def test_everything_is_written(demo, report):
    assert report["schema_version"] == 1
    assert report["config"]["model"] == "embedded"
    assert len(report["samples"]) == 9
    assert all(s["replaced"] > 0 for s in report["samples"] if "replaced online" in s["how"])
    assert (demo / "report.html").stat().st_size > 50_000
    assert len(list((demo / "figures").iterdir())) == 5
    assert len(list((demo / "stacks").iterdir())) == 5


def test_a_stack_of_the_demo_can_be_used_by_hand(demo, tmp_path, capsys):
    stack = str(demo / "stacks" / "resae_k8")
    assert main(["generate", stack, "--prompt", "In the", "--max-new-tokens", "4"]) == 0
    assert "layers replaced online" in capsys.readouterr().out
    assert main(["eval", stack, "--out", str(tmp_path)]) == 2
    assert "name it with --data" in capsys.readouterr().err
    arguments = ["--data", "embedded", "--held-out-rows", "2", "--out", str(tmp_path)]
    assert main(["eval", stack, *arguments]) == 0
    assert (tmp_path / "report.json").exists()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All methods, hardly trained: that each trains on the embedded model and is in the report."""
    out = tmp_path_factory.mktemp("everything")
    config = DemoConfig(
        k=(4, 8),
        train_tokens=8_192,
        calibration_tokens=8_192,
        held_out_rows=2,
        context_tokens=64,
        tune_tokens=1_024,
        methods=EXTRA_METHODS,
    )
    said = []
    run_demo(out, config, log=said.append, progress=said.append)
    assert said[0].startswith("39 stacks of 3 autoencoders")
    assert [line.split(" for ")[0] for line in said[1:4]] == ["4 stacks"] * 3
    assert said[4].startswith("8,192 training tokens (32,768 where long)")
    (stages,) = {line[1:].split("]")[0].split("/")[1] for line in said if line.startswith("[")}
    assert any(line.startswith(f"[{stages}/{stages}]") for line in said)
    return out


def test_every_further_method_has_its_rows_tables_and_finding(everything):
    report = json.loads((everything / "report.json").read_text())
    online = {r["method"]: r for r in report["replacement"] if r["mode"] == "online"}
    assert set(online) >= {*EXTRA_METHODS, "raw_truncated", "boost_base"} - set(ELSEWHERE)
    fvu = {(r["method"], r["k"]) for r in report["reconstruction"]}
    assert fvu >= {(m, k) for m in ("mlsae", "hierarchical", "resae_closed") for k in (4, 8)}
    assert ("raw_truncated", 4) in fvu
    assert {r["k"] for r in report["hierarchical"]} == {4, 8}
    assert len(report["mlsae"]) == 6
    assert {r["method"] for r in report["routing"]} == {
        m for m in EXTRA_METHODS if m.startswith("all_previous")
    }
    redundancy = {r["method"] for r in report["redundancy"]}
    assert "mlsae" not in redundancy  # one dictionary repeats no other
    for name in ("closed loop", "MLSAE", "HierarchicalTopK", "SAE Boost", "from all before it"):
        assert any(name in sentence for sentence in report["findings"]), name
    page = write_report(everything).read_text()
    for heading in ("one dictionary for all layers", "one domain added", "at every k", "come from"):
        assert heading in page
    assert "without an advantage for ReSAE" in page
    assert "at other hook points" in page


def test_fair_rows_have_the_sizes_that_they_are_named_after(everything):
    report = json.loads((everything / "report.json").read_text())
    rows = {(r["method"], r["k"]): r for r in report["fair"]}
    assert {m for m, _ in rows} == {*(r.name for r in RECIPES), *FAIR_METHODS}
    for k in (4, 8):
        matched, wide, ours = (rows[m, k] for m in ("raw_matched", "raw_wide", "resae"))
        assert matched["d_sae"] == [512, 1024, 1536]
        assert wide["d_sae"] == [1536] * 3
        assert matched["k_per_layer"] == wide["k_per_layer"] == [k, 2 * k, 3 * k]
        assert ours["d_sae"] == [512] * 3
        assert matched["lr"] == wide["lr"] == ours["lr"] == [8e-3] * 3
    assert rows["resae_k_first", 8]["k_per_layer"] == [16, 5, 3]
    assert rows["resae_k_falling", 8]["k_per_layer"] == [12, 8, 4]
    assert rows["resae_k_rising", 8]["k_per_layer"] == [4, 8, 12]
    assert {r["train_tokens"] for (m, _), r in rows.items() if m.endswith("_long")} == {4 * 8_192}
    assert rows["resae_best_lr", 8]["lr"] == [1.6e-2] * 3
    # What more training and other sizes do is measured, not repeated from another row.
    assert len({r["online"] for r in rows.values()}) == len(rows)
    stack = ReSAE.load(everything / "stacks" / "raw_matched_long_k8")
    assert stack.d_sae == (512, 1024, 1536)


def test_other_hook_points_have_the_four_methods_beside_each_other(everything):
    report = json.loads((everything / "report.json").read_text())
    layers = {r["where"]: r["layers"] for r in report["elsewhere"]}
    assert layers["all_blocks"] == [f"blocks.{block}.hook_resid_post" for block in range(8)]
    for site in ("mlp_out", "attn_out"):
        assert layers[site] == [f"blocks.{block}.hook_{site}" for block in (1, 3, 5)]
    for where in ELSEWHERE:
        rows = [r for r in report["elsewhere"] if (r["where"], r["mode"]) == (where, "online")]
        assert {r["method"] for r in rows} == {r.name for r in RECIPES}
        raw = next(r["delta_ce"] for r in rows if r["method"] == "raw")
        assert all(r["of_raw"] == r["delta_ce"] / raw for r in rows)


def test_the_boost_helps_where_it_was_trained_and_its_base_is_untouched(everything):
    report = json.loads((everything / "report.json").read_text())
    rows = {(r["text"], r["which"], r["layer"]): r for r in report["boost"]}
    for layer in report["config"]["layers"]:
        assert rows[BOOST_DOMAIN, "after, TopK alone", layer]["change"] < -0.05
        assert rows[BOOST_DOMAIN, "after", layer]["change"] < 0
        kept = abs(rows["rest", "after", layer]["change"])
        assert kept < abs(rows["rest", "after, TopK alone", layer]["change"]) + 0.01
    base_stack = ReSAE.load(everything / "stacks" / "boost_base_k8")
    boosted = ReSAE.load(everything / "stacks" / "boost_k8")
    for layer in range(3):
        kept = boosted.sae(layer).frozen.state_dict()
        assert all(torch.equal(t, kept[n]) for n, t in base_stack.sae(layer).state_dict().items())


def test_unknown_methods_are_refused_before_any_work(capsys):
    assert main(["demo", "--methods", "boost,magic", "--out", "/nonexistent/demo"]) == 2
    assert "unknown method magic; choose of resae_closed" in capsys.readouterr().err


def test_plan_corrects_its_estimate_by_the_speed_it_meets(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("resae.console.time.perf_counter", lambda: clock[0])
    lines = []
    plan = ProgressEstimate({"first": 10.0, "second": 90.0}, lines.append)
    plan.stage("first")
    assert "[1/2] first" in lines[-1]
    assert "about 100 s left" in lines[-1]
    clock[0] = 30.0  # three times slower than expected
    plan.stage("second")
    assert "[2/2] second" in lines[-1]
    assert "about 210 s left" in lines[-1]


@pytest.mark.parametrize(
    "k", [(), (8, 4), (8, 8), (200,), (0,)], ids=["none", "falling", "twice", "large", "zero"]
)
def test_impossible_k_are_refused_before_any_work(k):
    with pytest.raises(ValueError, match="demo: k="):
        DemoConfig(k=k)


@pytest.mark.parametrize("size", [{"train_tokens": 1_023}, {"held_out_rows": 0}], ids=str)
def test_impossible_sizes_are_refused_before_any_work(size):
    with pytest.raises(ValueError, match="demo: train_tokens="):
        DemoConfig(**size)


def test_one_layer_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        DemoConfig(layers=("3",))


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
