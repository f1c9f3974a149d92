import json
import re
import shutil
from dataclasses import replace

import pytest
from mutations import try_mutations

import resae.reproduce.study as study_module
from resae import HookedLM
from resae.cli import main
from resae.data import cache
from resae.data.rows import TokenRows
from resae.data.texts import load_texts
from resae.reproduce.jobs import Job, Kind, jobs_of, selected, sweeps_of
from resae.reproduce.settings import StudyConfig
from resae.reproduce.study import Study
from resae.reproduce.summary import write_results
from resae.storage import save_json

SMALL = StudyConfig(
    "tiny",
    k=(4,),
    expansion=1,
    train_tokens=1_024,
    calibration_tokens=512,
    batch_tokens=128,
    documents=4,
    tuning_documents=2,
    context_tokens=32,
    seeds=1,
    lr_factors=(0.5, 1.0),
)
ALL = jobs_of(SMALL)
JOBS = [job for job in selected(ALL, ("far",), SMALL) if job.method in ("", "raw", "resae_closed")]
JOBS += selected(ALL, ("affine_only", "far"), SMALL)[-1:]


@pytest.fixture(scope="module")
def lm():
    return HookedLM.from_pretrained("embedded")


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def study(lm, tmp_path_factory):
    """A study that was never interrupted."""
    done = Study(tmp_path_factory.mktemp("study") / "out", SMALL, lm)
    assert done.run(JOBS, dict.fromkeys(JOBS, 1.0))
    return done


def results(study, jobs=JOBS):
    """Results of jobs but for what differs from one run to the next."""
    found = {}
    for job in jobs:
        result = study.result(job)
        assert result is not None, job.name
        found[job.name] = {n: v for n, v in result.items() if n not in ("seconds", "environment")}
    return found


def test_a_study_that_is_killed_over_and_over_ends_as_one_that_is_not(
    study, lm, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_module, "CHECKPOINT_STEPS", 2)
    calls, kills = 0, 0

    def stop():
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return False

    while True:
        again = Study(tmp_path, SMALL, lm)
        try:
            assert again.run(JOBS, dict.fromkeys(JOBS, 1.0), stop=stop)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    ours, theirs = results(again), results(study)
    for found in (*ours.values(), *theirs.values()):
        found.pop("curve", None)  # of the part after the last kill
    assert ours == theirs


def test_a_study_stops_within_a_training_and_goes_on(study, lm, tmp_path):
    train = Job(Kind.TRAIN, "far", 4, "raw")
    shutil.copytree(study.out, tmp_path / "out")
    (tmp_path / "out" / "jobs" / f"{train.name}.json").unlink()
    shutil.rmtree(tmp_path / "out" / "stacks" / train.name)
    again, asked = Study(tmp_path / "out", SMALL, lm), []

    def stop():
        asked.append(None)
        return len(asked) > 3

    assert not again.run(JOBS, dict.fromkeys(JOBS, 1.0), stop=stop)
    assert again.result(train) is None
    checkpoints = tmp_path / "out" / "stacks" / train.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000003.safetensors"]
    assert again.run(JOBS, dict.fromkeys(JOBS, 1.0))
    assert not checkpoints.exists()
    assert again.result(train)["settings"] == study.result(train)["settings"]


def test_jobs_that_are_done_are_not_done_again(study, monkeypatch):
    monkeypatch.setattr(study, "_do", None)
    assert study.run(JOBS, {})


def test_the_learning_rate_is_the_best_of_the_sweep(study, lm, tmp_path):
    one, other = sweeps_of("raw", SMALL)
    save_json(tmp_path / "study.json", SMALL.to_json())
    copy = Study(tmp_path, SMALL, lm)
    train = Job(Kind.TRAIN, "near", 4, "raw")
    with pytest.raises(ValueError, match="sweep-far-raw-k4-seed0-lr0.5 is not done"):
        copy.train_config(train)
    for losses, best in (((2.0, 1.0), 1.0), ((1.0, 2.0), 0.5), ((1.0, None), 0.5)):
        for job, loss in zip((one, other), losses, strict=True):
            found = None if loss is None else {"online": loss, "teacher_forced": 0.0}
            result = study.result(job) | {"delta_ce": found}
            save_json(tmp_path / "jobs" / f"{job.name}.json", result)
        config = copy.train_config(train)
        assert config.lr == pytest.approx(best * replace(config, lr=None).peak_lr)
        assert config.train_tokens == 4 * copy.train_config(one).train_tokens
    # The sweep of a finished study leaves its result and no weights.
    assert study.result(one)["delta_ce"]["online"] > 0
    assert not [path for path in (study.out / "stacks").iterdir() if path.name.startswith("sweep")]


def test_a_learning_rate_that_diverges_is_not_taken(lm, study, tmp_path, monkeypatch):
    def diverge(config, _source, _calibration, out, **_options):
        out.mkdir(parents=True)
        if config.lr == replace(config, lr=None).peak_lr:
            (out / "nan_batch.safetensors").touch()
        raise ValueError("loss is nan")

    copy = Study(tmp_path, SMALL, lm)
    monkeypatch.setattr(study_module, "train", diverge)
    monkeypatch.setattr(copy, "_maps_file", study._maps_file)
    one, other = sweeps_of("raw", SMALL)
    assert copy.run([other], {other: 1.0})
    assert copy.result(other)["delta_ce"] is None
    with pytest.raises(ValueError, match="loss is nan"):  # another error is not taken for that
        copy.run([one], {one: 1.0})


def test_a_row_is_the_beginning_of_one_held_out_document(study, lm):
    rows = study.document_rows
    texts = list(load_texts("embedded", split="validation"))
    ids = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    begun = [document[:31] for document in ids]
    places = [begun.index(row[1:].tolist()) for row in rows]
    assert len(rows) == 6
    assert places == sorted(set(places))
    tuning = {tuple(row) for batch in study.tuning_batches for row in batch.tolist()}
    evaluated = {tuple(row) for batch in study.evaluation_batches for row in batch.tolist()}
    assert (len(tuning), len(evaluated)) == (2, 4)
    assert not tuning & evaluated


def test_activations_of_a_spacing_are_those_of_its_layers(study, lm):
    counts, xs = study.activations("near").reader(1)(2)
    rows = TokenRows(load_texts("embedded"), lm.tokenizer, 32)
    ids = [row for _, row in zip(range(3), rows, strict=False)][1:]
    for x, point in zip(xs, lm.hook_points(["1", "3", "5"]), strict=True):
        captured = [lm.capture(row[None], [point])[point][0, 1:] for row in ids]
        assert x.shape == (sum(counts), 128)
        for got, expected in zip(x.float().split(counts), captured, strict=True):
            if len(got) == 31:  # no separator of documents and no sink in it
                assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_another_study_or_something_else_in_the_folder_is_refused(study, lm, tmp_path):
    with pytest.raises(ValueError, match="holds a study with documents=4, asked for documents=5"):
        Study(study.out, replace(SMALL, documents=5), lm)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no study"):
        Study(tmp_path, SMALL, lm)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers near the largest
def test_a_damaged_result_or_study_is_named_in_one_line(study, lm, tmp_path):
    shutil.copytree(study.out, tmp_path / "out")
    damaged = Study(tmp_path / "out", SMALL, lm)

    def read():
        write_results(tmp_path, SMALL, damaged.result)
        for job in JOBS:
            if job.kind is Kind.TRAIN:
                damaged.train_config(job)

    refused, _ = try_mutations(tmp_path / "out" / "jobs", read, count=24, seed=1)
    assert refused >= 8
    file = tmp_path / "out" / "jobs" / "evaluate-far-raw-k4-seed0.json"
    found = json.loads(file.read_text())
    for entry in ("row_sums", "reconstruction", "redundancy", "replacement", "environment"):
        file.write_text(json.dumps(found | {entry: [1]}))
        with pytest.raises(ValueError, match=rf"{file.name}.* remove the file, and the job is d"):
            read()
    found["row_sums"][1]["ce"].pop()
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="row_sums are not of 4 documents; remove"):
        read()
    sweep = next(job for job in JOBS if job.kind is Kind.SWEEP)
    whole = study.result(sweep)
    for loss, message in (({}, "delta_ce has no online"), ("x", "delta_ce = 'x', expected names")):
        save_json(tmp_path / "out" / "jobs" / f"{sweep.name}.json", whole | {"delta_ce": loss})
        with pytest.raises(ValueError, match=f"{sweep.name}.*{message}"):
            damaged.result(sweep)
    (tmp_path / "out" / "study.json").write_text("[]")
    with pytest.raises(ValueError, match="study.json: got"):
        Study(tmp_path / "out", SMALL, lm)


def test_too_few_documents_are_an_error(lm, tmp_path):
    with pytest.raises(
        ValueError, match=r"held-out documents of 32 tokens or more, expected 100002"
    ):
        _ = Study(tmp_path, replace(SMALL, documents=100_000), lm).document_rows


def test_results_name_the_commits_that_jobs_ran_at(study, tmp_path):
    """Of a study that went on with other code, all of them."""

    def result(job):
        found = study.result(job)
        if found is not None and job.kind is Kind.CAPTURE:
            found["environment"]["commit"] = "0123456789abcdef"
        return found

    page = write_results(tmp_path, SMALL, result).read_text()
    assert f"{len(JOBS)} of {len(ALL)} jobs done: 1 at commit 0123456 (torch" in page
    first, second = json.loads((tmp_path / "results.json").read_text())["environments"]
    assert (first["commit"], first["jobs"], second["jobs"]) == (
        "0123456789abcdef",
        1,
        len(JOBS) - 1,
    )
    assert first | second == second


def test_results_are_written_from_what_is_there(study):
    page = write_results(study.out, SMALL, study.result).read_text()
    assert f"{len(JOBS)} of {len(ALL)} jobs done" in page
    assert "online, ReSAE loses less than raw SAEs of equal k | paper |" in page
    assert "| affine maps alone |" in page
    written = json.loads((study.out / "results.json").read_text())
    online = {
        row["method"]: row
        for row in written["methods"]
        if (row["mode"], row["loop"]) == ("online", "closed")
    }
    assert set(online) == {"raw", "resae_closed", "affine_only"}
    raw, ours = online["raw"], online["resae_closed"]
    difference = ours["delta_ce"]["value"] - raw["delta_ce"]["value"]
    assert ours["minus_raw"]["value"] == pytest.approx(difference)
    assert raw["minus_raw"] == {"value": 0, "low": 0, "high": 0}
    assert raw["delta_ce"]["low"] < raw["delta_ce"]["value"] < raw["delta_ce"]["high"]
    result = study.result(Job(Kind.EVALUATE, "far", 4, "raw"))
    (row,) = [r for r in result["replacement"] if r["mode"] == "online"]
    assert raw["delta_ce"]["value"] == pytest.approx(row["delta_ce"])
    (claim,) = [
        c
        for c in written["claims"]
        if c["claim"].startswith("online, ReSAE loses less than raw SAEs of equal k")
    ]
    assert claim["difference"] == ours["minus_raw"]
    assert (study.out / "delta_ce.svg").read_text().startswith("<svg")


COMMAND = ["reproduce", "tiny", "--device", "cpu", "--train-tokens", "4096", "--k", "4"]
COMMAND += ["--documents", "2", "--expansion", "1", "--seeds", "1"]


def test_the_plan_has_stacks_time_disk_and_memory_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*COMMAND, "--out", str(out), "--only", "near,raw", "--plan"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^near-raw-k4-seed0 +6 +0 +0\.0\d +\d+\.\d +\d+\.\d$", said, re.M), said
    assert "near-resae" not in said
    assert re.search(r"^disk: \d+\.\d\d GB \(activations 0.01, 1 stacks", said, re.M)
    assert "memory: about 0.1 GB" in said
    assert not out.exists()


def test_the_command_writes_results_without_working_and_refuses_what_cannot_be(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*COMMAND, "--out", str(out), "--until-minutes", "0"]) == 0
    assert "0 of " in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "results.json",
        "results.md",
        "study.json",
    ]
    assert main([*COMMAND, "--out", str(out), "--only", "magic"]) == 2
    assert "no job has magic in its name" in capsys.readouterr().err
    arguments = ["reproduce", "smollm2-135m", "--model", str(tmp_path / "absent")]
    assert main([*arguments, "--out", str(out)]) == 2
    assert "real_models.py fetch smollm2-135m" in capsys.readouterr().err
