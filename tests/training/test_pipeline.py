"""Training from Python: what the command does, without the command."""

import json
import logging
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from commands import SMALL, TRAIN

from resae import ReSAE
from resae.cli import main
from resae.storage import load_json
from resae.training import FitConfig, RunConfig, fit_maps, run

SETTINGS = {
    "layers": ("0", "1", "3"),
    "k": 4,
    "context_tokens": 24,
    "held_out_rows": 8,
    "train_tokens": 4096,
    "batch_tokens": 128,
    "buffer_tokens": 1024,
    "calibration_tokens": 2048,
    "d_sae": 64,
}
"""Settings of TRAIN and SMALL."""


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def text(material):
    return {"model": str(material / "model"), "data": str(material / "text.txt")}


@pytest.fixture(scope="module")
def done(material, text):
    return run(RunConfig(**text, **SETTINGS, out=str(material / "python")))


def test_python_and_the_command_train_the_same_to_the_bit(done, material, text, capsys):
    assert capsys.readouterr() == ("", "")
    command = ["train", *text.values(), *TRAIN, *SMALL, "--out", str(material / "command")]
    assert main(command) == 0
    assert same(ReSAE.load(material / "command"), done.stack)
    records = [load_json(material / n / "run.json", "run") for n in ("python", "command")]
    for name in ("command", "environment", "config"):
        ours, theirs = (record.pop(name) for record in records)
        assert (ours == theirs) == (name == "environment")
    assert records[0] == records[1]
    assert done.config.layers == tuple(done.stack.hook_points)
    assert done.config.d_saes == (64, 64, 64)


def test_the_record_of_a_run_repeats_it(done, tmp_path, capsys):
    file = str(done.folder / "run.json")
    assert main(["train", "--config", file, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert same(ReSAE.load(tmp_path / "run"), done.stack)
    config = load_json(tmp_path / "run" / "run.json", "run")["config"]
    assert config.keys() == {f.name for f in fields(RunConfig)} - {"resume"}
    loaded = RunConfig.load(file, out=str(tmp_path / "other"), train_tokens=256)
    assert run(loaded).config.steps == 2


def test_a_run_is_stopped_and_goes_on(done, text, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="resae")
    config = {**text, **SETTINGS, "out": str(tmp_path / "run")}
    steps = iter([False] * 4 + [True])
    cut = run(RunConfig(**config), stopping=nullcontext(lambda: next(steps)))
    assert cut.stack is None
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step_00000005.safetensors"
    ]
    resumed = run(RunConfig(**config, resume=True))
    assert same(resumed.stack, done.stack)
    assert any("autoencoders of 64 latents" in line for line in caplog.messages)


def test_maps_are_fitted_apart(done, text, tmp_path):
    shared = {name: SETTINGS[name] for name in ("layers", "context_tokens", "held_out_rows")}
    config = FitConfig(**text, **shared, calibration_tokens=2048, out=str(tmp_path / "maps"))
    folder = fit_maps(config)
    record = json.loads((folder / "fit.json").read_text())
    # A run fits on its buffer, whose activations are rounded to bfloat16.
    of_run = load_json(done.folder / "run.json", "run")["affine"]
    for ours, theirs in zip(record["affine"], of_run, strict=True):
        assert (ours["method"], ours["hop"]) == (theirs["method"], theirs["hop"])
        assert ours["r2"] == pytest.approx(theirs["r2"], rel=0.01)
    of_maps = {n: v for n, v in SETTINGS.items() if n not in ("layers", "calibration_tokens")}
    again = run(RunConfig(**text, **of_maps, maps=str(folder), out=str(tmp_path / "run")))
    maps, copied = (path / "calibration.safetensors" for path in (folder, again.folder))
    assert maps.read_bytes() == copied.read_bytes()
    assert load_json(again.folder / "run.json", "run")["affine"] == record["affine"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        fit_maps(config)


def test_what_is_wrong_is_raised_and_nothing_is_written(done, text, tmp_path):
    config = {**text, **SETTINGS, "out": str(tmp_path / "run")}
    for changes, error, message in (
        ({"model": "/no/such"}, FileNotFoundError, "not found"),
        ({"layers": None}, ValueError, "layers is missing"),
        ({"k": 65}, ValueError, "k=65"),
        ({"resume": True}, FileNotFoundError, "no run in"),
        ({"out": str(done.folder)}, ValueError, "not empty"),
    ):
        with pytest.raises(error, match=message):
            run(RunConfig(**config | changes))
    assert not (tmp_path / "run").exists()
