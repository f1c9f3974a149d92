"""The commands on other families than Pythia: one of the table, and one found by its shape."""

import json

import pytest
import tiny
from commands import SMALL, TRAIN
from families import made

from resae.cli import main


@pytest.mark.parametrize("kind", ["opt", "exaone"])
def test_a_run_from_maps_to_generated_text(kind, material, tmp_path, capsys):
    made(kind).model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    source = [str(tmp_path / "model"), str(material / "text.txt"), "--layers", "0,1"]
    fitted, run = tmp_path / "fit", tmp_path / "run"
    fit = ["fit", *source, "--context-tokens", "24", "--held-out-rows", "8"]
    assert main([*fit, "--calibration-tokens", "2048", "--out", str(fitted)]) == 0
    train = ["train", *source, *TRAIN[2:], *SMALL, "--train-tokens", "512"]
    assert main([*train, "--out", str(run)]) == 0
    assert main(["eval", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert {row["method"] for row in report["replacement"]} == {"resae", "affine_only"}
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "The cat", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.strip()
