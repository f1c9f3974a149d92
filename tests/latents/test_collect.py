import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from resae.latents.collect import clean_codes, collect_latents
from resae.latents.index import BINS, IndexSizes, LatentIndex, index_bytes
from resae.latents.passages import window_starts
from resae.models.sinks import SinkRule

R, T, M, N = 20, 12, 64, 3
SIZES = IndexSizes(passages=N, samples=2, window=6)


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def stack(lm):
    return tiny.stack(lm)


@pytest.fixture(scope="module")
def rows():
    ids = tiny.ids(R, T)
    ids[:, 0] = 0  # BOS
    return ids


@pytest.fixture(scope="module")
def dense(lm, stack, rows):
    """Acts of all latents at all tokens, per layer `[R, T, M]`; 0 at special tokens."""
    tokens, codes = clean_codes(lm, stack, rows)
    found = []
    for acts, indices in codes:
        of_layer = torch.zeros(R * T, M)
        of_layer[tokens] = torch.zeros(len(tokens), M).scatter_add_(1, indices, acts)
        found.append(of_layer.view(R, T, M))
    return found


@pytest.fixture(scope="module")
def index(lm, stack, rows):
    return collect_latents(lm, stack, rows.split(7), sizes=SIZES)


def test_counts_sums_and_histograms_are_those_of_dense_acts(index, dense):
    assert index.tokens == R * (T - 1)
    for layer, acts in zip(index.layers, dense, strict=True):
        acts = acts.flatten(0, 1)
        assert torch.equal(layer.firings, (acts > 0).sum(0))
        torch.testing.assert_close(layer.sums, acts.double().sum(0))
        alive = [j for j in range(M) if (acts[:, j] > 0).any()]
        assert len(alive) > M // 2
        for j in alive:
            top = 2.0 ** int(layer.histograms.exponents[j])
            assert top / 2 <= acts[:, j].max() < top
            expected = torch.histc(acts[acts[:, j] > 0, j], BINS, 0, top)
            assert layer.histograms.counts[j].tolist() == expected.tolist()


def test_the_strongest_passages_are_the_rows_with_the_largest_acts(index, dense):
    for layer, acts in zip(index.layers, dense, strict=True):
        largest, where = acts.max(1)  # [R, M]
        for j in range(M):
            kept = layer.strongest
            order = kept.values[j].argsort(descending=True)
            values, places = kept.values[j, order], kept.places[j, order]
            expected = largest[:, j].sort(descending=True).values[:N]
            torch.testing.assert_close(values, expected, rtol=0, atol=0)
            for slot, place in zip(order.tolist(), places.tolist(), strict=True):
                if place < 0:
                    continue
                row, position = divmod(place, T)
                assert position == where[row, j]
                start = int(window_starts(torch.tensor(position), SIZES.window, T))
                window = acts[row, start : start + SIZES.window, j]
                shares = window / acts[row, position, j]
                torch.testing.assert_close(kept.shares[j, slot].float(), shares, atol=1e-3, rtol=0)


def test_samples_are_passages_and_not_only_the_strongest(index, dense):
    differs = 0
    for layer, acts in zip(index.layers, dense, strict=True):
        for j in range(M):
            for place, value in zip(
                layer.sampled.places[j].tolist(), layer.sampled.values[j].tolist(), strict=True
            ):
                if place >= 0:
                    assert acts.flatten(0, 1)[place, j] == value == acts[place // T, :, j].max()
                    differs += value < layer.strongest.values[j].min()
    assert differs > 20


def test_the_result_does_not_depend_on_the_batches(lm, stack, rows, index):
    other = collect_latents(lm, stack, rows.split(20), sizes=SIZES)
    assert torch.equal(other.token_ids(), index.token_ids())
    for one, layer in zip(other.layers, index.layers, strict=True):
        assert torch.equal(one.histograms.counts, layer.histograms.counts)
        for name in ("strongest", "sampled"):
            kept = [getattr(k, name).places.sort(1).values for k in (one, layer)]
            assert torch.equal(*kept), name


def test_an_interrupted_pass_continues_from_its_file_to_the_same_index(
    lm, stack, rows, index, tmp_path
):
    collect_latents(
        lm, stack, rows.split(7), sizes=SIZES, on_batch=lambda part: part.rows_done == 14
    ).save(tmp_path / "index")
    part = LatentIndex.load(tmp_path / "index")
    assert (part.rows_done, part.sizes) == (14, SIZES)
    whole = collect_latents(lm, stack, rows[14:].split(7), index=part)
    assert whole.tokens == index.tokens
    assert torch.equal(whole.token_ids(), index.token_ids())
    for one, layer in zip(whole.layers, index.layers, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, layer.tensors()[name]), name


def test_an_index_takes_the_bytes_that_are_said_beforehand(stack, index):
    held = sum(t.nbytes for layer in index.layers for t in layer.tensors().values())
    assert held + index.token_ids().nbytes == index_bytes(stack, SIZES, R * T)


def test_sinks_and_the_first_token_are_left_out(lm, rows):
    stack = tiny.stack(lm)
    streams = lm.capture(rows[:, 1:], lm.hook_points(stack.hook_points))
    norms = [streams[p].norm(dim=-1) for p in lm.hook_points(stack.hook_points)]
    # A factor such that a few tokens are sinks.
    stack.sinks = SinkRule(tuple(float(n.median()) for n in norms), 1.3)
    tokens, _ = clean_codes(lm, stack, rows[:, 1:])
    sinks = stack.sinks.anywhere([streams[p] for p in lm.hook_points(stack.hook_points)])
    assert 0 < sinks[:, 1:].sum() < sinks.numel() // 2
    sinks[:, 0] = True
    assert torch.equal(tokens, (~sinks).flatten().nonzero().squeeze(1))


def test_what_cannot_be_indexed_is_refused(lm, stack, rows, tmp_path):
    with pytest.raises(ValueError, match="no tokens to encode"):
        collect_latents(lm, stack, [])
    with pytest.raises(ValueError, match="no tokens to encode"):
        collect_latents(lm, stack, [torch.zeros(2, 40, dtype=torch.int64)])  # BOS alone
    with pytest.raises(ValueError, match="window=32 tokens, expected 1 to the 12 of a row"):
        collect_latents(lm, stack, [rows])
    with pytest.raises(ValueError, match="rows of 5 tokens after rows of 12"):
        collect_latents(lm, stack, [rows, rows[:, :5]], sizes=SIZES)
    with pytest.raises(FileNotFoundError):
        LatentIndex.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"abc")
    with pytest.raises(ValueError, match="truncated"):
        LatentIndex.load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": [10**15, 64, 64]}, r"0.strongest.shares: shape \[64, 3, 6\], expected"),
        ({"window": 10**9}, "0.strongest.shares: shape"),
        ({"rows_done": 5}, r"rows: shape \[20, 12\], expected \[5, 12\]"),
        ({"tokens": "many"}, "tokens = 'many', expected a whole number"),
        ({"tokens": 0}, "holds no passages"),
        ({"format_version": 7}, "format version 7, expected 1"),
        ({"place": 10**6}, "passages beyond the 240 tokens"),
        ({"record": None}, "is no index of latents"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(index, tmp_path, change, message):
    path = tmp_path / "index.safetensors"
    index.save(path)
    tensors = load_file(path)
    record = json.loads(bytes(tensors["record"].tolist()))
    if "place" in change:
        tensors["1.sampled.places"][0, 0] = change["place"]
    elif "record" in change:
        del tensors["record"]
    else:
        text = json.dumps(record | change).encode()
        tensors["record"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as caught:
        LatentIndex.load(path)
    assert "\n" not in str(caught.value)
