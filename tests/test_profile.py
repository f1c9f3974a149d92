import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resae.cli import main
from resae.profile import Case, Clock, Roofs, check, make_inputs, profile, providers, trace

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = [
    Case(op, 6, 32, 64, 4, L=3 if op == "chain" else 1)
    for op in ("encode", "decode", "train", "chain")
]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.op)
def test_every_provider_is_checked_and_timed_hot_and_cold(case):
    roofs = Roofs(copy=1e10, product=1e11)
    rows = profile(case, device=CPU, roofs=roofs, clock=Clock(CPU), rounds=2)
    names = {row["provider"] for row in rows}
    assert any(name.startswith("resae") for name in names)
    assert len(names) >= 2
    assert {(r["provider"], r["cache"]) for r in rows} == {
        (n, c) for n in names for c in ("hot", "cold")
    }
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["percent_of_roof"] == pytest.approx(1e5 * roofs.seconds(case) / row["ms_p50"])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.op)
def test_a_wrong_provider_is_not_timed(case):
    inputs = make_inputs(case, CPU)
    name, call = next(iter(providers(case, inputs, {}).items()))
    outputs = [t.clone() if t.is_floating_point() else t for t in call()]
    check(case, inputs, name, outputs)
    outputs[0] = outputs[0] * 1.01
    with pytest.raises(ValueError, match="is wrong on"):
        check(case, inputs, name, outputs)


def test_work_of_a_worked_example():
    moved, computed = Case("encode", N=2, D=3, M=5, k=1).work()
    assert moved == (5 * 3 + 2 * 3) * 4 + 2 * (4 + 8)
    assert computed == 2 * 2 * 3 * 5
    assert Roofs(copy=moved, product=computed / 2).seconds(Case("encode", 2, 3, 5, 1)) == 2.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param(("fly", 1, 1, 1, 1), "unknown op 'fly'", id="op"),
        pytest.param(("encode", 0, 1, 1, 1), "N=0", id="tokens"),
        pytest.param(("encode", 1, 1, 2, 3), "k=3 exceeds M=2", id="k"),
        pytest.param(("encode", 1, 1, 1, 1, "int8"), "unknown dtype", id="dtype"),
    ],
)
def test_impossible_cases_are_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        Case(*sizes)


def test_trace_lists_what_ran(tmp_path):
    ran = trace(SMALL[0], device=CPU, path=tmp_path / "trace.json")
    assert any("resae::topk_encode" in row["name"] for row in ran)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_command_prints_roofs_and_the_table(capsys, tmp_path):
    arguments = [
        "profile",
        "decode",
        "--tokens",
        "4",
        "--width",
        "16",
        "--latents",
        "32",
        "--k",
        "2",
    ]
    path = str(tmp_path / "trace.json")
    assert main([*arguments, "--rounds", "1", "--trace", path]) == 0
    printed = capsys.readouterr().out
    assert "roofs of this machine" in printed
    assert "| decode N=4 D=16 M=32 k=2 float32 | resae | hot |" in printed
    assert "resae::sparse_decode" in printed


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("ops", {"ops.csv", "ops.md", "ops.svg", "environment.json"}),
        ("questions", {"questions.md"}),
    ],
)
def test_bench_runs_dry_and_writes_its_files(tmp_path, script, files):
    command = [sys.executable, f"bench/{script}.py", "--dry", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    assert {p.name for p in tmp_path.iterdir()} == files
    assert (tmp_path / f"{script}.md").read_text().count("\n| ") > 10
