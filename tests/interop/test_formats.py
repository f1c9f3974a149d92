import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import foreign_files as files
import pytest
import torch
from foreign_files import D, K, M, activations, plain
from safetensors.torch import load_file
from torch import nn

from resae import ReSAE, TopKSAE, export_sae, import_sae
from resae.choices import EXPORTS, IMPORTS
from resae.cli import main
from resae.interop import hub
from resae.interop.formats import FORMATS, convert, read_sae
from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.prefix import PrefixSAE
from resae.sae.registry import load_sae
from resae.sae.threshold import ThresholdSAE
from resae.stack.affine import AffinePredictor


def dense(code):
    out = code.acts.new_zeros(*code.acts.shape[:-1], M)
    return out.scatter_add_(-1, code.indices, code.acts)


def assert_same_function(sae, expected):
    """Same latents active, same acts and reconstructions up to rounding."""
    x = activations()
    ours, theirs = dense(sae.encode(x)), expected.encode(x)
    assert torch.equal(ours != 0, theirs != 0)
    assert 0 < (theirs != 0).sum() < theirs.numel()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    x_hat = sae.decode(*sae.encode(x, sorted=False))
    torch.testing.assert_close(x_hat, expected.decode(theirs), rtol=1e-5, atol=1e-5)


NO_BIAS = plain()._replace(b_enc=torch.zeros(M))
CASES = {
    "saelens topk": (lambda p, s: files.saelens(p, s), plain(), None),
    "saelens topk without b_dec": (files.saelens, plain(subtracts=False), None),
    "saelens jumprelu": (files.saelens, plain(threshold="each"), None),
    "saelens jumprelu without b_dec": (
        files.saelens,
        plain(threshold="each", subtracts=False),
        None,
    ),
    "saelens standard": (
        lambda p, s: files.saelens(p, s, architecture="standard"),
        plain(threshold=0),
        None,
    ),
    "saelens 5 topk": (files.saelens_5, plain(), None),
    "sparsify": (files.sparsify, plain(), None),
    "sparsify before 2025": (lambda p, s: files.sparsify(p, s, activation=None), plain(), None),
    "dictionary_learning topk": (
        lambda p, s: files.dictionary_learning(p, s, "AutoEncoderTopK"),
        plain(),
        "dictionary_learning",
    ),
    "dictionary_learning batchtopk": (
        lambda p, s: files.dictionary_learning(p, s, "BatchTopKSAE"),
        plain(threshold=1.5),
        "dictionary_learning",
    ),
    "dictionary_learning batchtopk, threshold unset": (
        lambda p, s: files.dictionary_learning(p, s, "BatchTopKSAE"),
        plain(threshold=-1),
        "dictionary_learning",
    ),
    "dictionary_learning matryoshka": (
        lambda p, s: files.dictionary_learning(p, s, "MatryoshkaBatchTopKSAE"),
        plain(threshold=1.5),
        "dictionary_learning",
    ),
    "dictionary_learning jumprelu": (
        lambda p, s: files.dictionary_learning(p, s, "JumpReluAutoEncoder", config=False),
        plain(threshold="each", subtracts=False),
        "dictionary_learning",
    ),
    "dictionary_learning relu": (
        lambda p, s: files.dictionary_learning(p, s, "AutoEncoder", config=False),
        plain(threshold=0),
        "dictionary_learning",
    ),
    "dictionary_learning relu, April update": (
        lambda p, s: files.dictionary_learning(p, s, "AutoEncoderNew", config=False),
        plain(threshold=0, subtracts=False),
        "dictionary_learning",
    ),
    "mlsae": (files.mlsae, NO_BIAS, None),
    "openai": (lambda p, s: files.openai(p / "0.pt", s), plain(threshold=0), "openai"),
    "gemma_scope": (files.gemma_scope, plain(threshold="each", subtracts=False), None),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_autoencoder_computes_what_its_library_defines(case, tmp_path):
    write, expected, format = CASES[case]
    path = write(tmp_path, expected)
    sae = import_sae(path, format=format)
    assert not sae.training
    assert_same_function(sae, expected)
    found = read_sae(path, format)
    assert found.format == case.split()[0]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_after_a_round_trip_through_every_format_that_is_written(case, tmp_path):
    write, expected, format = CASES[case]
    (tmp_path / "first").mkdir()
    path = write(tmp_path / "first", expected)
    first = read_sae(path, format).record
    for to in EXPORTS:
        if to == "sparsify" and first.threshold is not None:
            with pytest.raises(ValueError, match="thresholds"):
                convert(path, tmp_path / to, to, format=format)
            assert not (tmp_path / to).exists()
            continue
        convert(path, tmp_path / to, to, format=format)
        again = read_sae(tmp_path / to).record
        assert_same_function(import_sae(tmp_path / to), expected)
        if first.apply_b_dec_to_input or to == "saelens" or first.threshold is not None:
            for name, t in first.tensors().items():
                assert torch.equal(getattr(again, name), t), name
        assert again.hook_point == first.hook_point
        assert again.model == first.model
        assert again.k == first.k or first.threshold is not None


def test_saelens_files_come_back_bit_by_bit_through_sparsify_and_ours(tmp_path):
    files.saelens(tmp_path / "a", plain())
    convert(tmp_path / "a", tmp_path / "b", "sparsify")
    convert(tmp_path / "b", tmp_path / "c", "resae")
    convert(tmp_path / "c", tmp_path / "d", "saelens")
    before, after = (load_file(tmp_path / n / "sae_weights.safetensors") for n in "ad")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    metadata = json.loads((tmp_path / "d" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.6.hook_resid_post"
    assert metadata["prepend_bos"] is True  # what we do not know is kept


def test_decoder_norms_are_folded_as_saelens_folds_them(tmp_path):
    sae = plain()
    norms = torch.linspace(0.5, 2, M)
    stored = sae._replace(
        W_enc=sae.W_enc / norms, b_enc=sae.b_enc / norms, W_dec=sae.W_dec * norms[:, None]
    )
    files.saelens(tmp_path / "rescaled", stored, rescale_acts_by_decoder_norm=True)
    assert_same_function(import_sae(tmp_path / "rescaled"), sae)
    assert "decoder_norm" in read_sae(tmp_path / "rescaled").record.folded[0]
    files.saelens(tmp_path / "unit", sae, rescale_acts_by_decoder_norm=True)
    record = read_sae(tmp_path / "unit").record
    assert not record.folded
    assert torch.equal(record.W_dec, sae.W_dec)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_batchtopk_has_one_threshold(architecture, tmp_path):
    expected = plain(threshold=1.5)
    settings = {"architecture": architecture, "k": 5.0, "rescale_acts_by_decoder_norm": True}
    norms = torch.linspace(0.5, 2, M)
    stored = expected._replace(
        W_enc=expected.W_enc / norms,
        b_enc=expected.b_enc / norms,
        W_dec=expected.W_dec * norms[:, None],
        threshold=None,
    )
    files.saelens(tmp_path, stored, extra={"topk_threshold": torch.tensor(1.5)}, **settings)
    assert_same_function(import_sae(tmp_path), expected)


def test_a_batchtopk_from_before_training_is_imported_with_a_warning(tmp_path, caplog):
    """Its threshold is -1 in dictionary_learning and 0 in SAELens: no positive latent is below."""
    untrained, trained = plain(threshold=0), plain(threshold=1.5)
    for name, sae in (("untrained", untrained), ("trained", trained)):
        folder = tmp_path / name
        one = torch.tensor(float(sae.threshold[0]))
        files.saelens(folder / "saved", sae, architecture="jumprelu")
        settings = {"architecture": "batchtopk", "k": 5.0}
        stored = sae._replace(threshold=None)
        files.saelens(folder / "checkpoint", stored, extra={"topk_threshold": one}, **settings)
        unset = sae._replace(threshold=None) if name == "untrained" else sae
        files.dictionary_learning(folder / "dictionary", unset, "BatchTopKSAE")
        for kind in ("saved", "checkpoint", "dictionary"):
            caplog.clear()
            format = "dictionary_learning" if kind == "dictionary" else None
            assert_same_function(import_sae(folder / kind, format=format), sae)
            found = [record.getMessage() for record in caplog.records]
            if name == "trained":
                assert not found
            else:
                (message,) = found
                assert f"{name}/{kind}" in message
                assert "every positive latent is active" in message
                assert "train it until the threshold is set" in message
    files.saelens(tmp_path / "relu", untrained, architecture="standard")
    caplog.clear()
    import_sae(tmp_path / "relu")
    assert not caplog.records


def test_the_factor_of_the_inputs_is_folded(tmp_path):
    expected = plain()
    stored = expected._replace(
        W_enc=expected.W_enc / 0.5, W_dec=expected.W_dec * 0.5, b_dec=expected.b_dec * 0.5
    )
    files.saelens(tmp_path, stored, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="expected_average_only_in.*activation_scaler.json"):
        import_sae(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    sae = import_sae(tmp_path)
    assert_same_function(sae, expected)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: files.saelens(p, plain(), architecture="gated"), "architecture 'gated'"),
        (lambda p: files.saelens(p, plain(), architecture="transcoder"), "'transcoder'"),
        (
            lambda p: files.saelens(p, plain(), normalize_activations="layer_norm"),
            "normalize_activations 'layer_norm'.*a scale of its own.*accelerate",
        ),
        (
            lambda p: files.saelens(p, plain(), normalize_activations="constant_norm_rescale"),
            "constant_norm_rescale.*a scale of its own.*accelerate",
        ),
        (lambda p: files.saelens(p, plain(), reshape_activations="hook_z"), "hook_z"),
        (lambda p: files.saelens(p, plain(), extra={"b_gate": torch.ones(M)}), "b_gate"),
        (lambda p: files.saelens_5(p, plain(), activation_fn_str="tanh-relu"), "tanh-relu"),
        (lambda p: files.saelens_5(p, plain(), hook_name="blocks.0.attn.hook_z"), "hook_z"),
        (lambda p: files.sparsify(p, plain(), transcode=True), "transcode"),
        (lambda p: files.sparsify(p, plain(), activation="groupmax"), "groupmax"),
        (lambda p: files.sparsify(p, plain(), signed=True), "signed"),
        (
            lambda p: files.sparsify(p, plain(), extra={"W_skip": torch.ones(D, D)}),
            "W_skip",
        ),
        (
            lambda p: files.mlsae(p, plain(), standardize=True),
            "standardize.*a scale of its own.*in mlsae",
        ),
        (lambda p: files.mlsae(p, plain(), lens=True), "lens"),
        (lambda p: files.sparsify(p, plain(), k=M + 1), f"k={M + 1}"),
        (
            lambda p: files.sparsify(p, plain()._replace(b_dec=torch.full((D,), torch.nan))),
            "NaN.*b_dec",
        ),
    ],
)
def test_what_has_no_form_here_is_refused_by_name(write, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        import_sae(write(tmp_path))


def test_pickles_are_read_only_where_their_format_is_named(tmp_path):
    files.dictionary_learning(tmp_path / "a", plain(), "AutoEncoderTopK")
    file = files.openai(tmp_path / "6.pt", plain(threshold=0))
    for path in (tmp_path / "a", tmp_path / "a" / "ae.pt", file):
        with pytest.raises(ValueError, match="pickle.*--format"):
            import_sae(path)
    files.openai(file, plain(), activation="TopK")
    with pytest.raises(
        ValueError, match="LayerNorm of each token: .*a scale of its own.*accelerate"
    ):
        import_sae(file, format="openai")
    files.dictionary_learning(tmp_path / "b", plain(), "AutoEncoderTopK", config=False)
    with pytest.raises(ValueError, match="same tensors"):
        import_sae(tmp_path / "b", format="dictionary_learning")


def test_a_folder_of_hook_points_and_seeds(tmp_path):
    for name in ("layers.6/seed0", "layers.6/seed1", "layers.7.mlp"):
        files.sparsify(tmp_path / name, plain(seed=len(name)))
    with pytest.raises(ValueError, match="3 autoencoders below it.*layers.6/seed0"):
        import_sae(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        import_sae(tmp_path, hook_point="../x")
    assert import_sae(tmp_path, hook_point="layers.6/seed1").config.d_sae == M
    assert read_sae(tmp_path / "layers.6/seed0").record.hook_point == "blocks.6.hook_resid_post"
    assert read_sae(tmp_path / "layers.7.mlp").record.hook_point == "layers.7.mlp"
    written = convert(tmp_path, tmp_path / "new", "saelens")
    assert len(written) == 3
    assert import_sae(tmp_path / "new", hook_point="layers.6/seed0").config.k == K


def test_of_several_those_that_cannot_be_converted_are_named(tmp_path, capsys):
    for name in ("a", "b", "d"):
        files.sparsify(tmp_path / "in" / name, plain(seed=1))
    cfg = tmp_path / "in" / "b" / "cfg.json"
    cfg.write_text(json.dumps(json.loads(cfg.read_text()) | {"transcode": True}))
    files.sparsify(tmp_path / "in" / "c", plain(seed=2, threshold=None))
    (tmp_path / "in" / "d" / "sae.safetensors").write_bytes(b"damaged")
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "x" / "out"), "--to", "saelens"]
    assert main(command) == 2
    assert "one of 4 autoencoders; nothing is written, unless --skip-" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main([*command, "--skip-unsupported"]) == 0
    said = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "x" / "out").iterdir()) == ["a", "c"]
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert all(f"left out: {tmp_path / 'in' / n}: " in line
               for n, line in zip("bd", lines, strict=True))  # fmt: skip
    for name in ("a", "c"):
        (tmp_path / "in" / name / "sae.safetensors").write_bytes(b"damaged")
    command[2] = str(tmp_path / "none")
    assert main([*command, "--skip-unsupported"]) == 2
    assert "none of its 4 autoencoders can be converted" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_autoencoders_are_found_however_deep_and_damaged_ones_can_be_left_out(tmp_path, capsys):
    deep = tmp_path / "in" / "a" / "b" / "c" / "d" / "e" / "layers.1"
    files.sparsify(deep, plain())
    files.sparsify(tmp_path / "in" / "broken", plain())
    (tmp_path / "in" / "broken" / "cfg.json").write_text("{")
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "resae"]
    assert main(command) == 2
    assert "broken/cfg.json is not valid JSON" in capsys.readouterr().err
    assert main([*command, "--skip-unsupported"]) == 0
    assert "broken/cfg.json is not valid JSON" in capsys.readouterr().err
    (folder,) = tmp_path.glob("out/**/layers.1")
    assert folder.relative_to(tmp_path / "out") == deep.relative_to(tmp_path / "in")
    inner = [str(tmp_path / "in"), str(tmp_path / "in" / "new"), "--to", "saelens"]
    assert main(["convert", *inner, "--hook-point", str(deep.relative_to(tmp_path / "in"))]) == 0
    assert import_sae(tmp_path / "in" / "new").config.k == K


def test_a_tree_without_end_is_not_searched_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("resae.interop.formats.MOST_FOLDERS", 20)
    for number in range(30):
        (tmp_path / f"{number}" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="more than 20 folders; name one"):
        import_sae(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Not left out of a conversion without a word."""
    files.sparsify(tmp_path / "in" / "a", plain())
    (tmp_path / "in" / "locked").mkdir()
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(OSError, match="cannot read the folder .*locked .Permission denied"):
        convert(tmp_path / "in", tmp_path / "out", "resae")


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("file", "cannot write the folder .*file .Not a directory.; choose another"),
        ("file/below", "file is a file, expected a folder"),
        ("link", "cannot write the folder .*link .Not a directory.; choose another"),
        ("/proc/x/y", "cannot write into /proc"),
        ("n" * 300, "cannot write the folder .*File name too long"),
        ("a\0b", "cannot write the folder .*null byte"),
        ("in", "not empty"),
        ("in/a/new", "lies within .*in/a; choose"),
        ("full", "not empty"),
    ],
)
@pytest.mark.parametrize("source", ["in", "in/a"])
def test_a_folder_that_cannot_be_written_is_said_in_words(
    source, destination, message, tmp_path, capsys
):
    files.sparsify(tmp_path / "in" / "a", plain(seed=1))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full" / "x").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    paths = [str(tmp_path / source), str(tmp_path / destination)]
    assert main(["convert", *paths, "--to", "saelens"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Errno" not in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def residual_sae():
    return TopKSAE(SAEConfig(D, M, K, input_kind="affine_residual"))


@pytest.mark.parametrize("to", EXPORTS)
def test_an_autoencoder_of_residuals_is_never_fed_activations_by_mistake(to, tmp_path):
    export_sae(residual_sae(), tmp_path / to, to, hook_point="blocks.3.hook_resid_post")
    metadata = json.loads((tmp_path / to / "cfg.json").read_text())["metadata"]
    assert metadata["input_kind"] == "affine_residual"
    assert "hook_name" not in metadata
    loaded = import_sae(tmp_path / to)
    assert loaded.config.input_kind == "affine_residual"
    with pytest.raises(ValueError, match="residual of an activation"):
        loaded.encode(activations())
    assert loaded.encode(activations(), prediction=torch.zeros(32, D)).acts.any()
    assert read_sae(tmp_path / to).record.hook_point == "blocks.3.hook_resid_post"


def test_a_run_is_converted_as_a_whole(tmp_path):
    saes = [TopKSAE(SAEConfig(D, M, K), seed=0), residual_sae()]
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    predictor = AffinePredictor("previous", A=[torch.eye(D)], c=[torch.zeros(D)])
    ReSAE(names, predictor, saes).save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out", "saelens")
    first, second = (
        json.loads((tmp_path / "out" / name / "cfg.json").read_text()) for name in names
    )
    assert first["metadata"]["hook_name"] == names[0]
    assert second["metadata"]["input_kind"] == "affine_residual"


def test_kinds_without_a_form_elsewhere_say_so(tmp_path):
    sae = BoostedSAE(TopKSAE(SAEConfig(D, M, K)), TopKSAE(SAEConfig(D, M, K)))
    with pytest.raises(ValueError, match="boosted.*other libraries"):
        export_sae(sae, tmp_path / "a", "saelens")
    with pytest.raises(ValueError, match="that are written: resae, saelens, sparsify$"):
        export_sae(sae.boost, tmp_path / "a", "gemma_scope")
    sae.save(tmp_path / "b")
    assert import_sae(tmp_path / "b").kind == "boosted"
    assert not (tmp_path / "a").exists()


def threshold_sae():
    record = replace(TopKSAE(SAEConfig(D, M, K)).record(), threshold=torch.full((M,), 0.4))
    sae = ThresholdSAE.from_record(record, max_active=48)
    sae.config = replace(sae.config, screening=None, input_kind="affine_residual")
    sae.on_overflow = "count"
    return sae


def prefix_sae():
    return PrefixSAE(SAEConfig(D, M, K, prefix_gain=0.25, screening="certain"), prefixes=(2, K))


def boosted_sae():
    config = SAEConfig(D, M, K, screening=None)
    return BoostedSAE(TopKSAE(config), TopKSAE(config), threshold=0.5, keep=0.5)


@pytest.mark.parametrize("made", [threshold_sae, prefix_sae, boosted_sae])
def test_a_folder_of_ours_is_rewritten_with_every_setting(made, tmp_path, capsys):
    export_sae(made(), tmp_path / "a", "resae", hook_point="blocks.1.hook_resid_post", model="m")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "resae"]) == 0
    assert ("affine residual" in capsys.readouterr().out) == (made is threshold_sae)
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == (4 if made is boosted_sae else 2)
    for path in files:
        again = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert again.read_bytes() == path.read_bytes()


def test_other_slots_change_nothing_else(tmp_path, capsys):
    export_sae(threshold_sae(), tmp_path / "a", "resae")
    command = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "resae"]
    assert main([*command, "--max-active", "9"]) == 0
    first = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert json.loads((tmp_path / "b" / "cfg.json").read_text()) == first | {"k": 9}
    assert import_sae(tmp_path / "a", max_active=9).config == load_sae(tmp_path / "b").config
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encode_here"]["path"] == "exact"


def test_nothing_is_written_over_and_nothing_is_left_half_written(tmp_path, monkeypatch):
    export_sae(TopKSAE(SAEConfig(D, M, K)), tmp_path / "a", "saelens")
    with pytest.raises(FileExistsError, match="not empty"):
        export_sae(TopKSAE(SAEConfig(D, M, K)), tmp_path / "a", "saelens")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("resae.interop.saelens.save_json", fails)
    with pytest.raises(OSError, match="disk full"):
        export_sae(TopKSAE(SAEConfig(D, M, K)), tmp_path / "b", "saelens")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_conversion_left_is_not_taken_for_autoencoders(tmp_path, monkeypatch):
    for name in "ab":
        files.sparsify(tmp_path / "saes" / name, plain())
    rename = Path.replace
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed before the end
    monkeypatch.setattr(Path, "replace", lambda p, to: sys.exit() if p.is_dir() else rename(p, to))
    with pytest.raises(SystemExit):
        convert(tmp_path / "saes", tmp_path / "saes" / "new", "resae")
    monkeypatch.undo()
    assert list((tmp_path / "saes").rglob("*.partial/*/cfg.json"))
    written = convert(tmp_path / "saes", tmp_path / "saes" / "new", "resae")
    assert [sae.folder.name for sae in written] == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: export_sae(nn.Linear(2, 2), p, "saelens"), TypeError, "got torch.*Linear"),
        (lambda p: export_sae(boosted_sae(), p, "resae", hook_point=5), TypeError, "hook_point is"),
        (lambda p: export_sae(boosted_sae(), p, "resae", model=nn), TypeError, "model is module"),
        (lambda _: import_sae(boosted_sae()), TypeError, "source is .*BoostedSAE, expected a path"),
        (lambda p: import_sae(p, hook_point=6), TypeError, "hook_point is builtins.int"),
    ],
)
def test_arguments_of_other_types_are_named(call, error, words, tmp_path):
    with pytest.raises(error, match=words):
        call(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", EXPORTS)
def test_weights_that_are_not_finite_are_not_exported(to, tmp_path):
    sae = TopKSAE(SAEConfig(D, M, K))
    sae.encoder.bias.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite entries in encoder\.bias"):
        export_sae(sae, tmp_path / "new", to)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder that stands for the repository owner/name; what was asked for is in `asked`."""
    repository, asked = tmp_path / "hub", []

    def list_repo_files(name, *, revision):
        if name != "owner/name":
            raise OSError("404")
        asked.append(revision)
        found = (p for p in repository.rglob("*") if p.is_file())
        return [p.relative_to(repository).as_posix() for p in found]

    def snapshot_download(name, *, revision, allow_patterns):
        assert not any(set("*?[") & set(pattern) for pattern in allow_patterns)
        asked.append((name, revision, allow_patterns))
        return str(repository)

    monkeypatch.setattr(hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(path=repository, asked=asked)


def test_a_repository_of_the_hub(hub_folder):
    expected = plain()
    files.sparsify(hub_folder.path / "layers.6", expected)
    sae = import_sae("owner/name", revision="v1")
    assert_same_function(sae, expected)
    _, revision, patterns = hub_folder.asked[-1]
    assert revision == "v1"
    assert "layers.6/sae.safetensors" in patterns
    assert not any(pattern.endswith((".pt", ".bin", ".pkl")) for pattern in patterns)
    files.dictionary_learning(hub_folder.path / "layers.7", expected, "AutoEncoderTopK")
    import_sae("owner/name", hook_point="layers.7", format="dictionary_learning")
    assert hub_folder.asked[-1][2] == ["layers.7/ae.pt", "layers.7/config.json"]
    files.saelens(hub_folder.path / "layers.8", expected)
    with pytest.raises(FileNotFoundError, match="2 autoencoders.*layers.6, layers.8.*hook_point"):
        import_sae("owner/name", format=None)
    with pytest.raises(FileNotFoundError, match="404"):
        import_sae("owner/other")
    with pytest.raises(ValueError, match=r"hook_point='\*' is a pattern; name one folder"):
        import_sae("owner/name", hook_point="*")
    with pytest.raises(FileNotFoundError, match="layers.99: there is no such file or folder"):
        import_sae("owner/name", hook_point="layers.99")
    with pytest.raises(FileNotFoundError, match="no such path"):
        import_sae("nowhere")
    with pytest.raises(ValueError, match="local path"):
        import_sae(hub_folder.path / "layers.8", revision="v1")


def test_a_boosted_autoencoder_on_the_hub_is_one(hub_folder):
    sae = BoostedSAE(TopKSAE(SAEConfig(D, M, K)), TopKSAE(SAEConfig(D, M, K)))
    sae.save(hub_folder.path / "blocks.1.hook_resid_post")
    assert import_sae("owner/name").kind == "boosted"


def test_names_on_the_command_line_are_those_of_the_formats():
    assert set(IMPORTS) == set(FORMATS)
    assert set(EXPORTS) == {name for name, known in FORMATS.items() if known.write is not None}


def test_convert_and_inspect_on_the_command_line(tmp_path, capsys):
    folder = files.gemma_scope(tmp_path, plain(threshold="each", subtracts=False))
    out = str(tmp_path / "ours")
    assert main(["convert", str(folder), out, "--to", "resae", "--max-active", "48"]) == 0
    assert load_sae(out).max_active == 48
    capsys.readouterr()
    assert main(["inspect", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["d_in"], facts["d_sae"], facts["k"]) == ("resae", D, M, 7)
    assert facts["hook_point"] == "blocks.20.hook_resid_post"
    assert facts["threshold"]["least"] > 0
    assert facts["zero_rows"] == {"encoder": 0, "decoder": 0}
    assert main(["inspect", str(folder)]) == 0
    assert "gemma_scope" in capsys.readouterr().out
    assert main(["convert", out, out, "--to", "saelens"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "no"), "--to", "sparsify"]) == 2
    assert "thresholds" in capsys.readouterr().err


def test_inspect_counts_dead_rows_and_names_what_is_not_finite(tmp_path, capsys):
    sae = plain()
    sae.W_dec[3] = 0
    sae.W_enc[:, 4:6] = 0
    sae.b_enc[7] = torch.inf
    sae.W_dec[9] = torch.nan
    assert main(["inspect", str(files.sparsify(tmp_path, sae)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["zero_rows"] == {"encoder": 2, "decoder": 1}
    assert facts["non_finite"] == ["bias", "W_dec"]
    assert facts["encode_here"] is None
    assert facts["norms"]["encoder"]["least"] == 0


def test_inspect_describes_both_parts_of_a_boosted_autoencoder(tmp_path, capsys):
    sae = boosted_sae()
    sae.save(tmp_path, hook_point="blocks.1.hook_resid_post", model="m")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["activation"], facts["d_sae"], facts["k"]) == ("boosted", 2 * M, 2 * K)
    assert (facts["hook_point"], facts["model"]) == ("blocks.1.hook_resid_post", "m")
    for name in ("frozen", "boost"):
        part = facts["parts"][name]
        assert (part["d_sae"], part["k"]) == (M, K)
        decoder = getattr(sae, name).W_dec.detach().norm(dim=1)
        assert part["norms"]["decoder"]["most"] == pytest.approx(float(decoder.max()))
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\nboost:\n  activation" in text
    assert re.search(r"norms +encoder \(least .*\), decoder \(least .*\), b_dec 0\n", text)


def test_a_language_model_on_the_hub_is_refused_before_its_weights_come(hub_folder, capsys):
    hub_folder.path.mkdir()
    (hub_folder.path / "model.safetensors").write_bytes(b"")
    (hub_folder.path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["inspect", "owner/name"]) == 2
    assert "config.json is that of a language model" in capsys.readouterr().err
    patterns = [file for asked in hub_folder.asked if asked for file in asked[2]]
    assert "config.json" in patterns
    assert not [file for file in patterns if not file.endswith(".json")]


def test_inspect_says_which_path_codes_take(tmp_path, screened_at_any_size):
    from resae.interop.inspection import describe_sae

    TopKSAE(SAEConfig(D, 1024, 4)).save(tmp_path / "a")
    path = describe_sae(read_sae(tmp_path / "a"))["encode_here"]
    assert path["path"] == "screened"
    assert screened_at_any_size in path["why"]
    found = read_sae(tmp_path / "a")
    high = replace(found.record, threshold=torch.full((1024,), 3.0))
    assert describe_sae(found._replace(record=high))["encode_here"]["path"] == "screened"
    files.sparsify(tmp_path / "b", plain(), k=M)
    path = describe_sae(read_sae(tmp_path / "b"))["encode_here"]
    assert path["path"] == "exact"
    assert "does not pay" in path["why"]
