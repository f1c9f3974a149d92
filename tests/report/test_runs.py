import json
import re

import pytest
from report_material import replacement_row, report_of

from resae.cli import main
from resae.report.content import load_report
from resae.report.runs import write_comparison
from resae.storage import save_json


@pytest.fixture
def runs(tmp_path):
    """Two reports of the same text, the second with one method, other layers and settings."""
    rows = [
        replacement_row("resae", "closed", mode, 8, 0.1, layers=("blocks.2.x",))
        for mode in ("online", "teacher_forced")
    ]
    second = report_of(replacement=rows, title="Another", findings=[], samples=[])
    second["config"] = second["config"] | {"layers": ["blocks.2.x"], "seed": 7}
    for name, report in (("first", report_of()), ("second", second)):
        save_json(tmp_path / name / "report.json", report)
    return tmp_path / "first", tmp_path / "second"


def test_methods_of_each_run_are_rows_of_their_own(runs, tmp_path):
    page = write_comparison(runs, tmp_path / "both").read_text()
    report = load_report(tmp_path / "both" / "report.json")
    assert {row.method for row in report.replacement} == {
        *("raw (first)", "resae (first)", "affine_only (first)", "resae (second)")
    }
    assert len(report.replacement) == 18
    assert [run.name for run in report.runs] == ["first", "second"]
    assert report.runs[1].config["seed"] == 7
    assert report.findings == ["first: ReSAE < raw"]
    assert report.samples[0].how == "plain (first)"
    # Both are whole: each with all layers that its method has.
    assert "by 0.10 nats per token with ReSAE (second), and by 0.12 with ReSAE (first)" in page
    assert "ReSAE (second), closed loop" in page
    assert '<tr class="marked">\n<th scope="row" data-value="seed">' in page
    assert "Read with care" not in page


def test_a_comparison_is_drawn_again_like_any_report(runs, tmp_path):
    page = write_comparison(runs, tmp_path / "both")
    text = page.read_text()
    assert main(["report", str(tmp_path / "both")]) == 0
    assert page.read_text() == text


def test_runs_on_other_text_are_compared_with_a_warning(runs, tmp_path):
    report = json.loads((runs[1] / "report.json").read_text())
    for row in report["replacement"]:
        row["ce_clean"] = 3.5
    save_json(runs[1] / "report.json", report)
    page = write_comparison(runs, tmp_path / "both").read_text()
    assert "Read with care" in page
    assert "3.0000 on 1,000 positions, 3.5000 on 1,000 positions" in page


def test_the_command_compares_runs_into_a_folder_of_its_own(runs, tmp_path, capsys):
    names = list(map(str, runs))
    assert main(["report", *names, "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "both" / "report.html")
    for arguments, problem in (
        (names, "2 runs to compare; name a folder with --out"),
        ([*names, "--out", names[0]], "holds one of the reports to compare"),
        ([names[0], names[0], "--out", str(tmp_path / "c")], "two or more different runs"),
        ([names[0], "--out", str(tmp_path / "c")], "--out is for the comparison of several runs"),
        ([names[0], str(tmp_path / "no"), "--out", str(tmp_path / "c")], "no .*no/report.json"),
    ):
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.search(problem, said)
    assert not (tmp_path / "c").exists()
    assert not (runs[0] / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        save_json(tmp_path / name / "run" / "report.json", report_of())
    write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "out")
    report = load_report(tmp_path / "out" / "report.json")
    assert [run.name for run in report.runs] == ["a/run", "b/run"]
