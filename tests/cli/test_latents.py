import json
import signal

import pytest
import tiny

from resae import HookedLM
from resae.cli import main


@pytest.fixture(scope="module")
def run(material):
    """A stack of a run without record, as `save_pretrained` writes it."""
    out = material / "stack"
    lm = HookedLM.from_pretrained(str(material / "model"))
    tiny.stack(lm).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def text(material):
    return ["--data", str(material / "text.txt"), "--context-tokens", "24", "--window", "16"]


@pytest.fixture(scope="module")
def indexed(run, text):
    assert main(["latents", str(run), *text, "--tokens", "3000", "--page-latents", "30"]) == 0
    return run / "latents"


def test_page_json_and_index_are_written(indexed):
    content = json.loads((indexed / "latents.json").read_text())
    assert content["schema_version"] == 1
    assert content["settings"]["data"].endswith("text.txt")
    assert content["tokens"] == 125 * 23  # rows of 24 with a BOS
    assert len(content["latents"]) == 30
    assert all(card["passages"] for card in content["latents"])
    assert (indexed / "latents.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in indexed.iterdir()) == [
        "index.safetensors",
        "latents.html",
        "latents.json",
    ]


def test_named_latents_are_printed_from_the_index_that_is_there(indexed, run, capsys, monkeypatch):
    monkeypatch.setattr("resae.latents.collect._add", None)  # no text is read again
    cards = json.loads((indexed / "latents.json").read_text())["latents"]
    latent = max(card["latent"] for card in cards if card["layer"] == 0)
    capsys.readouterr()
    assert main(["latents", str(run), "--layer", "0", "--latent", f"{latent},0", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [card["latent"] for card in content["latents"]] == [latent, 0]
    assert content["latents"][0]["ablation"]["kl"] >= 0
    assert main(["latents", str(run), "--layer", "0", "--latent", str(latent), "-q"]) == 0
    printed = capsys.readouterr().out
    assert f"blocks.0.hook_resid_post #{latent}: fires at" in printed
    assert "ablated on its passages: Δ CE" in printed


def test_a_prompt_has_a_page_of_its_own(indexed, run):
    assert main(["latents", str(run), "--prompt", "The cat sat", "--strongest", "2"]) == 0
    content = json.loads((indexed / "prompt.json").read_text())
    tokens = content["prompt"]["token_ids"]
    assert len(content["prompt"]["strongest"]) == len(tokens) > 3
    shown = {(card["layer"], card["latent"]) for card in content["latents"]}
    assert shown == {
        (layer, latent)
        for token in content["prompt"]["strongest"]
        for layer, pairs in enumerate(token)
        for latent, _ in pairs
    }
    assert 'id="prompt"' in (indexed / "prompt.html").read_text()


def test_an_interrupted_pass_is_continued_by_the_same_command(run, text, tmp_path, monkeypatch):
    import resae.latents.collect as collect

    out = ["--out", str(tmp_path / "out"), "--page-latents", "3"]
    add, read = collect._add, []

    def interrupted(*arguments):
        add(*arguments)
        read.append(len(arguments[2]))
        if len(read) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(collect, "_add", interrupted)
    command = ["latents", str(run), *text, "--tokens", "1000", *out]
    assert main(command) == 130
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.safetensors"]
    assert main(command) == 0
    assert sum(read) == 42  # rows, none twice
    assert len(read) > 2
    content = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert content["tokens"] == 42 * 23


def test_a_text_that_ends_early_is_read_once(run, text, tmp_path, monkeypatch, capsys):
    import resae.latents.collect as collect

    command = ["latents", str(run), *text, "--out", str(tmp_path / "out"), "--page-latents", "3"]
    assert main([*command, "--tokens", "50000000"]) == 0
    monkeypatch.setattr(collect, "_add", None)
    assert main(command) == 0
    assert capsys.readouterr().out.count("to read for") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "2", "--latent", "0"], "no autoencoder at blocks.2.hook_resid_post"),
        (["--layer", "9", "--latent", "0"], "layer 9 is out of range"),
        (["--layer", "0", "--latent", "64"], "has no latent 64; expected 0 to 63"),
        (["--layer", "0"], "--layer needs --latent"),
        (["--latent", "3"], "--latent needs --layer"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "the " * 99], "exceed the context of 64 tokens"),
        (["--loop", "closed"], "was made with another loop; make it anew with --again"),
    ],
)
def test_bad_input_ends_in_one_line(indexed, run, options, message, capsys):
    before = sorted(indexed.iterdir())
    capsys.readouterr()
    assert main(["latents", str(run), *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(indexed.iterdir()) == before


def test_a_folder_without_a_stack_or_text_is_refused(run, material, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], "is not a run directory"),
        ([str(run), "--out", str(tmp_path / "a")], "does not record a text; name one with --data"),
        (
            [str(run), "--out", str(tmp_path / "a"), "--data", str(material / "empty.txt")]
            + ["--context-tokens", "24"],
            "empty or too short",
        ),
    ):
        assert main(["latents", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert message in error[0]
    assert not (tmp_path / "a").exists()
