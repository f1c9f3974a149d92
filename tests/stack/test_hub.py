"""Sharing a stack, with a local folder in place of the hub."""

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoConfig

from resae import HookedLM, ReSAE, ThresholdSAE, TopKSAE
from resae.cli import main
from resae.models.identity import ModelIdentity
from resae.sae.base import SAEConfig
from resae.stack.card import model_card
from resae.training.runs import model_of, open_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A folder per repository and revision; `ReSAE` reaches it by the two functions that it calls
    of huggingface_hub."""

    def __init__(self, folder):
        self.folder = folder
        self.private = {}
        self.downloaded = []

    def api(self, token=None):  # noqa: ARG002
        return SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        self.private[repo_id] = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, revision, **options):  # noqa: ARG002
        files = {p: p.read_bytes() for p in sorted(folder_path.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(b"".join(files.values())).hexdigest()
        for name in (revision or "main", commit):
            shutil.rmtree(self.folder / repo_id / name, ignore_errors=True)
            shutil.copytree(folder_path, self.folder / repo_id / name)
        return f"https://hub/{repo_id}/commit/{commit}"

    def snapshot_download(self, name, allow_patterns, revision=None):
        there = self.folder / name / (revision or "main")
        if not there.is_dir():
            raise RepositoryNotFoundError(
                f"404: no {name} at {revision}", response=SimpleNamespace(headers={}, request=None)
            )
        snapshot = self.folder / "cache" / there.name
        shutil.rmtree(snapshot, ignore_errors=True)
        files = [str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()]
        self.downloaded = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))
        for file in self.downloaded:
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / file, snapshot / file)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub.api)
    monkeypatch.setattr("resae.stack.stack.snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


def of_hub(lm):
    """A stack whose model came from the hub."""
    lm.revision = COMMIT
    stack = tiny.stack(lm)
    lm.revision = None
    return stack


def report_of(stack, **changes):
    row = {"method": "resae", "mode": "online", "loop": "closed", "k": 4, "ce_clean": 2.5}
    row |= {"delta_ce": 0.71234, "kl": 0.65, "layers": stack.hook_points}
    config = {"model": stack.model_identity.name, "layers": stack.hook_points, "data": "books"}
    part = row | {"layers": stack.hook_points[:1], "delta_ce": 0.1}
    return {"config": config | changes, "replacement": [part, row]}


def test_what_is_pushed_is_opened_from_the_hub_bit_for_bit(lm, hub):
    stack = of_hub(lm)
    address = stack.push_to_hub("someone/stack", private=True)
    assert address.startswith("https://hub/someone/stack/commit/")
    assert hub.private == {"someone/stack": True}
    loaded = ReSAE.from_pretrained("someone/stack")
    before, after = stack.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.model_identity == stack.model_identity
    assert loaded.model_identity.revision == COMMIT


@pytest.mark.usefixtures("hub")
def test_a_revision_is_the_one_that_is_opened(lm):
    stack = tiny.stack(lm)
    first = stack.push_to_hub("someone/stack").rpartition("/")[2]
    other = tiny.stack(lm, "none")
    other.push_to_hub("someone/stack")
    other.push_to_hub("someone/stack", branch="next")
    assert ReSAE.from_pretrained("someone/stack").predictor.kind == "none"
    assert ReSAE.from_pretrained("someone/stack", revision=first).predictor.kind == "previous"
    assert ReSAE.from_pretrained("someone/stack", revision="next").predictor.kind == "none"
    with pytest.raises(FileNotFoundError, match=r"someone/stack.*no someone/stack at v9"):
        ReSAE.from_pretrained("someone/stack", revision="v9")


def test_only_files_of_a_stack_are_downloaded(lm, hub):
    tiny.stack(lm).push_to_hub("someone/stack")
    there = hub.folder / "someone/stack/main"
    for name in ("code.py", "weights.bin", "model.pt", "other.json", "big.safetensors", "a.pkl"):
        (there / name).write_text("")
    ReSAE.from_pretrained("someone/stack")
    saes = [f"{name}/{file}" for name in tiny.NAMES for file in ("cfg.json", "sae.safetensors")]
    assert hub.downloaded == sorted(["affine.safetensors", "resae.json", *saes])


def test_the_card_says_model_revision_layers_sizes_cost_and_how_to_load(lm, hub):
    stack = of_hub(lm)
    stack.push_to_hub("someone/stack", report=report_of(stack), license="mit")
    card = ModelCard((hub.folder / "someone/stack/main/README.md").read_text())
    assert card.data.license == "mit"
    assert card.data.library_name == "resae"
    assert card.data.base_model == "tiny-neox"
    assert f"`tiny-neox`, revision `{COMMIT}`" in card.text
    for name in tiny.NAMES:
        assert f"| {name} | 32 | 64 | 4 |" in card.text
    assert "| resae | online | closed | 4 | 0.7123 | 0.6500 |" in card.text
    assert "0.1000" not in card.text  # of one layer alone
    assert 'ReSAE.from_pretrained("someone/stack")' in card.text


def test_a_card_claims_neither_licence_nor_numbers_nor_a_hub_model_that_were_not_given(lm):
    text = str(model_card(tiny.stack(lm)))
    assert "license" not in text
    assert "base_model" not in text
    assert "revision `" not in text
    assert "Δ CE" not in text


def test_a_card_calls_autoencoders_with_thresholds_by_their_kind(lm):
    def sae(screening="statistical"):
        return TopKSAE(SAEConfig(32, 64, 4, screening=screening))

    record = replace(sae().record(), threshold=torch.ones(64))
    threshold = ThresholdSAE.from_record(record, max_active=9)
    text = str(model_card(ReSAE.from_saes({0: threshold}, lm)))
    assert "# Autoencoders with thresholds of 1 layers" in text
    assert "TopK" not in text
    assert "| blocks.0.hook_resid_post | 32 | 64 | at most 9 |" in text
    text = str(model_card(ReSAE.from_saes({0: threshold, 1: sae(None)}, lm)))
    assert "# Autoencoders with thresholds and TopK ones of 2 layers" in text
    assert "differs by layer" in text
    assert "statistical" not in text


@pytest.mark.parametrize(
    "report",
    [{}, {"config": 1, "replacement": []}, {"config": {}, "replacement": [1]}, "layers", "model"],
)
def test_another_report_is_refused_before_anything_is_uploaded(lm, hub, report):
    stack = tiny.stack(lm)
    if isinstance(report, str):
        report = report_of(stack, **{report: ["a"] if report == "layers" else "a"})
    with pytest.raises(ValueError, match="^report"):
        stack.push_to_hub("someone/stack", report=report)
    assert not hub.private


def test_what_the_hub_refuses_is_one_line(lm, hub, monkeypatch):
    with pytest.raises(OSError, match=r"a/b/c.*give owner/name"):
        tiny.stack(lm).push_to_hub("a/b/c")

    def refuse(*_, **__):
        raise OSError("401: log in\nlong explanation")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(OSError, match="401: log in") as raised:
        tiny.stack(lm).push_to_hub("someone/stack")
    assert "\n" not in str(raised.value)


def test_a_run_is_pushed_by_the_command(lm, hub, tmp_path, capsys):
    stack = tiny.stack(lm)
    stack.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(json.dumps(report_of(stack)))
    arguments = ["push", str(tmp_path / "run"), "someone/run", "--license", "mit"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("https://hub/someone/run/commit/")
    text = (hub.folder / "someone/run/main/README.md").read_text()
    assert "license: mit" in text
    assert "0.7123" in text
    assert main(["push", str(tmp_path), "someone/run"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_commands_open_a_stack_on_the_hub_at_a_revision(lm, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # names of the hub are names of folders too
    wanted, other = tiny.stack(lm), tiny.stack(lm, "none")
    wanted.push_to_hub("someone/stack", branch="v1")
    other.push_to_hub("someone/stack")
    assert open_run("someone/stack", "cpu")[1].predictor.kind == "none"
    record, stack = open_run("someone/stack@v1", "cpu")
    assert record == {}
    assert stack.predictor.kind == "previous"
    for command in (["graph", "--prompt", "a"], ["latents"], ["probe"], ["eval"]):
        hub.downloaded = []
        assert main([command[0], "someone/stack@v1", *command[1:]]) == 2
        assert "name it with --out" in capsys.readouterr().err
        assert hub.downloaded == []
    monkeypatch.setattr("resae.models.hooked.HookedLM.described", lambda *_, **__: lm)
    monkeypatch.setattr(ReSAE, "require_model", _opened)
    for command in (
        ["generate", "--prompt", "a"],
        ["graph", "--prompt", "a", "--out", "o"],
        ["latents", "--out", "o"],
        ["probe", "--out", "o"],
        ["eval", "--out", "o"],
    ):
        assert main([command[0], "someone/stack@v1", *command[1:]]) == 2
        assert "opened previous" in capsys.readouterr().err
    (tmp_path / "someone" / "stack").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="someone/stack is not a run directory"):
        open_run("someone/stack", "cpu")
    with pytest.raises(FileNotFoundError, match=r"someone/stock.*no such folder, and no reposi"):
        open_run("someone/stock", "cpu")


def _opened(stack, lm):  # noqa: ARG001
    """In place of `require_model`: commands call it as soon as they have opened the stack."""
    raise ValueError(f"opened {stack.predictor.kind}")


def test_a_model_of_the_hub_is_asked_for_and_remembered_by_its_revision(lm, tmp_path, monkeypatch):
    lm.model.save_pretrained(tmp_path)
    read, asked = AutoConfig.from_pretrained, []

    def from_hub(path, revision=None):
        asked.append((path, revision))
        config = read(tmp_path)
        config._commit_hash = COMMIT
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_hub)
    described = HookedLM.described("someone/model", revision="v1")
    assert asked == [("someone/model", "v1")]
    assert described.revision == COMMIT
    assert ModelIdentity.of(described).revision == COMMIT
    assert model_of({"revision": "v1"}, of_hub(lm)) == ("tiny-neox", COMMIT)
    assert model_of({}, of_hub(lm), "other") == ("other", None)
    for name in ("embedded", str(tmp_path)):
        with pytest.raises(ValueError, match="is local and has no revision 'v1'"):
            HookedLM.described(name, revision="v1")
