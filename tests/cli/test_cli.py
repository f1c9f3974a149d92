import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from itertools import islice
from pathlib import Path
from string import ascii_letters

import pytest
import tiny
import torch
from commands import SMALL, TRAIN, free_ports
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resae.training.loop as training
from resae import HookedLM, ReSAE
from resae.cli import COMMANDS, GC_THRESHOLD, TerminalConsole, main
from resae.data import cache as activation_cache
from resae.data.rows import TokenRows
from resae.data.text_record import RunText, TrainedText
from resae.data.texts import fingerprint, load_texts
from resae.storage import load_json, load_tensors


@pytest.fixture(scope="module")
def run(material):
    out = material / "run"
    code = main(
        ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
        + ["--out", str(out), "--log-steps", "8"]
    )
    assert code == 0
    return out


def test_a_run_directory_holds_the_stack_the_log_and_what_was_asked(run, material):
    stack = ReSAE.from_pretrained(str(run))
    assert stack.hook_points == tiny.NAMES
    assert stack.model_identity.name == str(material / "model")
    record = json.loads((run / "run.json").read_text())
    assert record["train"]["k"] == [4, 4, 4]
    assert record["train"]["lr"] == pytest.approx(8e-3 * (512 / 64) ** 0.5)
    assert record["train"]["dead_after_tokens"] == 2048 // 8
    assert record["command"].startswith(f"resae train {material / 'model'} ")
    assert "--log-steps 8" in record["command"]
    assert record["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    text = (material / "text.txt").read_text()
    assert record["data_fingerprint"] == fingerprint([text])
    assert {"commit", "torch", "datasets"} <= record["environment"].keys()
    assert {row["method"] for row in record["affine"]} == {"identity", "resae"}
    lines = (run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8, 16, 24, 32]


def test_eval_then_report(run, capsys):
    assert main(["eval", str(run), "--reference", "affine_only", "--generation", "3"]) == 0
    printed = capsys.readouterr().out
    assert "affine_only" in printed
    assert "nats per token; reference: affine_only; brackets: 95 % intervals" in printed
    assert "resae, closed loop, k = 4: the layers one by one lose" in printed
    report = json.loads((run / "report.json").read_text())
    assert {r["method"] for r in report["replacement"]} == {"resae", "affine_only"}
    for row in report["replacement"]:
        assert row["delta_ce_low"] <= row["delta_ce"] <= row["delta_ce_high"]
        cost = f"{row['delta_ce']:.4f} [{row['delta_ce_low']:.4f}, {row['delta_ce_high']:.4f}]"
        assert cost in printed or len(row["layers"]) == 1
        assert row["reference"] == (None if row["method"] == "affine_only" else "affine_only")
    assert {len(row["layers"]) for row in report["replacement"]} == {1, 3}
    assert {row["ablation"] for row in report["ablation"]} == {"zero", "mean"}
    assert report["config"]["resampled"] == "rows"
    for row in report["generation"]:
        assert (row["prompts"], row["prompt_tokens"], row["new_tokens"]) == (3, 12, 12)
        assert f"{row['agreement_tokens']:.4f} [" in printed
    hows = [sample["how"] for sample in report["samples"]]
    assert hows == ["nothing replaced", "ReSAE, k = 4, all layers replaced online"] * 3
    assert len({sample["prompt"] for sample in report["samples"]}) == 3
    assert [sample["replaced"] > 0 for sample in report["samples"]] == [False, True] * 3
    assert not (run / "evaluation.partial.safetensors").exists()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 10_000


def test_tasks_need_the_harness_before_anything_is_measured(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(run), "--tasks", "arc_easy"]) == 2
    assert "lm_eval is not installed; pip install 'lm-eval[hf]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--generation", "3"), ("--tasks", "arc_easy")])
def test_text_needs_a_tokenizer_before_anything_is_measured(run, material, capsys, option):
    model = material / "no-tokenizer"
    assert main(["eval", str(run), "--model", str(model), *option]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "tokenizer" in line]
    assert f"{option[0]} needs a tokenizer, which model {model} does not have" in line


def test_runs_are_compared_in_one_table(run, material, tmp_path):
    raw = tmp_path / "raw"
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*arguments, "--predictor", "none", "--out", str(raw)]) == 0
    for runs in ([run, raw], [raw, run]):
        assert main(["eval", *map(str, runs), "--out", str(tmp_path / "both")]) == 0
        report = json.loads((tmp_path / "both" / "report.json").read_text())
        assert {r["method"] for r in report["replacement"]} == {"resae", "raw", "affine_only"}
        # Also where the first of the runs has no maps.
        assert [r["method"] for r in report["affine"]] == ["identity"] * 2 + ["resae"] * 2
        assert report["config"]["trained_on"] == [
            {"run": str(folder), "held_out": True} for folder in runs
        ]


def test_eval_trains_the_baselines_that_are_missing_once(run, tmp_path, monkeypatch, capsys):
    ours = tmp_path / "ours"
    shutil.copytree(run, ours)
    out = ["--out", str(tmp_path / "both")]
    trained = []

    def stop_after_one_step(self):
        trained.append(self)
        return lambda: len(trained) == 1

    # The first of the two is interrupted; the same command goes on with it.
    with monkeypatch.context() as patched:
        patched.setattr("resae.cli.train.Interruptible.__enter__", stop_after_one_step)
        patched.setattr("resae.cli.train.Interruptible.__exit__", lambda *_: None)
        assert main(["eval", str(ours), "--baselines", *out]) == 130
        assert not (tmp_path / "both" / "report.json").exists()
        assert main(["eval", str(ours), "--baselines", *out]) == 0
    assert "baseline raw: 2,048 training tokens" in capsys.readouterr().out
    folders = [tmp_path / "ours-baselines" / name for name in ("raw", "identity")]
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    methods = {r["method"] for r in report["replacement"]}
    assert methods == {"resae", "raw", "identity", "affine_only"}
    assert report["config"]["runs"] == [str(folder) for folder in (ours, *folders)]
    began = json.loads((ours / "run.json").read_text())["train"]
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())["train"]
        different = {name for name in began if record[name] != began[name]}
        assert different == {"predictor"}
    monkeypatch.setattr("resae.training.baselines.run", None)  # nothing is trained again
    assert main(["eval", str(ours), str(folders[0]), "--baselines", *out]) == 0
    assert "baseline identity: trained already" in capsys.readouterr().out
    record = json.loads((folders[1] / "run.json").read_text())
    record["config"]["train_tokens"] = 8192
    (folders[1] / "run.json").write_text(json.dumps(record))
    assert main(["eval", str(ours), "--baselines"]) == 2
    assert "begun with other settings" in capsys.readouterr().err


@pytest.fixture
def evaluated(monkeypatch):
    """The rows that `resae eval` would evaluate on; evaluating itself ends there."""
    rows = []

    def evaluate(*arguments, **_):
        rows.append(torch.cat(list(arguments[2])))
        raise ValueError("enough")

    monkeypatch.setattr("resae.evaluation.comparison.evaluate", evaluate)
    return rows


def rows_of_text(path, context_tokens):
    (text,) = load_texts(str(path))
    return torch.stack(list(TokenRows([text], tiny.tokenizer(), context_tokens)))


def test_eval_takes_only_text_that_the_run_held_out(run, material, evaluated, capsys):
    every = rows_of_text(material / "text.txt", 24)
    assert main(["eval", str(run)]) == 2
    assert torch.equal(evaluated.pop(), every[:8])
    assert main(["eval", str(run), "--held-out-rows", "5"]) == 2
    assert torch.equal(evaluated.pop(), every[:5])
    assert main(["eval", str(run), "--context-tokens", "47"]) == 2
    assert torch.equal(evaluated.pop(), rows_of_text(material / "text.txt", 47)[:4])
    capsys.readouterr()
    for arguments in (["--held-out-rows", "9"], ["--context-tokens", "47", "--held-out-rows", "5"]):
        assert main(["eval", str(run), *arguments]) == 2
        assert re.search(r"held out [84] rows of (24|47) tokens", capsys.readouterr().err)
    same = ["--data", str(material / "text.txt"), "--held-out-rows"]
    assert main(["eval", str(run), *same, "9"]) == 2
    assert "was trained on this text (8 of 72 compared" in capsys.readouterr().err
    assert not evaluated
    assert main(["eval", str(run), *same, "8"]) == 2
    assert torch.equal(evaluated.pop(), every[:8])


def test_eval_says_where_the_held_out_text_was_trained_on_as_well(run, evaluated, tmp_path, capsys):
    """A corpus that holds a document twice: the rows were held out, their text was not."""
    shutil.copytree(run, tmp_path / "run")
    text = TrainedText()
    for row in RunText.load(run).held_out.tolist():
        text.add(row)
    text.save(tmp_path / "run")
    assert main(["eval", str(run)]) == main(["eval", str(tmp_path / "run")]) == 2
    assert len(evaluated) == 2
    assert capsys.readouterr().out.count("the data repeats itself") == 1


def test_eval_knows_text_that_was_trained_on_by_its_content(run, material, tmp_path, capsys):
    """Under another name, from another place on, and beside other text; other text is taken."""
    words = (material / "text.txt").read_text()
    cut = (tmp_path / "cut.txt", words[2000:])
    mixed = (tmp_path / "mixed.txt", words[5000:5600] + " ".join(ascii_letters for _ in range(50)))
    new = (tmp_path / "new.txt", "".join(islice(load_texts("embedded", split="validation"), 3)))
    for path, text in (cut, mixed, new):
        path.write_text(text)
        out = ["--out", str(tmp_path / path.stem)]
        code = main(["eval", str(run), "--data", str(path), *out])
        said = capsys.readouterr()
        if path is new[0]:
            assert code == 0
            assert f"{run} was trained on 0 of " in said.out
            continue
        assert code == 2
        assert f"{run} was trained on this text" in said.err
        assert main(["eval", str(run), "--data", str(path), *out, "--allow-trained-text"]) == 0
        report = load_json(tmp_path / path.stem / "report.json", "report")
        (of_run,) = report["config"]["trained_on"]
        assert of_run["known"] > 0.05 * of_run["compared"]


def test_runs_of_other_seeds_are_not_scored_on_their_training_text(
    material, tmp_path, evaluated, capsys
):
    """Without a validation split the seed decides which documents are held out; with one, other
    seeds and more rows are compared on it."""
    for split in (["train"], ["train", "validation"]):
        folder = tmp_path / "-".join(split)
        folder.mkdir()
        for name in split:
            texts = islice(load_texts("embedded", split=name), 60)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{name}.jsonl").write_text(lines)
        train = ["train", str(material / "model"), str(folder), *TRAIN[:4], *SMALL]
        train += ["--context-tokens", "48", "--held-out-rows", "8", "--train-tokens", "4096"]
        train += ["--batch-tokens", "128"]
        runs = [str(tmp_path / f"{folder.name}{seed}") for seed in (0, 1)]
        for seed, out in enumerate(runs):
            assert main([*train, "--seed", str(seed), "--out", out]) == 0
        capsys.readouterr()
        assert main(["eval", *runs]) == 2
        said = capsys.readouterr().err
        if split == ["train"]:
            assert f"{runs[1]} was trained on this text" in said
            assert not evaluated
        else:
            assert "enough" in said
            assert main(["eval", *runs, "--held-out-rows", "40"]) == 2
            assert [len(rows) for rows in evaluated] == [8, 40]


def test_a_run_without_a_record_of_its_text_is_evaluated_only_on_request(
    run, tmp_path, evaluated, capsys
):
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "held_out.safetensors").unlink()
    (tmp_path / "old" / "trained_text.safetensors").unlink()
    assert main(["eval", str(tmp_path / "old")]) == 2
    assert "old has no record of the text" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "old"), "--allow-trained-text"]) == 2
    assert torch.equal(evaluated.pop(), RunText.load(run).held_out)
    assert "not known whether it was trained on this text" in capsys.readouterr().out


def test_a_run_is_measured_at_lower_k(run, tmp_path):
    assert main(["eval", str(run), "--k", "1,4", "--out", str(tmp_path / "ks")]) == 0
    report = json.loads((tmp_path / "ks" / "report.json").read_text())
    assert {r["k"] for r in report["replacement"]} == {1, 4, None}
    l0 = {r["k"]: r["l0"] for r in report["reconstruction"] if r["method"] == "resae"}
    assert l0[1] <= 1 < l0[4] <= 4


def test_layers_of_different_sizes_at_other_hook_points_with_a_warning(
    material, tmp_path, capsys, caplog
):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--layers", "blocks.0.hook_mlp_out,blocks.1.hook_mlp_out", "--out"]
    arguments += [str(tmp_path / "run")]
    assert main([*arguments, "--d-sae", "32,96"]) == 0
    assert ReSAE.load(tmp_path / "run").d_sae == (32, 96)
    assert "2 autoencoders of (32, 96) latents" in capsys.readouterr().out
    assert "at hook_mlp_out predicting a layer from others gained nothing" in caplog.text
    assert main(["eval", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["config"]["d_sae"] == [32, 96]
    caplog.clear()
    arguments[-1] = str(tmp_path / "raw")
    assert main([*arguments, "--predictor", "none"]) == 0
    assert not caplog.text
    assert main([*arguments, "--d-sae", "32,64,96", "--plan"]) == 2
    assert "3 d_sae for 2 layers; give one number, or one per layer" in capsys.readouterr().err


def test_a_run_is_boosted_on_other_text_and_compared(run, material, tmp_path):
    model, out = str(material / "model"), tmp_path / "boosted"
    (tmp_path / "other.txt").write_text("if (x == NULL) { return -1; }\n" * 900)
    arguments = ["train", model, str(tmp_path / "other.txt"), "--boost", str(run), "--k", "2"]
    arguments += [*TRAIN[4:], *SMALL, "--out", str(out)]
    assert main(arguments) == 0
    assert ReSAE.load(out).hook_points == tiny.NAMES
    assert main([*arguments, "--resume"]) == 0
    base_stack, boosted = RunText.load(run), RunText.load(out)
    for path in (material / "text.txt", tmp_path / "other.txt"):
        assert boosted.overlap(rows_of_text(path, 24)[20:60]).new is False
    assert base_stack.overlap(rows_of_text(tmp_path / "other.txt", 24)).new is True
    assert main(["eval", str(run), str(out), "--out", str(tmp_path / "both")]) == 0
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert {r["method"] for r in report["replacement"]} == {"resae", "boost", "affine_only"}


def test_generate_prints_both_texts_and_the_counts(run, capsys):
    assert main(["generate", str(run), "--prompt", "The cat", "--max-new-tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert "nothing replaced" in printed
    assert "3 layers replaced online" in printed
    prompt = len(tiny.tokenizer()("The cat")["input_ids"]) + 1
    for name in tiny.NAMES:
        line = next(x for x in printed.splitlines() if x.startswith(name))
        assert "6 forward passes" in line
        assert f"{prompt + 5 - 1} tokens replaced, 1 special" in line


def test_generate_writes_the_same_fast(run, capsys):
    arguments = ["generate", str(run), "--prompt", "The cat", "--max-new-tokens", "6"]
    printed = []
    for fast in ([], ["--fast"]):
        assert main([*arguments, "--show-latents", "2", *fast]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_generate_edits_latents_and_shows_them(run, tmp_path, capsys):
    edits = [
        {"layer": 1, "action": "clamp", "latents": [5], "value": 30.0, "at": "generated"},
        {"layer": 3, "action": "ablate", "latents": [5], "at": "last_prompt"},
    ]
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    arguments = ["generate", str(run), "--prompt", "The cat", "--max-new-tokens", "6"]
    printed = []
    for source in (str(tmp_path / "edits.json"), json.dumps(edits)):
        assert main([*arguments, "--intervene", source, "--show-latents", "2"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    lines = printed[0].splitlines()
    assert "— and latents edited, error left out, effects propagated —" in lines
    name = tiny.NAMES[1]
    assert f"{name}: clamp latents 5 value 30 of layer 1, generated: 5 changes" in lines
    assert any(x.startswith(f"{tiny.NAMES[2]}: change arriving here") for x in lines)
    latents = lines[lines.index(next(x for x in lines if x.startswith("latent:act"))) + 1 :]
    assert len(latents) == 5
    assert all("1| 5:30.00 " in line for line in latents)
    assert main([*arguments, "--intervene", '[{"layer": 2}]']) == 2
    assert "interventions: edit 1: no 'action'" in capsys.readouterr().err


def test_fit_writes_maps_and_their_r2(material, tmp_path, capsys):
    out = tmp_path / "fit"
    code = main(
        ["fit", str(material / "model"), str(material / "text.txt"), "--layers", "0,1,3"]
        + ["--context-tokens", "24", "--held-out-rows", "8", "--calibration-tokens", "2048"]
        + ["--out", str(out)]
    )
    assert code == 0
    assert capsys.readouterr().out.count("R² blocks") == 4
    names = ["calibration.safetensors", "fit.json", "trained_text.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == names


@pytest.fixture(scope="module")
def fitted(material):
    out = material / "fitted"
    arguments = ["fit", str(material / "model"), str(material / "text.txt"), "--layers", "0,1,3"]
    arguments += ["--context-tokens", "24", "--held-out-rows", "8", "--calibration-tokens", "2048"]
    arguments += ["--predictor", "all_previous", "--map-type", "diagonal", "--out", str(out)]
    assert main(arguments) == 0
    return out


def test_train_takes_the_maps_of_fit_and_fits_none(material, fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resae.training.maps.measure_moments", None)
    monkeypatch.setattr("resae.training.pipeline.measure_moments", None)
    arguments = ["train", str(material / "model"), str(material / "text.txt"), "--k", "4"]
    arguments += ["--context-tokens", "24", "--held-out-rows", "8", "--d-sae", "64"]
    arguments += ["--train-tokens", "512", "--batch-tokens", "128", "--maps", str(fitted)]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert f"affine maps: those of {fitted}" in capsys.readouterr().out
    name = "calibration.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (fitted / name).read_bytes()
    record, of_fit = (load_json(p, "") for p in (tmp_path / "run/run.json", fitted / "fit.json"))
    assert record["affine"] == of_fit["affine"]
    assert record["maps"] == str(fitted)
    settings = {
        n: record["train"][n] for n in ("predictor", "map_type", "rank", "calibration_tokens")
    }
    assert settings == {
        "predictor": "all_previous",
        "map_type": "diagonal",
        "rank": None,
        "calibration_tokens": 2048,
    }
    assert ReSAE.load(tmp_path / "run").predictor.map_type == "diagonal"
    resumed = [*arguments, "--out", str(tmp_path / "run"), "--resume"]
    assert main(resumed) == 0
    resumed.remove("--maps")
    resumed.remove(str(fitted))
    resumed += ["--layers", "0,1,3", "--predictor", "all_previous", "--map-type", "diagonal"]
    assert main([*resumed, "--calibration-tokens", "2048"]) == 2
    assert f"began with maps={fitted}" in capsys.readouterr().err


def test_files_of_an_earlier_version_with_the_name_form_are_read(material, fitted, tmp_path):
    """`map_type` was `form`, in records, descriptions and checkpoints."""
    maps, out = tmp_path / "maps", tmp_path / "run"
    shutil.copytree(fitted, maps)
    arguments = ["train", str(material / "model"), str(material / "text.txt"), "--k", "4"]
    arguments += ["--context-tokens", "24", "--held-out-rows", "8", "--d-sae", "64"]
    arguments += ["--train-tokens", "512", "--batch-tokens", "128", "--maps", str(maps)]
    arguments += ["--out", str(out)]
    assert main(arguments) == 0
    (checkpoint,) = (out / "checkpoints").iterdir()
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    metadata["config"] = metadata["config"].replace('"map_type"', '"form"')
    save_file(load_file(checkpoint), checkpoint, metadata)
    for file in (maps / "fit.json", out / "run.json", out / "resae.json"):
        text = file.read_text()
        assert '"map_type"' in text
        file.write_text(text.replace('"map_type"', '"form"'))
    assert ReSAE.load(out).predictor.map_type == "diagonal"
    assert main([*arguments, "--resume"]) == 0
    again = ["--out", str(tmp_path / "again")]
    assert main(["train", "--config", str(out / "run.json"), *again]) == 0
    assert ReSAE.load(tmp_path / "again").predictor.map_type == "diagonal"


def test_the_maps_of_a_run_give_the_same_run_again(run, material, tmp_path):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*arguments, "--maps", str(run), "--out", str(tmp_path / "again")]) == 0
    one, other = (ReSAE.load(folder).state_dict() for folder in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_k_per_layer_gives_each_layer_its_own(material, tmp_path):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN[:2]]
    arguments += [*TRAIN[4:], *SMALL, "--k-per-layer", "6,4,2", "--train-tokens", "512"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    stack = ReSAE.load(tmp_path / "run")
    assert [stack.sae(layer).config.k for layer in range(3)] == [6, 4, 2]


def test_fit_says_where_the_prediction_comes_from(material, tmp_path, capsys):
    arguments = ["fit", str(material / "model"), str(material / "text.txt"), "--layers", "0,1,3"]
    arguments += ["--context-tokens", "24", "--held-out-rows", "8", "--calibration-tokens", "2048"]
    arguments += ["--predictor", "all_previous", "--map-type", "diagonal"]
    assert main([*arguments, "--out", str(tmp_path / "fit")]) == 0
    assert "all previous layers, diagonal: " in capsys.readouterr().out
    rows = json.loads((tmp_path / "fit" / "fit.json").read_text())["affine"]
    (shares,) = [row["shares"] for row in rows if "shares" in row]
    assert list(shares) == tiny.NAMES[:2]
    assert sum(shares.values()) == pytest.approx(1)
    assert main([*arguments, "--rank", "3", "--out", str(tmp_path / "new")]) == 2
    assert "rank=3" in capsys.readouterr().err


def train_saying(arguments, said):
    """`resae train` in this process, which prints into the file `said`."""
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY), 1)
    log = TerminalConsole.log

    def log_slowly(console, line=""):
        log(console, line)
        time.sleep(0.02)  # time for a signal between two steps

    TerminalConsole.log = log_slowly
    sys.exit(main(arguments))


def test_interrupted_by_a_signal_and_resumed_ends_in_the_same_bits(run, material, processes):
    """The whole way: another process, SIGTERM in the middle, --resume."""
    out, said = material / "cut", material / "said"
    said.touch()
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--out", str(out), "--log-steps", "1"]
    process = processes.Process(target=train_saying, args=(arguments, said))
    process.start()
    while "step 5/" not in said.read_text():
        assert process.is_alive()
        time.sleep(0.003)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130
    assert "continue with --resume" in said.read_text()
    assert not (out / "resae.json").exists()
    assert main([*arguments, "--resume"]) == 0
    whole, resumed = (ReSAE.load(folder).state_dict() for folder in (run, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_goes_on_to_more_tokens(run, material, tmp_path, capsys):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    more = [*arguments, "--train-tokens", "4096"]
    begun = ["--warmup-steps", str(0.05 * 32), "--dead-after-tokens", str(2048 // 8)]
    assert main([*more, *begun, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(run, tmp_path / "run")
    assert main([*more, "--resume", "--out", str(tmp_path / "run")]) == 0
    whole, resumed = (ReSAE.load(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    records = [load_json(tmp_path / name / "run.json", "run") for name in ("whole", "run")]
    assert records[0]["train"] == records[1]["train"]
    assert same_text(tmp_path / "whole", tmp_path / "run")
    capsys.readouterr()
    assert main([*arguments, "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "train_tokens=4096" in capsys.readouterr().err


class Stand:
    """In the place of a module, a class and what it makes: remembers what was called."""

    def __init__(self, calls):
        self.calls, self.id = calls, "run-1"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append(("closed", error, {}))


def test_progress_goes_to_tensorboard_and_wandb_with_delta_ce(run, material, monkeypatch, capsys):
    out = material / "followed"
    boards, wandb = [], []
    monkeypatch.setitem(sys.modules, "tensorboard", Stand([]))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Stand(boards))
    monkeypatch.setitem(sys.modules, "wandb", Stand(wandb))
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--out", str(out), "--log-steps", "8", "--eval-steps", "12"]
    arguments += ["--tensorboard", "--wandb", "shelf"]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["delta_ce"]] == [12, 24, 32]
    assert "ΔCE online" in capsys.readouterr().out
    # Looking on does not change the weights; the last numbers are those of an evaluation.
    one, other = (ReSAE.load(folder).state_dict() for folder in (run, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["eval", str(out), "--out", str(out)]) == 0
    for row in json.loads((out / "report.json").read_text())["replacement"]:
        of_all = (row["method"], row["loop"], len(row["layers"])) == ("resae", "closed", 3)
        if of_all and row["mode"] != "error_added":
            assert lines[-1]["delta_ce"][row["mode"]] == pytest.approx(row["delta_ce"], abs=1e-5)
    logged = {args[0] for call, args, _ in boards if call == "add_scalar"}
    assert {"delta_ce/online", f"{tiny.NAMES[2]}/dead_fraction", "loss"} <= logged
    assert boards[0][0] == "SummaryWriter"
    assert boards[0][2] == {"purge_step": 8}
    assert boards[-1][0] == "closed"
    assert wandb[0][2]["project"] == "shelf"
    assert wandb[0][2]["id"] is None
    steps = [kwargs["step"] for call, _, kwargs in wandb if call == "log"]
    assert steps == [8, 12, 16, 24, 32]
    assert wandb[-1][0] == "finish"
    wandb.clear()
    assert main([*arguments, "--resume"]) == 0
    assert wandb[0][2]["id"] == "run-1"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_is_named_before_anything_runs(name, material, monkeypatch, capsys):
    monkeypatch.setattr("resae.training.loggers.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    arguments = ["train", "no-model", "no-data", "--k", "4", "--out", str(material / "none")]
    assert main([*arguments, f"--{name}", *(["shelf"] if name == "wandb" else [])]) == 2
    assert f'pip install "resae[{name}]"' in capsys.readouterr().err


def same_text(run, other):
    """True if two runs record the same text."""
    names = ("held_out.safetensors", "trained_text.safetensors")
    records = [[load_tensors(folder / name, name) for name in names] for folder in (run, other)]
    return all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in zip(*records, strict=True)
        for name in ours.keys() | theirs.keys()
    )


def train_until(arguments, written):
    """`resae train` in this process, which is killed when it has written the temporary file of this
    name, before it gets its own."""
    torch.set_num_threads(1)
    fsync = os.fsync

    def killed(descriptor):
        if written is not None and written in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = killed
    TerminalConsole.log = lambda *_: time.sleep(0.02)  # time to be killed between two writes
    sys.exit(main(arguments))


def test_killed_at_any_moment_and_resumed_ends_in_the_same_bits(run, material, processes):
    out = material / "killed"
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--out", str(out), "--log-steps", "1", "--checkpoint-steps", "4"]
    moments = ["run.json", "calibration", 6, "step_00000012", 17, "resae.json"]
    for moment in moments:
        written = moment if isinstance(moment, str) else None
        if (out / "run.json").exists():
            arguments = [*arguments, "--resume"]
        process = processes.Process(target=train_until, args=(arguments, written))
        process.start()
        log = out / "log.jsonl"
        while process.is_alive() and written is None:
            if log.exists() and len(log.read_text().splitlines()) >= moment:
                process.kill()
            time.sleep(0.003)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert not (out / "resae.json").exists()
        left_over = [p.name for p in out.rglob(".*.partial")]
        assert written is None or any(written in name for name in left_over)
    assert main(arguments) == 0
    assert not list(out.rglob(".*.partial"))
    whole, resumed = (ReSAE.load(folder).state_dict() for folder in (run, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 33))
    assert same_text(run, out)


HOLDS = """import sys, time
from pathlib import Path
from resae.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)"""


def holder_of(folder):
    """Another process that writes into a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_is_dead(
    run, material, tmp_path, capsys
):
    text = [str(material / "model"), str(material / "text.txt")]
    train = ["train", *text, *TRAIN, *SMALL]
    fit = ["fit", *text, "--layers", "0,1", *TRAIN[4:], "--calibration-tokens", "256"]
    out = ["--out", str(tmp_path / "out")]
    resume = [*train, "--out", str(run), "--resume"]
    for folder, commands in (
        (tmp_path / "out", ([*fit, *out], [*train, *out], ["demo", *out])),
        (run, [resume]),
    ):
        process = holder_of(folder)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for arguments in commands:
            assert main(arguments) == 2
            said = capsys.readouterr().err
            assert f"process {process.pid} on {socket.gethostname()}, started 2" in said
            assert said.count("\n") == 1
        assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        process.kill()
        process.communicate()
        assert (folder / ".lock").exists()
    assert main([*fit, *out]) == 0
    assert main(resume) == 0
    assert not list(tmp_path.rglob(".lock"))
    assert not list(run.rglob(".lock"))


def test_a_model_spread_over_devices_trains_the_same(run, material, capsys):
    pytest.importorskip("accelerate")
    out = material / "spread"
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--out", str(out), "--model-device", "auto"]
    assert main([*arguments, "--eval-steps", "8"]) == 2
    assert "--model-device auto" in capsys.readouterr().err
    assert main(arguments) == 0
    one, spread = (ReSAE.load(folder).state_dict() for folder in (run, out))
    assert all(torch.equal(one[name], spread[name]) for name in one)


def test_torchrun_trains_on_two_shares_of_the_rows(run, material):
    out = material / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "resae", "train", str(material / "model"), str(material / "text.txt")]
    command += [*TRAIN, *SMALL, "--out", str(out), "--log-steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 32/32") == 1  # rank 0 alone speaks
    one, two = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (run, out)
    )
    for ours, theirs in zip(one, two, strict=True):
        assert ours["step"] == theirs["step"]
        # Other rows in each batch, of the same text.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.25)
    assert ReSAE.load(out).hook_points == tiny.NAMES
    text, rows = RunText.load(out), rows_of_text(material / "text.txt", 24)
    assert text.overlap(rows[8:40]).known == 32 * 8
    assert torch.equal(text.held_out, rows[:8])


def of_two(rank, ports, runs, cut):
    """One of two ranks, as torchrun starts them: the first run is cut, the last has no model."""
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    activation_cache.SHARD_TOKENS = 16 * 24
    step = training.train_step

    def cut_after(state, *rest):
        if state.step == cut and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    codes = []
    for port, arguments in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        training.train_step = step if codes else cut_after
        if len(codes) == len(runs) - 1:
            HookedLM.capture = None
        codes.append(main(arguments))
        torch.distributed.destroy_process_group()
    assert codes == [130, *(0 for _ in runs[1:])]


def test_each_rank_keeps_its_share_on_disk_and_goes_on_from_it(
    material, tmp_path, processes, capsys
):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--cache", str(tmp_path / "cache")]
    cut, whole = ([*arguments, "--out", str(tmp_path / name)] for name in ("cut", "whole"))
    runs = [cut, [*cut, "--resume"], whole]
    ports = free_ports(len(runs))
    pair = [processes.Process(target=of_two, args=(rank, ports, runs, 9)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in pair] == [0, 0]
    resumed, stack = (ReSAE.load(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(resumed[name], stack[name]) for name in stack)
    shares = {path.name for path in (tmp_path / "cache").iterdir()}
    assert shares == {"train.0of2", "train.1of2", "held_out"}
    assert main([*arguments, "--out", str(tmp_path / "alone")]) == 2
    assert "of another number of ranks (train.0of2, train.1of2)" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()


def bad(material, tmp_path):
    """Case → (arguments, what the one line says)."""
    model, text = str(material / "model"), str(material / "text.txt")
    out = ["--out", str(tmp_path / "new")]
    train = ["train", model, text, *TRAIN, *SMALL]
    layered = ["train", model, text, *TRAIN[:2], *TRAIN[4:], *SMALL, "--k-per-layer"]
    below_a_file = ["--out", str(material / "text.txt" / "new")]
    writing = ["generate", str(material / "run"), "--prompt", "x"]
    maps = ["train", model, text, *TRAIN[2:], *SMALL, *out, "--maps", str(material / "fitted")]
    return {
        "missing-model": (["train", "/no/such/model", text, *TRAIN, *out], "not found"),
        "empty-dataset": (["train", model, str(material / "empty.txt"), *TRAIN, *out], "empty"),
        "missing-dataset": (["train", model, "/no/such.txt", *TRAIN, *out], "not found"),
        "k-above-M": ([*train, "--k", "65", *out], "k=65"),
        "layer-twice": ([*train, "--layers", "1,1", *out], "selected twice"),
        "layers-out-of-order": ([*train, "--layers", "3,1", *out], "out of order"),
        "layer-out-of-range": ([*train, "--layers", "1,9", *out], "out of range"),
        "k-above-the-trained": (["eval", str(material / "run"), "--k", "5"], "expected 1 to 4"),
        "no-layers": (["train", model, text, "--k", "4", *out], "--layers is missing"),
        "boost-nothing": (
            ["train", model, text, "--k", "4", "--boost", str(tmp_path), *out],
            "not a run directory",
        ),
        "boost-other-layers": (
            [*train, "--layers", "0,1", "--boost", str(material / "run"), *out],
            "leave --layers out",
        ),
        "resume-nothing": ([*train, "--resume", *out], "no run in"),
        "run-exists": ([*train, "--out", str(material / "run")], "--resume"),
        "not-a-run": (["eval", str(tmp_path)], "not a run directory"),
        "generate-not-a-run": (["generate", str(tmp_path), "--prompt", "x"], "not a run"),
        "no-report": (["report", str(tmp_path)], "resae eval"),
        "another-model": (
            ["eval", str(material / "run"), "--model", str(material / "other")],
            "different models",
        ),
        "several-k": ([*train, "--k", "4,8,32", *out], "--k-per-layer 4,8,32"),
        "k-twice": ([*train, "--k-per-layer", "4,4,4", *out], "not allowed with"),
        "k-of-two-layers": ([*layered, "4,4", *out], "2 k for 3 layers"),
        "k-0": ([*train, "--k", "0", *out], "argument --k: '0': expected"),
        "demo-k-0": (["demo", "--k", "0", *out], "from 1 on"),
        "demo-k-falls": (["demo", "--k", "8,4", *out], "rising"),
        "demo-too-few-tokens": (["demo", "--train-tokens", "10", *out], "a batch of 1024"),
        "demo-layer": (["demo", "--layers", "1,,3", *out], "expected names"),
        "context-of-train": ([*train, "--context-tokens", "65", *out], "65 tokens .* 64 tokens"),
        "context-of-plan": (
            [*train, "--context-tokens", "65", "--plan", *out],
            "65 tokens .* 64 tokens",
        ),
        "context-of-eval": (
            ["eval", str(material / "run"), "--context-tokens", "65"],
            "65 tokens .* 64 tokens",
        ),
        "not-utf8": (
            ["train", model, str(material / "latin1.txt"), *TRAIN, *out],
            r"latin1.txt: byte 0xf6 at offset 1 is not UTF-8",
        ),
        "mixed-folder": (
            ["fit", model, str(material / "mixed"), "--layers", "0,1", *TRAIN[4:], *out],
            r"1 \.txt \(a.txt\), 1 \.jsonl \(b.jsonl\)",
        ),
        "no-tokenizer": (
            ["train", str(material / "no-tokenizer"), text, *TRAIN, *out],
            "has no tokenizer",
        ),
        "broken-jsonl": (
            ["train", model, str(material / "broken.jsonl"), *TRAIN, *out],
            "broken.jsonl, line 2",
        ),
        "integer-column": (
            ["train", model, str(material / "integers.jsonl"), *TRAIN, *out],
            "holds int64, expected strings",
        ),
        "null-column": (
            ["train", model, str(material / "nulls.jsonl"), *TRAIN, *out],
            "1 of 2 entries of column 'text' are null",
        ),
        "unknown-option": ([*train, "--layer-count", "3", *out], "^resae train: .*--layer-count 3"),
        "unknown-argument": (["push", "a", "b/c", "more", "x"], "^resae push: .*: more x"),
        "no-data": (["train", model, "", *TRAIN, *out], "argument DATA: is empty"),
        "no-model": (["train", "", text, *TRAIN, *out], "argument MODEL: is empty"),
        "no-out": ([*train, "--out", ""], "argument --out: is empty"),
        "train-out": ([*train, *below_a_file], "text.txt is a file, expected a folder"),
        "fit-out": (["fit", model, text, "--layers", "0,1", *below_a_file], "text.txt is a file"),
        "demo-out": (["demo", *below_a_file], "text.txt is a file"),
        "eval-out": (["eval", str(material / "run"), *below_a_file], "text.txt is a file"),
        "cache": ([*train, "--cache", str(material / "text.txt"), *out], "text.txt is a file"),
        "trace": (["profile", "encode", "--trace", str(material)], "is a folder"),
        "device": ([*train, "--device", "gpu", *out], "auto, cpu, cuda or cuda:1"),
        "device-of-profile": (["profile", "encode", "--device", "gpu"], "auto, cpu, cuda or"),
        "device-of-tune": (["tune", "--device", "gpu"], "auto, cpu, cuda or"),
        "device-99": ([*train, "--device", "cuda:99", *out], "device 'cuda:99': torch .* finds"),
        "model-device": ([*train, "--model-device", "gpu", *out], "auto, cpu, cuda or cuda:1"),
        **{
            f"{option}-{value}": ([*train, f"--{option}", value, *out], f"--{option}: '{value}'")
            for option, value in (
                ("log-steps", "0"),
                ("checkpoint-steps", "0"),
                ("eval-steps", "0"),
                ("keep-checkpoints", "0"),
                ("d-sae", "0"),
                ("expansion", "-1"),
                ("lr", "0"),
                ("lr", "nan"),
                ("ridge", "-1"),
                ("auxk-coefficient", "-1"),
                ("dead-after-tokens", "0"),
                ("seed", "-1"),
                ("held-out-rows", "-1"),
                ("context-tokens", "1"),
                ("plan-ranks", "0"),
            )
        },
        "eval-steps-without-rows": (
            [*train, "--eval-steps", "4", "--held-out-rows", "0", *out],
            "hold rows out",
        ),
        "rank-above-width": (
            [*train, "--map-type", "low_rank", "--rank", "33", *out],
            "--rank 33 exceeds the width",
        ),
        "cache-dtype-alone": ([*train, "--cache-dtype", "bfloat16", *out], "without --cache"),
        "hook-point": ([*train, "--layers", "0,blocks.1.hook_x", *out], "unknown hook point"),
        "eval-subsets": (["eval", str(material / "run"), "--subsets", "2"], "is no layer of the"),
        "eval-subsets-order": (
            ["eval", str(material / "run"), "--subsets", "2,1"],
            "out of order",
        ),
        "eval-subsets-empty": (
            ["eval", str(material / "run"), "--subsets", "1,,2"],
            "expected none",
        ),
        "eval-reference": (
            ["eval", str(material / "run"), "--reference", "raw"],
            "reference 'raw' is no method here; expected one of resae, affine_only",
        ),
        "eval-twice": (["eval", *[str(material / "run")] * 2], "named twice"),
        "eval-rows": (["eval", str(material / "run"), "--held-out-rows", "0"], "from 1 on"),
        "intervene-file": ([*writing, "--intervene", "no/such.json"], "no file no/such.json"),
        "intervene-latent": (
            [*writing, "--intervene", '[{"layer": 0, "action": "ablate", "latents": [64]}]'],
            "64",
        ),
        "intervene-layer": (
            [*writing, "--intervene", '[{"layer": 2, "action": "ablate", "latents": [1]}]'],
            "not a replaced layer",
        ),
        "no-new-tokens": ([*writing, "--max-new-tokens", "0"], "from 1 on"),
        "prompt-beyond-context": ([*writing, "--max-new-tokens", "63"], "context of 64 tokens"),
        "temperature": ([*writing, "--temperature", "-1"], "from 0 on"),
        "no-maps": ([*train, "--maps", str(tmp_path), *out], "holds no maps"),
        "maps-and-boost": (
            [*train, "--maps", str(material / "fitted"), "--boost", str(material / "run"), *out],
            "leave one out",
        ),
        "maps-of-another-predictor": (
            [*maps, "--predictor", "previous"],
            "have predictor=all_previous, asked for previous",
        ),
        "maps-of-other-layers": ([*maps[:-2], "--layers", "0,1,2", *maps[-2:]], "of layers blocks"),
        "maps-of-another-model": (
            ["train", str(material / "other"), *maps[2:]],
            "fitted on model",
        ),
        "maps-of-another-split": ([*maps, "--seed", "1"], "fitted with seed=0 on this text"),
        "resume-other-model": (
            ["train", str(material / "other"), *train[2:], "--resume"]
            + ["--out", str(material / "run")],
            "began with model=",
        ),
        "resume-other-layers": (
            [*train, "--layers", "0,1,2", "--resume", "--out", str(material / "run")],
            "use the same",
        ),
    }


CASES = sorted(bad(Path("material"), Path("elsewhere")))


def exit_code(arguments):
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_with_the_remedy_and_exit_code_2(
    case, run, material, tmp_path, capsys, monkeypatch
):
    """All of it is judged before the weights of a model are read."""
    monkeypatch.setattr(HookedLM, "from_pretrained", None)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    arguments, message = bad(material, tmp_path)[case]
    assert exit_code(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said)
    assert said.startswith(f"resae {arguments[0]}: ")
    assert "\n" not in said
    assert not (tmp_path / "new").exists()
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_truncated_safetensors_file_is_named(run, material, capsys):
    damaged = material / "damaged"
    shutil.copytree(run, damaged)
    weights = damaged / tiny.NAMES[1] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["eval", str(damaged)]) == 2
    assert "truncated" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_text_that_was_changed(material, tmp_path, capsys):
    text = tmp_path / "text.txt"
    shutil.copy(material / "text.txt", text)
    arguments = ["train", str(material / "model"), str(text), *TRAIN, *SMALL]
    arguments += ["--train-tokens", "256", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main([*arguments, "--resume"]) == 0
    text.write_text(text.read_text().replace("cat", "cow"))
    assert main([*arguments, "--resume"]) == 2
    assert "text.txt holds other text than the run in" in capsys.readouterr().err


def test_truncated_weights_of_a_model_are_named(material, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(material / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ["train", str(model), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert re.search(r"model '.*': its weights are truncated", capsys.readouterr().err)


def test_the_device_is_said_first(run, capsys):
    arguments = ["generate", str(run), "--prompt", "x", "--device", "cpu"]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("device: cpu (1 threads)\n")


def test_nan_activations_stop_before_anything_is_written(material, tmp_path, capsys):
    broken = tiny.pythia()
    broken.blocks[1].mlp.dense_4h_to_h.weight.data[0, 0] = float("nan")
    broken.model.save_pretrained(tmp_path / "model")
    broken.tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["train", str(tmp_path / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert "hold NaN" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: resae" in capsys.readouterr().out


def test_unknown_commands_and_missing_arguments_exit_with_2(capsys):
    for arguments in ([], ["fly"], ["train", "embedded"], ["demo", "--k", "four"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "expected numbers, for example 4,8,32" in capsys.readouterr().err


def test_python_m_resae_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "resae", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "fit", "train", "eval", "generate", "report"):
        assert command in done.stdout


def test_a_second_run_with_a_cache_does_not_run_the_model(material, tmp_path, capsys, monkeypatch):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    cached = [*arguments, "--cache", str(tmp_path / "cache")]
    assert main([*cached, "--out", str(tmp_path / "first")]) == 0
    assert re.search(r"activations: \d\.\d\d GB for [\d,]+ tokens in", capsys.readouterr().out)
    monkeypatch.setattr(HookedLM, "capture", None)
    assert main([*cached, "--out", str(tmp_path / "second")]) == 0
    stacks = [ReSAE.load(tmp_path / name).state_dict() for name in ("first", "second")]
    assert all(torch.equal(stacks[0][name], stacks[1][name]) for name in stacks[0])
    assert same_text(tmp_path / "first", tmp_path / "second")
    capsys.readouterr()
    assert main([*cached, "--context-tokens", "12", "--out", str(tmp_path / "third")]) == 2
    assert "is of other activations (context_tokens: " in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_train_takes_the_model_in_bfloat16_and_on_a_device_of_its_own(material, tmp_path):
    arguments = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    arguments += ["--dtype", "bfloat16", "--model-device", "cpu", "--cache", str(tmp_path / "c")]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert load_json(tmp_path / "c" / "train" / "cache.json", "cache")["dtype"] == "bfloat16"
    assert ReSAE.load(tmp_path / "run").sae(0).W_dec.dtype == torch.float32


def test_the_buffer_of_calibration_is_freed_once_it_is_used_up(material, tmp_path, monkeypatch):
    """A frame of the command that held on to `source.sequential()` kept it to the end."""
    alive = []

    def train(_config, source, *_args, **_options):
        buffer = [weakref.ref(x) for x in source._first.xs]
        batches = source.batches()
        for _ in range(source.batches_per_fill + 1):
            next(batches)
        alive.append([x() is not None for x in buffer])

    monkeypatch.setattr("resae.training.pipeline.train", train)
    given = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN]
    sizes = ["--train-tokens", "2048", "--batch-tokens", "64", "--buffer-tokens", "256"]
    sizes += ["--calibration-tokens", "400", "--d-sae", "64"]
    assert main([*given, *sizes, "--out", str(tmp_path / "run")]) == 130  # as if it were stopped
    assert alive == [[False] * 3]


def test_a_command_searches_for_reference_cycles_seldom(tmp_path):
    before = gc.get_threshold()
    try:
        gc.set_threshold(700)
        assert main(["eval", str(tmp_path / "absent")]) == 2
        assert gc.get_threshold()[0] == GC_THRESHOLD
    finally:
        gc.set_threshold(*before)
