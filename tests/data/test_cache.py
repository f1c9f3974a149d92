import json
import logging

import pytest
import tiny
import torch

from resae.data.activations import ModelActivations
from resae.data.batches import ActivationBatches, Position, sequential
from resae.data.cache import ActivationCache
from resae.data.rows import TokenRows

TEXTS = [f"{word} and the earth was without form, and void; " * 60 for word in ("In", "On", "At")]
WIDTH = 32


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture
def passes(lm, monkeypatch):
    """Counts the passes of the model."""
    counted = []
    capture = lm.capture
    monkeypatch.setattr(lm, "capture", lambda *a, **k: counted.append(1) or capture(*a, **k))
    return counted


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("resae.data.cache.SHARD_TOKENS", 2 * 16 * 24)


def activations(lm, texts=TEXTS, context=24, layers=(0, 2)):
    return ModelActivations(lm, TokenRows(texts, lm.tokenizer, context), lm.hook_points(layers))


def cache_of(lm, folder, dtype=None, data="text", **options):
    return ActivationCache(
        folder / "cache", activations(lm, **options), data={"data": data}, dtype=dtype
    )


def joined(source):
    return [torch.cat(layer) for layer in zip(*sequential(source), strict=True)]


def source_of(lm, cache=None):
    of = activations(lm)
    sizes = {"batch_tokens": 32, "buffer_tokens": 320, "seed": 3}
    return ActivationBatches(lm, of.rows, of.points, cache=cache, **sizes)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def test_what_is_read_is_what_the_model_gives_at_every_layer(lm, tmp_path):
    for x, y in zip(joined(cache_of(lm, tmp_path)), joined(activations(lm)), strict=True):
        assert len(x) > 2 * 2 * 16 * 23
        assert torch.equal(x, y)
    shards = sorted(p.name for p in (tmp_path / "cache").glob("shard_*"))
    assert shards == [f"shard_{i:05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2


@pytest.mark.parametrize("row", [0, 5, 31, 32, 50])
def test_reading_starts_at_any_row_and_crosses_files(lm, tmp_path, row):
    counts, xs = cache_of(lm, tmp_path).reader(row)(40)
    expected, ys = activations(lm).reader(row)(40)
    assert counts == expected
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y)


def test_a_second_run_does_not_run_the_model_and_has_the_same_batches(lm, tmp_path, passes):
    first = take(source_of(lm, cache_of(lm, tmp_path)).batches(), 150)
    assert first[-1][1].epoch >= 1
    ran = len(passes)
    second = take(source_of(lm, cache_of(lm, tmp_path)).batches(), 150)
    assert len(passes) == ran > 0
    for (xs, at), (ys, same) in zip(first, second, strict=True):
        assert at == same
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("start", [3, 17, 60])
def test_batches_go_on_from_a_position(lm, tmp_path, start):
    whole = take(source_of(lm, cache_of(lm, tmp_path)).batches(Position()), start + 12)
    resumed = take(source_of(lm, cache_of(lm, tmp_path)).batches(whole[start - 1][1]), 12)
    for (xs, at), (ys, same) in zip(whole[start:], resumed, strict=True):
        assert at == same
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_an_interrupted_writing_goes_on_where_it_stopped(lm, tmp_path, passes):
    cache_of(lm, tmp_path).reader(0)(40)  # two files of 32 rows
    there = {p.name: p.read_bytes() for p in (tmp_path / "cache").glob("shard_*")}
    assert len(there) == 2
    (tmp_path / "cache" / ".shard_00002.safetensors.x1").write_text("cut off")
    ran = len(passes)
    read = joined(cache_of(lm, tmp_path))
    again = len(passes) - ran
    assert all(torch.equal(x, y) for x, y in zip(read, joined(activations(lm)), strict=True))
    for name, content in there.items():
        assert (tmp_path / "cache" / name).read_bytes() == content
    passes.clear()
    joined(activations(lm))
    assert again == len(passes) - ran  # all passes but those of the two files
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "gone", "overwritten"])
def test_a_damaged_file_is_named_and_written_again(lm, tmp_path, caplog, damage):
    whole = joined(cache_of(lm, tmp_path))
    shard = tmp_path / "cache" / "shard_00001.safetensors"
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-100])
    elif damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(b"\xff" * len(content))
    with caplog.at_level(logging.WARNING):
        read = joined(cache_of(lm, tmp_path))
    assert "shard_00001.safetensors" in caplog.text
    assert "written again" in caplog.text
    for x, y in zip(read, whole, strict=True):
        torch.testing.assert_close(x, y)
    assert len(shard.read_bytes()) == len(content)


def test_files_missing_here_and_there_are_written_from_their_own_rows(lm, tmp_path):
    whole = joined(cache_of(lm, tmp_path))
    for number in (0, 2):
        (tmp_path / "cache" / f"shard_{number:05d}.safetensors").unlink()
    for x, y in zip(joined(cache_of(lm, tmp_path)), whole, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"layers": (0, 1)}, "layers: .*resid_post'], here", id="layers"),
        pytest.param({"context": 16}, "context_tokens: 24, here 16", id="context"),
        pytest.param({"dtype": "bfloat16"}, "dtype: float32, here bfloat16", id="dtype"),
        pytest.param({"data": "another"}, "data: text, here another", id="data"),
        pytest.param({"texts": ["other words " * 900]}, "first rows", id="text"),
    ],
)
def test_other_settings_are_refused_and_named(lm, tmp_path, change, says):
    cache_of(lm, tmp_path).reader(0)(1)
    with pytest.raises(ValueError, match=f"is of other activations.*{says}"):
        cache_of(lm, tmp_path, **change)


def test_other_weights_under_the_same_name_are_refused(lm, tmp_path):
    cache_of(lm, tmp_path).reader(0)(1)
    other = tiny.pythia()
    with torch.no_grad():
        other.blocks[0].mlp.dense_4h_to_h.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"\(model weights: "):
        cache_of(other, tmp_path)


def test_a_folder_of_something_else_is_left_alone(lm, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("…")
    with pytest.raises(ValueError, match=r"holds no cache\.json"):
        cache_of(lm, tmp_path)


def test_bfloat16_takes_half_and_rounds_to_eight_bits(lm, tmp_path):
    full = ActivationCache(tmp_path / "full", activations(lm))
    half = ActivationCache(tmp_path / "half", activations(lm), dtype="bfloat16")
    assert full.bytes_for(10) == 10 * 2 * WIDTH * 4 == 2 * half.bytes_for(10)
    for x, y in zip(joined(full), joined(half), strict=True):
        assert y.dtype == torch.float32
        error = ((x - y).abs() / x.abs()).max()
        assert 2**-11 < error <= 2**-8
    sizes = [sum(p.stat().st_size for p in tmp_path.glob(f"{n}/shard*")) for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_too_little_disk_is_said_before_anything_is_written(lm, tmp_path):
    cache = cache_of(lm, tmp_path)
    with pytest.raises(ValueError, match=r"GB are to be written, and .* GB are free"):
        cache.require_disk(10**15)
    cache.require_disk(10)
    assert not (tmp_path / "cache").exists()


def test_the_index_says_what_is_there(lm, tmp_path):
    cache = cache_of(lm, tmp_path)
    tokens = len(joined(cache)[0])
    index = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert index["layers"] == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert index["rows_in_all"] == len(list(activations(lm).rows))
    assert sum(s["tokens"] for s in index["shards"].values()) == tokens == cache.stored_tokens
