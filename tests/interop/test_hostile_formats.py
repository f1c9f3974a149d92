"""Files from strangers are read or refused in one line, within bounded memory."""

import io
import json
import random
import resource
import zipfile

import damaged_files
import foreign_files as files
import pytest
import torch
from foreign_files import D, M, plain

from resae import TopKSAE, import_sae
from resae.cli import main
from resae.interop.files import read_npz, read_pickled_tensors
from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.record import SAERecord
from resae.sae.registry import load_sae
from resae.sae.threshold import ThresholdSAE

MUTATIONS = 60
"""Per reader. `python tests/interop/test_hostile_formats.py 10000` makes more of them."""


def boosted(folder):
    BoostedSAE(TopKSAE(SAEConfig(D, M, 4)), TopKSAE(SAEConfig(D, M, 4)), threshold=0.1).save(folder)


def threshold(folder):
    sae = plain(threshold="each")
    record = SAERecord(sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, 4, sae.threshold)
    ThresholdSAE(record).save(folder)


def openai(folder):
    folder.mkdir()
    files.openai(folder / "0.pt", plain(threshold=0))


def named(format, file=""):
    return lambda folder: import_sae(folder / file if file else folder, format=format)


READERS = {
    "own topk": (lambda p: TopKSAE(SAEConfig(D, M, 4)).save(p), load_sae),
    "own boosted": (boosted, load_sae),
    "own threshold": (threshold, named("resae")),
    "saelens": (lambda p: files.saelens(p, plain(threshold="each")), named(None)),
    "saelens 5": (lambda p: files.saelens_5(p, plain()), named("saelens")),
    "sparsify": (lambda p: files.sparsify(p, plain()), named("sparsify")),
    "mlsae": (lambda p: files.mlsae(p, plain()), named("mlsae")),
    "gemma_scope": (lambda p: files.gemma_scope(p, plain(threshold="each")), None),
    "dictionary_learning": (
        lambda p: files.dictionary_learning(p, plain(), "AutoEncoderTopK"),
        named("dictionary_learning"),
    ),
    "openai": (openai, named("openai", "0.pt")),
}
WITHIN = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_7"


def fuzz(name, folder, number, seed=0):
    """Answers to `number` damaged copies: refused and read."""
    write, read = READERS[name]
    read = read or (lambda p: import_sae(p / WITHIN, format="gemma_scope"))
    write(folder / "original")
    rng = random.Random(f"{name} {seed}")
    answers = [
        damaged_files.answer(_finite(read), folder / "original", folder / "copy", rng)[1]
        for _ in range(number)
    ]
    return answers.count("refused"), answers.count("read")


def _finite(read):
    """Our own `load_sae` leaves NaN to its caller."""

    def checked(path):
        sae = read(path)
        for t in sae.state_dict().values():
            if not bool(t.isfinite().all()):
                raise ValueError("not finite")
        return sae

    return checked if read is load_sae else read


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")  # torch's and numpy's own, on damaged files
def test_damaged_files_are_refused_in_one_line_or_read(name, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, read = fuzz(name, tmp_path, MUTATIONS)
    assert refused > MUTATIONS // 4
    assert refused + read == MUTATIONS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10  # KiB: of files of 10 KB


def test_sizes_that_settings_promise_are_held_against_the_file_first(tmp_path):
    for folder in ("a", "b"):
        TopKSAE(SAEConfig(D, M, 4)).save(tmp_path / folder)
    file = tmp_path / "a" / "cfg.json"
    file.write_text(file.read_text().replace(f'"num_latents": {M}', '"num_latents": 1000000000'))
    with pytest.raises(ValueError, match="do not fit cfg.json"):  # 64 GB would be allocated
        load_sae(tmp_path / "a")
    file = tmp_path / "b" / "cfg.json"
    file.write_text(file.read_text().replace(f'"d_in": {D}', '"d_in": "16"'))
    with pytest.raises(ValueError, match="d_in = '16', expected a whole number"):
        load_sae(tmp_path / "b")


def test_a_header_that_promises_a_million_million_numbers_asks_for_no_memory(tmp_path):
    damaged_files.npz(tmp_path / "params.npz", "(1000000, 1000000)")
    with pytest.raises(ValueError, match="promises 4000000000000 bytes, and 0 are there"):
        read_npz(tmp_path / "params.npz")
    damaged_files.npz(tmp_path / "params.npz", "(2, 2)", "|O", b"0" * 32)
    with pytest.raises(ValueError, match="dtype object"):
        read_npz(tmp_path / "params.npz")
    damaged_files.npz(tmp_path / "params.npz", "(1000, 1000)", data=bytes(4_000_000))
    with pytest.raises(ValueError, match="expand to 40.*more than 8 times"):
        read_npz(tmp_path / "params.npz")


class Opens:
    """What an unpickler would call."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call", [(print, ("owned",)), (bytearray, (10**12,)), (torch.FloatStorage, (10**11,))]
)
def test_a_pickle_that_calls_anything_is_refused_unopened(call, tmp_path, capsys):
    torch.save({"encoder.weight": Opens(call)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="not a readable state dict"):
        import_sae(tmp_path, format="dictionary_learning")
    assert capsys.readouterr().out == ""


def test_a_view_larger_than_its_data_is_refused(tmp_path):
    torch.save({"encoder.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="larger than its data"):
        read_pickled_tensors(tmp_path / "ae.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000_000)
    with pytest.raises(ValueError, match="expand"):
        read_pickled_tensors(tmp_path / "bomb.pt")


def test_links_may_not_lead_out_of_the_folder_but_the_hub_cache_is_made_of_them(tmp_path):
    files.sparsify(tmp_path / "elsewhere", plain())
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("cfg.json", "sae.safetensors"):
        (hostile / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(ValueError, match="outside its folder"):
        import_sae(hostile)
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / "abc" / "layers.6").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, name in enumerate(("cfg.json", "sae.safetensors")):
        (tmp_path / "elsewhere" / name).rename(cache / "blobs" / str(number))
        link = cache / "snapshots" / "abc" / "layers.6" / name
        link.symlink_to(f"../../../blobs/{number}")
    assert import_sae(cache / "snapshots" / "abc" / "layers.6").config.d_in == D
    (tmp_path / "whole").symlink_to(cache / "snapshots" / "abc" / "layers.6")
    assert import_sae(tmp_path / "whole").config.d_in == D  # the user's own link to a folder


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "\ufeff{}"])
def test_json_that_is_deep_or_no_object_is_refused(content, tmp_path):
    files.sparsify(tmp_path, plain())
    (tmp_path / "cfg.json").write_text(content)
    for read in (import_sae, load_sae):
        with pytest.raises(ValueError, match="cfg.json"):
            read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_dtypes_are_refused(dtype, tmp_path):
    sae = plain()
    files.sparsify(tmp_path, sae._replace(b_dec=sae.b_dec.to(dtype)))
    with pytest.raises(ValueError, match="dtype"):
        import_sae(tmp_path, format="sparsify")
    files.sparsify(tmp_path, sae._replace(W_enc=sae.W_enc.to(dtype)))
    with pytest.raises(ValueError, match="dtype"):
        load_sae(tmp_path)


def change(file, **entries):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **entries}))


def test_names_in_a_file_cannot_steer_a_terminal(tmp_path, capsys, monkeypatch):
    """They are printed escaped, one line each, and cut; a lone surrogate is printed at all."""
    files.sparsify(tmp_path / "a", plain())
    hostile = "\x1b[2J\nfolded none\u202e\ud800"
    change(tmp_path / "a" / "cfg.json", metadata={"hook_point": hostile, "model": "x" * 100_000})
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    said = stream.buffer.getvalue().decode()
    assert "hook_point           \\x1b[2J\\nfolded none\\u202e\\ud800\n" in said
    assert len(said) < 2_000
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert b"\\u2013" in stream.buffer.getvalue()
    files.sparsify(tmp_path / "b", plain(), extra={"\x1b[31m": torch.zeros(2)})
    assert main(["inspect", str(tmp_path / "b")]) == 2
    assert "has '\\x1b[31m', which no kind" in capsys.readouterr().err
    (tmp_path / "c" / "\x1b[31m").mkdir(parents=True)
    files.sparsify(tmp_path / "c" / "\x1b[31m" / "d", plain())
    assert main(["inspect", str(tmp_path / "c")]) == 2
    assert "\\x1b[31m/d" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "file", "entries", "words"),
    [
        (files.saelens, "cfg.json", {"d_in": 99}, "d_in = 99, its tensors 16"),
        (files.saelens, "cfg.json", {"d_sae": 1}, "d_sae = 1, its tensors 64"),
        (files.saelens, "cfg.json", {"k": 1e300}, r"k = 1e\+300, expected a whole number"),
        (files.sparsify, "cfg.json", {"d_in": 10**9}, "d_in = 1000000000, its tensors 16"),
        (files.sparsify, "cfg.json", {"num_latents": 7}, "num_latents = 7, its tensors 64"),
        (files.mlsae, "config.json", {"n_latents": 65}, "n_latents = 65, its tensors 64"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(write, file, entries, words, tmp_path):
    write(tmp_path, plain())
    change(tmp_path / file, **entries)
    with pytest.raises(ValueError, match=words) as raised:
        import_sae(tmp_path)
    assert len(str(raised.value)) < 400


if __name__ == "__main__":
    import sys
    import tempfile
    import time
    from pathlib import Path

    for reader in READERS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            refused, read = fuzz(reader, Path(folder), int(sys.argv[1]), seed=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        seconds = time.perf_counter() - began
        print(f"{reader}: {refused} refused, {read} read, {seconds:.0f} s, peak {peak} MiB")  # noqa: T201
