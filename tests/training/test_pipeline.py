"""Training from Python: what the command does, without the command."""

import json
import logging
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from commands import SMALL, TRAIN

from resae import HookedLM, ReSAE, TopKSAE
from resae.cli import main
from resae.data.activations import capture_tokens
from resae.data.rows import read_rows
from resae.sae.base import SAEConfig
from resae.sae.registry import sae_from_record
from resae.storage import load_json
from resae.training import FitConfig, RunConfig, fit_maps, run
from resae.training.maps import FittedMaps

SETTINGS = {
    "layers": ("0", "1", "3"),
    "k": 4,
    "context_tokens": 24,
    "held_out_rows": 8,
    "train_tokens": 2048,
    "batch_tokens": 64,
    "buffer_tokens": 512,
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
    loaded = RunConfig.load(file, out=str(tmp_path / "other"), train_tokens=128)
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


@pytest.fixture(scope="module")
def raw(material):
    """A stack of autoencoders that were trained apart: two of TopK, one with thresholds."""
    saes = {layer: TopKSAE(SAEConfig(32, 48, 6), seed=layer).eval() for layer in (0, 3)}
    record = TopKSAE(SAEConfig(32, 64, 6), seed=1).record()
    saes[1] = sae_from_record(replace(record, threshold=torch.full((64,), 0.5)), max_active=64)
    stack = ReSAE.from_saes(saes, HookedLM.from_pretrained(str(material / "model")))
    stack.save_pretrained(material / "raw")
    return material / "raw"


def test_maps_are_fitted_on_reconstructions(raw, text, tmp_path):
    """Beside a solver on all tokens of the text, in float64."""
    small = {"context_tokens": 24, "held_out_rows": 8, "calibration_tokens": 2048, "ridge": 0.0}
    settings = {**text, **small, "on_reconstructions": str(raw)}
    folder = fit_maps(FitConfig(**settings, out=str(tmp_path / "maps")))
    maps = FittedMaps.open(folder)
    stack, config = ReSAE.load(raw), FitConfig(**settings, out="unused")
    assert maps.record["layers"] == stack.hook_points
    assert maps.record["on_reconstructions"] == str(raw)
    lm = HookedLM.from_pretrained(text["model"])
    points = lm.hook_points(stack.hook_points)
    rows = read_rows(config, lm)[0].batches(8)
    parts = [capture_tokens(lm, ids, points) for ids in rows]
    xs = [torch.cat(x)[:2048] for x in zip(*parts, strict=True)]
    with torch.no_grad():
        x_hats = [x.double() for x in stack(xs).x_hats]
    for layer in (1, 2):
        ones = torch.cat([x_hats[layer - 1], torch.ones(2048, 1, dtype=torch.float64)], 1)
        # Reconstructions lie in a subspace: predictions are compared, of which there is one best.
        best = ones @ torch.linalg.lstsq(ones, xs[layer].double(), driver="gelsd").solution
        found = maps.calibration.predictor(layer, [x.float() for x in x_hats])
        torch.testing.assert_close(found.double(), best, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="has layers .*; leave --layers out"):
        fit_maps(FitConfig(**settings, layers=("0", "1"), out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_chain_starts_from_a_raw_autoencoder_and_keeps_its_bits(
    raw, text, layer, tmp_path, caplog
):
    """Of TopK, and with thresholds."""
    caplog.set_level(logging.INFO, logger="resae")
    stack = ReSAE.load(raw)
    first = stack.sae(layer)
    config = {
        **text,
        **SETTINGS,
        "layers": (str(layer), "3"),
        "k": None,
        "k_per_layer": (first.config.k, 4),
        "d_sae": (first.config.d_sae, 64),
        "train_tokens": 512,
        "loop": "closed",
        "first_sae": str(raw / stack.hook_points[layer]),
        "out": str(tmp_path / "run"),
    }
    steps = iter([False] * 2 + [True])
    run(RunConfig(**config, eval_steps=2), stopping=nullcontext(lambda: next(steps)))
    trained = run(RunConfig(**config, eval_steps=2, resume=True)).stack
    assert same(trained.sae(0), first)
    assert trained.sae(0).kind == first.kind
    assert same(ReSAE.load(tmp_path / "run"), trained)
    uninterrupted = run(RunConfig(**config | {"out": str(tmp_path / "again")})).stack
    assert same(uninterrupted, trained)
    random = TopKSAE(trained.sae(1).config, seed=1)  # the second layer was trained
    assert not torch.equal(trained.sae(1).W_dec, random.W_dec)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    fvu = [json.loads(line)["layers"][0]["fvu"] for line in lines]
    assert all(0 < value < 10 for value in fvu)
    assert any("--first-sae: " in line and "no record of the text" in line
               for line in caplog.messages)  # fmt: skip


def test_a_first_autoencoder_that_does_not_fit_is_refused_and_nothing_is_written(
    raw, done, text, tmp_path
):
    config = {**text, **SETTINGS, "out": str(tmp_path / "run")}
    first = str(raw / ReSAE.load(raw).hook_points[0])
    residual = str(done.folder / done.config.layers[1])
    for changes, error, message in (
        ({"first_sae": first}, ValueError, "k=6 and 48 latents, the first layer has k=4 and 64"),
        ({"first_sae": residual}, ValueError, "encodes residuals of a prediction"),
        ({"first_sae": str(raw)}, FileNotFoundError, "cfg.json"),
        ({"first_sae": first, "layers": ("0",)}, ValueError, "nothing is trained"),
        ({"first_sae": first, "prefixes": (2, 4)}, ValueError, "leave one out"),
    ):
        with pytest.raises(error, match=message):
            run(RunConfig(**config | changes))
    assert not (tmp_path / "run").exists()


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
