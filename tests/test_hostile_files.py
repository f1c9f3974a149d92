"""Files that came from anyone are read within bounds, or refused in one line.

`python tests/test_hostile_files.py N` tries N mutations per reader; the tests try a few.
"""

import gc
import gzip
import json
import logging
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from mutations import try_mutations

from resae import ReSAE, TopKSAE
from resae.data.activations import ModelActivations
from resae.data.cache import ActivationCache
from resae.data.rows import TokenRows
from resae.data.text_record import RunText, TrainedText, save_held_out
from resae.data.texts import load_texts
from resae.replacements.edits import Interventions
from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.prefix import PrefixSAE
from resae.sae.registry import load_sae
from resae.settings import read_file
from resae.storage import load_json, load_tensors, save_json, save_tensors
from resae.training.calibration import Calibration
from resae.training.checkpoints import load_newest, resumed_config, save_checkpoint
from resae.training.config import RunConfig, TrainConfig
from resae.training.distributed import SINGLE_PROCESS
from resae.training.maps import FittedMaps
from resae.training.runs import load_record
from resae.training.start import initial_state


def small_stack():
    lm = tiny.pythia()
    return tiny.stack(lm, "previous")


def stack_reader(folder):
    small_stack().save_pretrained(folder)
    (folder / "README.md").unlink()
    return lambda: ReSAE.load(folder)


def low_rank_reader(folder):
    stack_reader(folder)
    D, r = 32, 2
    maps = {"U.1": (D, r), "V.1": (r, D), "skip.1": (1,), "c.1": (D,)}
    maps |= {"U.2": (2 * D, r), "V.2": (r, D), "skip.2": (2,), "c.2": (D,)}
    tensors = {name: torch.randn(*shape) for name, shape in maps.items()}
    save_tensors(folder / "affine.safetensors", tensors)
    description = load_json(folder / "resae.json", "stack")
    save_json(folder / "resae.json", description | {"predictor": "all_previous"})
    return lambda: ReSAE.load(folder)


def boosted_reader(folder):
    config = SAEConfig(8, 16, 2)
    BoostedSAE(PrefixSAE(config, prefixes=(1, 2)), TopKSAE(config), threshold=0.5).save(folder)
    return lambda: load_sae(folder)


def prefix_reader(folder):
    PrefixSAE(SAEConfig(8, 16, 4), prefixes=(1, 2, 4)).save(folder)
    return lambda: load_sae(folder)


RECORD = {
    "command": "resae train",
    "config": {"model": "m", "data": "d", "k": 4, "layers": ["0", "1"]},
    "model": "m",
    "data": "d",
    "text_column": "text",
    "streaming": False,
    "context_tokens": 16,
    "held_out_rows": 4,
    "dtype": "float32",
    "affine": [{"method": "resae", "hop": "a → b", "r2": 0.5}],
    "held_out_split": "train",
}
MAPS = {"layers": tiny.NAMES, "predictor": "previous", "map_type": "full", "rank": None} | {
    "calibration_tokens": 100,
    "ridge": 1e-4,
    "seed": 0,
}


def record_reader(folder):
    save_json(folder / "run.json", RECORD | {"train": MAPS | {"train_tokens": 100}})
    return lambda: load_record(folder / "run.json", "run")


def calibration():
    predictor = small_stack().predictor
    return Calibration(predictor, [1.0, 2.0, 3.0], [torch.zeros(32)] * 3)


def maps_reader(folder):
    save_json(folder / "fit.json", RECORD | MAPS)
    calibration().save(folder / "calibration.safetensors")
    config = RunConfig(model="m", data="d", k=4, out=str(folder / "out"))
    return lambda: FittedMaps.open(folder).complete(config)


def checkpoint_reader(folder):
    config = TrainConfig(tuple(tiny.NAMES), (2, 2, 2), 64, train_tokens=4_096, batch_tokens=128)

    def fresh():
        return initial_state(config, calibration(), None, "cpu")

    state = fresh()
    for name, parameter in state.stack.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        assert name
    state.optimizer.step()
    state.step = 4
    (folder / "checkpoints").mkdir()
    save_checkpoint(folder / "checkpoints", state, config, 2, SINGLE_PROCESS)
    resumed = fresh()

    def read():
        resumed_config(config, folder)
        resumed.optimizer.state.clear()
        load_newest(folder / "checkpoints", resumed, config, SINGLE_PROCESS)

    return read


def text_record_reader(folder):
    text = TrainedText()
    for row in torch.randint(2_000, (4, 32)).tolist():
        text.add(row)
    text.save(folder)
    save_held_out(folder, list(torch.randint(2_000, (3, 32))), 32)

    def read():
        record = RunText.load(folder)  # None: files of other ranks are absent
        return record and record.overlap(torch.randint(2_000, (2, 32)))

    return read


def interventions_reader(folder):
    edits = [
        {"layer": 1, "action": "ablate", "latents": [17, 40]},
        {"layer": "blocks.3.hook_resid_post", "action": "clamp", "latents": 5, "value": 8.0},
        {"layer": 5, "action": "add", "vector": [0.5, 1], "at": [1, 2]},
    ]
    save_json(folder / "edits.json", {"edits": edits, "keep_error": True, "effects": "frozen"})
    return lambda: Interventions.parse(folder / "edits.json")


def settings_reader(folder):
    save_json(folder / "config.json", RECORD["config"] | {"out": "/tmp", "lr": 0.1, "shared": True})
    toml = 'model = "m"\ndata = "d"\nk = 4\nlayers = ["0", "1"]\nlr = 1e-3\nshared = true\n'
    (folder / "config.toml").write_text(toml)

    def read():
        for name in ("config.json", "config.toml"):
            read_file(folder / name, RunConfig)

    return read


def cache_reader(folder):
    lm = tiny.pythia()
    texts = ["In the beginning God created the heaven and the earth."] * 5
    points = lm.hook_points([0, 1])

    def cache():
        activations = ModelActivations(lm, TokenRows(texts, lm.tokenizer, 16), points)
        return ActivationCache(folder, activations)

    def read():
        """What is damaged is written again."""
        cache().reader(0)(2)

    read()
    return read


def saved_reader(folder):
    columns = {"text": [SENTENCE] * 8, "input_ids": [[1, 2, 3]] * 8, "messages": [CHAT] * 8}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return lambda: [list(load_texts(str(folder / "saved"), text_column=name)) for name in columns]


def tables_reader(folder):
    table = datasets.Dataset.from_dict({"text": [SENTENCE] * 8, "messages": [CHAT] * 8})
    table.to_json(folder / "a.jsonl")
    table.to_parquet(folder / "b.parquet")
    table.remove_columns("messages").to_csv(folder / "c.csv")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    return lambda: [list(load_texts(str(path))) for path in sorted(folder.iterdir())]


def plain_reader(folder):
    """One document that decides: each is refused by itself."""
    (folder / "a.txt").write_text(SENTENCE * 20)
    (folder / "b.txt.gz").write_bytes(gzip.compress(SENTENCE.encode() * 20))
    return lambda: list(load_texts(str(folder)))


SENTENCE = "In the beginning God created the heaven and the earth; schöne Bücher. "
CHAT = [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": "Yes."}]
READERS = {
    name.removesuffix("_reader"): reader
    for name, reader in list(globals().items())
    if name.endswith("_reader")
}


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves a .csv open on an error
@pytest.mark.parametrize("reader", READERS)
def test_a_mutated_file_is_read_or_refused_in_one_line(reader, tmp_path):
    read = READERS[reader](tmp_path)
    read()
    few = reader in ("tables", "cache")  # these take longest
    refused, _ = try_mutations(tmp_path, read, count=12 if few else 40, seed=1)
    if reader not in ("checkpoint", "cache"):  # these use an earlier one, or write it again
        assert refused >= 4
    gc.collect()


# -- by hand -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    small_stack().save_pretrained(tmp_path / "stack")
    return tmp_path / "stack"


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(folder, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        ReSAE.load(folder)
    assert "\n" not in str(raised.value)
    assert time.process_time() - began < 5  # the bound of a hang, not of speed


@pytest.mark.parametrize(
    "name", ["../outside", "/etc", "..", ".", "a/b", ".hidden", "", "a\\b", "a\0b", "x" * 300]
)
def test_hook_points_that_lead_out_of_the_folder_are_refused(folder, name):
    shutil.copytree(folder / tiny.NAMES[0], folder.parent / "outside")
    change(folder / "resae.json", hook_points=[name, *tiny.NAMES[1:]])
    refused(folder, "hook_points=")


@pytest.mark.parametrize(
    "path", ["resae.json", "affine.safetensors", tiny.NAMES[1], f"{tiny.NAMES[1]}/sae.safetensors"]
)
def test_links_that_lead_out_of_the_folder_are_refused(folder, path):
    outside = folder.parent / "outside"
    (folder / path).rename(outside)
    (folder / path).symlink_to(outside)
    refused(folder, "symbolic link to .*outside, outside its folder")


def test_links_of_the_hub_into_its_own_files_are_read(folder):
    cache = folder.parent / "models--someone--stack"
    shutil.copytree(folder, cache / "snapshots" / "main")
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted((cache / "snapshots" / "main").rglob("*"))):
        if path.is_file():
            path.rename(cache / "blobs" / str(number))
            path.symlink_to(os.path.relpath(cache / "blobs" / str(number), path.parent))
    loaded = ReSAE.load(cache / "snapshots" / "main")
    assert torch.equal(loaded.sae(1).W_dec, ReSAE.load(folder).sae(1).W_dec)


@pytest.mark.parametrize("made", ["fifo", "circle", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(folder, made):
    path = folder / "resae.json"
    path.unlink()
    if made == "fifo":
        os.mkfifo(path)
    elif made == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if made == "device" else path)
    with pytest.raises((ValueError, FileNotFoundError), match="resae.json"):
        ReSAE.load(folder)


def test_a_pickle_is_never_opened(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    sae = folder / tiny.NAMES[1] / "sae.safetensors"
    sae.write_bytes(pickle.dumps(Payload()))
    refused(folder, "not safetensors")
    torch.save(Payload(), sae)
    refused(folder, "not safetensors")
    assert not (folder / "executed").exists()


def write_header(path, header, body=0):
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + body)


@pytest.mark.parametrize("M", [2**40, 2**61])
def test_sizes_in_a_header_or_in_cfg_json_allocate_nothing(folder, M):
    """Either alone is refused, and both together, since the file is not as long."""
    sae = folder / tiny.NAMES[0]
    original = (sae / "cfg.json").read_bytes()
    change(sae / "cfg.json", num_latents=M)
    refused(folder, "do not fit cfg.json")
    shapes = {"encoder.weight": [M, 32], "encoder.bias": [M], "W_dec": [M, 32], "b_dec": [32]}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * (shape[0] * 32 if len(shape) == 2 else shape[0])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    write_header(sae / "sae.safetensors", header, body=64)
    refused(folder, "truncated" if M < 2**60 else "beyond 64 bits")
    (sae / "cfg.json").write_bytes(original)
    refused(folder, "truncated" if M < 2**60 else "beyond 64 bits")


def test_a_giant_header_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)
    with pytest.raises(ValueError, match="expected at most 4,194,304"):
        load_tensors(path, "SAE")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    path = folder / tiny.NAMES[2] / "sae.safetensors"
    tensors = load_tensors(path, "SAE")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["W_dec"][3, 4] = value
    save_tensors(path, tensors)
    refused(folder, "sae.safetensors: tensor 'W_dec' holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_types_are_refused(folder, dtype):
    path = folder / tiny.NAMES[2] / "sae.safetensors"
    tensors = load_tensors(path, "SAE")
    save_tensors(path, {**tensors, "W_dec": tensors["W_dec"].to(dtype)})
    refused(folder, "do not fit cfg.json|of type")


def test_parts_of_other_widths_are_refused(folder):
    shutil.rmtree(folder / tiny.NAMES[1])
    TopKSAE(SAEConfig(16, 64, 4)).save(folder / tiny.NAMES[1])
    refused(folder, "several widths")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    for reader in sys.argv[2:] or READERS:
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as cache:
            datasets.config.HF_DATASETS_CACHE = Path(cache)
            one = READERS[reader](Path(made))
            began = time.time()
            counts = try_mutations(Path(made), one, count=int(sys.argv[1]), seed=2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of all so far
            line = f"{reader}: {counts[0]} refused, {counts[1]} read, {time.time() - began:.0f} s, "
            line += f"peak memory {peak:.0f} MiB"
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
