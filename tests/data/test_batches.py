from collections import deque
from itertools import islice

import pytest
import tiny
import torch

from resae.data.activations import capture_tokens
from resae.data.batches import ActivationBatches, Position, StoredActivations, _with_lookahead
from resae.data.rows import TokenRows, train_and_held_out
from resae.data.texts import fingerprint, load_texts

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "def f(x):\n    return x",
    "",
] * 5


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(autouse=True)
def no_pause_after_a_stream(monkeypatch):
    """datasets waits five seconds for its threads whenever the reading of a stream ends."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def rows_of(lm, texts=TEXTS, context=16, **options):
    return TokenRows(texts, lm.tokenizer, context, **options)


def test_rows_hold_every_token_once_in_order(lm):
    rows = list(rows_of(lm))
    assert all(row.shape == (16,) for row in rows)
    assert all(row[0] == lm.tokenizer.bos_token_id for row in rows)
    packed = torch.cat([row[1:] for row in rows]).tolist()
    stream = []
    for text in TEXTS:
        stream += lm.tokenizer(text, add_special_tokens=False)["input_ids"] + [0]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 15


def test_rows_can_be_iterated_again_skipped_and_cut(lm):
    everything = list(rows_of(lm))
    some = rows_of(lm, skip=2, take=3)
    for _ in range(2):
        assert [r.tolist() for r in some] == [r.tolist() for r in everything[2:5]]
    assert [len(b) for b in rows_of(lm, take=5).batches(2)] == [2, 2, 1]


def test_a_tokenizer_without_bos_starts_rows_with_its_eos():
    class OnlyEos:
        eos_token_id, bos_token_id = 7, None

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2, 3] for _ in texts]}

    (row,) = list(TokenRows(["a", "b"], OnlyEos(), 8))
    assert row.tolist() == [7, 1, 2, 3, 7, 1, 2, 3]


@pytest.mark.parametrize("ending", ["txt", "folder", "jsonl", "parquet"])
def test_texts_are_read_from_local_files(tmp_path, ending):
    import datasets

    texts = ["one", "two", "three"]
    if ending == "txt":
        path = tmp_path / "a.txt"
        path.write_text("one two three")
        assert list(load_texts(str(path))) == ["one two three"]
        return
    if ending == "folder":
        path = tmp_path
        for text in texts:
            (tmp_path / f"{text}.txt").write_text(text)
    else:
        path = tmp_path / f"a.{ending}"
        table = datasets.Dataset.from_dict({"text": texts, "n": [1, 2, 3]})
        table.to_json(path) if ending == "jsonl" else table.to_parquet(path)
    read = load_texts(str(path))
    assert sorted(read) == sorted(texts)
    assert list(read) == list(load_texts(str(path)))


def test_order_depends_on_the_seed_and_streaming_gives_the_same_texts(tmp_path):
    import datasets

    texts = [str(i) for i in range(50)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert list(load_texts(path, seed=0)) != list(load_texts(path, seed=1))
    assert sorted(load_texts(path, streaming=True)) == sorted(texts)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        pytest.param("nowhere/at_all.txt", {}, FileNotFoundError, "not found", id="no-file"),
        pytest.param("./missing_folder", {}, FileNotFoundError, "not found", id="no-folder"),
        pytest.param("embedded", {"split": "test"}, FileNotFoundError, "split 'test'", id="split"),
        pytest.param(
            "embedded",
            {"text_column": "body"},
            ValueError,
            "no column 'body'",
            id="column",
        ),
    ],
)
def test_unreadable_data_is_named_with_the_remedy(data, options, error, message):
    with pytest.raises(error, match=message):
        list(load_texts(data, **options))


def test_several_kinds_of_files_in_one_folder_are_an_error(tmp_path):
    import datasets

    (tmp_path / "notes.txt").write_text("not the data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "hidden.csv").write_text("text\nx\n")
    assert list(load_texts(str(tmp_path))) == ["not the data"]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"text": ["the data"]}).to_parquet(tmp_path / "data" / "a.parquet")
    with pytest.raises(
        ValueError, match=r"1 \.txt \(notes\.txt\), 1 \.parquet \(a\.parquet\).*pass"
    ):
        load_texts(str(tmp_path))
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "dataset_info.json").write_text("{}")
    assert list(load_texts(str(tmp_path))) == ["the data"]
    (tmp_path / "data" / "b.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"several kinds: 1 \.parquet .*1 \.csv"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("offset", [0, 7, (1 << 24) - 1, (1 << 24) + 5])
def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path, ending, offset):
    path = tmp_path / f"a.{ending}"
    good = "ä".encode() * (offset // 2) + b"a" * (offset % 2)
    path.write_bytes(good + "ü".encode("latin1") + b"bc")
    with pytest.raises(
        ValueError, match=rf"a\.{ending}: byte 0xfc at offset {offset:,} is not UTF"
    ):
        load_texts(str(path))


def test_a_file_that_ends_inside_a_character_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("aä".encode()[:-1])
    with pytest.raises(ValueError, match="byte 0xc3 at offset 1 "):
        load_texts(str(tmp_path))


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"text": "b', "JSON"),
        ("a.jsonl", GOOD + "hello\n" + GOOD, "JSON"),
        ("a.jsonl", GOOD + '{"text": null}\n', "null|None"),
        ("a.jsonl", GOOD + '{"txt": "b"}\n', "null|None"),
        ("a.jsonl", '{"text": 1}\n', "holds int64, expected strings"),
        ("a.jsonl", GOOD + '{"text": 1}\n', "holds values of several types|1, expected"),
        ("a.jsonl", '{"text": [1.5]}\n', r"holds (lists of double|\[1.5\]), expected"),
        (
            "a.jsonl",
            '{"text": [["a"]]}\n',
            r"holds (lists of lists of string|\[\['a'\]\]), expected",
        ),
        ("a.jsonl", '{"text": {"a": 1}}\n', r"holds (objects with a|\{'a': 1\}), expected"),
        ("a.csv", "text,n\n,1\nb,2\n", "null|None"),
        ("a.csv", "text,n\n3,1\n4,2\n", "int64|holds [34], expected a string"),
        ("a.parquet", "junk", "cannot be read: Parquet"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "", "is empty"),
    ],
)
def test_damaged_files_and_columns_of_other_things_are_named(
    tmp_path, name, content, message, streaming
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}'.*({message})") as raised:
        list(load_texts(str(tmp_path / name), streaming=streaming))
    assert "\n" not in str(raised.value)


def test_the_damaged_line_and_the_null_row_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 2 + "\n" + GOOD + "hello\n")
    with pytest.raises(ValueError, match=r"\(a\.jsonl, line 5\)"):
        load_texts(str(path))
    path.write_text(GOOD * 2 + '{"text": null}\n' * 3)
    with pytest.raises(ValueError, match=r"3 of 5 entries of column 'text' are null.*row 2"):
        load_texts(str(path))


def test_rows_longer_than_the_context_are_refused_before_the_text_is_read(lm):
    with pytest.raises(ValueError, match="rows of 65 tokens are longer than its context of 64"):
        train_and_held_out("no/such.txt", lm, context_tokens=65, held_out_rows=4)


def test_a_fingerprint_follows_from_content_number_and_order():
    texts = ["one", "two", "three"]
    same = fingerprint(list(texts))
    assert same == fingerprint(texts)
    assert (same["documents"], same["characters"]) == (3, 11)
    others = (["two", "one", "three"], ["onet", "wo", "three"], texts[:2])
    for other in others:
        assert fingerprint(other)["sha256"] != same["sha256"]
    assert fingerprint(iter(texts * 200))["documents"] == 256


def test_held_out_rows_are_of_the_validation_split_or_set_apart(lm, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 2000)
    train, held_out = train_and_held_out(str(path), lm, context_tokens=16, held_out_rows=4)
    everything = list(TokenRows([path.read_text()], lm.tokenizer, 16))
    assert [r.tolist() for r in held_out] == [r.tolist() for r in everything[:4]]
    assert [r.tolist() for r in train] == [r.tolist() for r in everything[4:]]

    train, held_out = train_and_held_out("embedded", lm, context_tokens=64, held_out_rows=8)
    assert len(list(held_out)) == 8
    validation = set(load_texts("embedded", split="validation"))
    assert set(held_out.texts) == validation
    assert not validation & set(train.texts)


@pytest.mark.parametrize("text", ["", "few words"], ids=["empty", "short"])
def test_too_little_text_is_an_error(lm, tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"empty or too short: \d+ rows.*expected at least 4"):
        train_and_held_out(str(path), lm, context_tokens=16, held_out_rows=4)


def test_special_tokens_are_not_among_the_activations(lm):
    ids = tiny.ids(2, 6)
    ids[0, 3] = ids[1, 0] = 0
    (xs,) = capture_tokens(lm, ids, lm.hook_points([1]))
    assert len(xs) == 10
    clean = lm.capture(ids, lm.hook_points([1]))[lm.hook_point(1)]
    assert torch.equal(xs[3], clean[0, 4])


def batches_of(lm, **options):
    settings = {"batch_tokens": 8, "buffer_tokens": 64, "model_rows": 2, "seed": 3, **options}
    source = ActivationBatches(lm, rows_of(lm), lm.hook_points([0, 2]), **settings)
    return source.batches


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def test_layers_of_a_batch_belong_to_the_same_tokens(lm):
    (first, second), _ = next(batches_of(lm)(Position()))
    everything = [
        torch.cat(layer)
        for layer in zip(
            *(capture_tokens(lm, b, lm.hook_points([0, 2])) for b in rows_of(lm).batches(2)),
            strict=True,
        )
    ]
    for a, b in zip(first, second, strict=True):
        token = (everything[0] - a).abs().sum(1).argmin()
        torch.testing.assert_close(everything[0][token], a)
        torch.testing.assert_close(everything[1][token], b)


def test_a_buffer_gives_each_of_its_tokens_once(lm):
    texts = list(load_texts("embedded", split="validation"))[:3]
    rows = rows_of(lm, texts)
    source = ActivationBatches(lm, rows, lm.hook_points([2]), batch_tokens=8, buffer_tokens=64)
    tokens = torch.cat([xs[0] for xs, at in take(source.batches(), 9) if at.fill == 0])
    first = torch.cat([capture_tokens(lm, b, lm.hook_points([2]))[0] for b in rows.batches(1)])[:64]
    assert len(tokens) == 64
    for given, expected in zip(in_some_order(tokens), in_some_order(first), strict=True):
        torch.testing.assert_close(given, expected)


def in_some_order(tokens):
    return tokens[tokens[:, 0].argsort()]


def test_batches_go_on_over_epochs(lm):
    seen = take(batches_of(lm)(Position()), 80)
    assert seen[-1][1].epoch >= 1
    assert all(len(x) == 8 for xs, _ in seen for x in xs)


@pytest.mark.parametrize("start", [1, 5, 9, 33, 70])
def test_iteration_from_a_position_goes_on_with_the_same_bits(lm, start):
    whole = take(batches_of(lm)(Position()), start + 12)
    resumed = take(batches_of(lm)(whole[start - 1][1]), 12)
    for (xs, at), (ys, same) in zip(whole[start:], resumed, strict=True):
        assert at == same
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("start", [1, 4, 11])
def test_stored_activations_go_on_too(start):
    source = StoredActivations([torch.randn(35, 3), torch.randn(35, 3)], batch_tokens=8, seed=1)
    whole = take(source.batches(Position()), start + 6)
    resumed = take(source.batches(whole[start - 1][1]), 6)
    for (xs, _), (ys, _) in zip(whole[start:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_epochs_of_stored_activations_differ_in_order():
    source = StoredActivations([torch.arange(16.0).unsqueeze(1)], batch_tokens=16)
    first, second = (xs[0] for xs, _ in take(source.batches(Position()), 2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_a_dataset_without_rows_and_small_buffers_are_errors(lm):
    empty = ActivationBatches(
        lm, rows_of(lm, [""]), lm.hook_points([0]), batch_tokens=8, buffer_tokens=8
    )
    with pytest.raises(ValueError, match="no row of tokens"):
        next(empty.batches(Position()))
    with pytest.raises(ValueError, match="buffer_tokens=4 is below batch_tokens=8"):
        batches_of(lm, buffer_tokens=4)
    with pytest.raises(ValueError, match="expected at least batch_tokens=8"):
        StoredActivations([torch.zeros(7, 2)], batch_tokens=8)


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_leave_none_out(lm, world):
    whole = rows_of(lm, skip=1, take=11)
    shares = [[r.tolist() for r in whole.shard(rank, world)] for rank in range(world)]
    rows = [r.tolist() for r in whole]
    assert shares == [rows[rank::world] for rank in range(world)]
    assert [r.tolist() for r in whole.shard(1, world).from_row(2)] == shares[1][2:]


@pytest.mark.parametrize("files", [1, 4])
def test_ranks_share_the_documents_of_a_stream(lm, tmp_path, files):
    import datasets

    texts = [f"document {i}" for i in range(40)]
    for f in range(files):
        datasets.Dataset.from_dict({"text": texts[f::files]}).to_parquet(tmp_path / f"{f}.parquet")
    streamed = load_texts(str(tmp_path), streaming=True)
    rows = TokenRows(streamed, lm.tokenizer, 8)
    shares = [list(rows.shard(rank, 2).texts) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(texts)
    assert not set(shares[0]) & set(shares[1])
    assert min(map(len, shares)) > 0
    assert list(rows.shard(1, 2).texts) == shares[1]
    # With rows set apart it must be the same rows on all ranks: by row.
    kept = TokenRows(streamed, lm.tokenizer, 8, skip=2)
    shared = [r.tolist() for rank in range(2) for r in kept.shard(rank, 2)]
    assert sorted(shared) == sorted(r.tolist() for r in kept)


def test_batches_of_all_ranks_are_one_batch(lm):
    def source(rank, world):
        sizes = {"batch_tokens": 12, "buffer_tokens": 48}
        points = lm.hook_points([0, 2])
        return ActivationBatches(lm, rows_of(lm), points, rank=rank, world=world, **sizes)

    ranks = [take(source(rank, 2).batches(), 9) for rank in range(2)]
    for (xs, at), (ys, same) in zip(*ranks, strict=True):
        assert len(xs[0]) == len(ys[0]) == 6
        assert (at.fill, at.batch) == (same.fill, same.batch)
    own = capture_rows(lm, list(rows_of(lm).shard(1, 2)), 0)
    tokens = torch.cat([xs[0] for xs, at in ranks[1] if at.epoch == 0])
    assert all((own - token).abs().sum(1).min() < 1e-4 for token in tokens)
    with pytest.raises(ValueError, match="batch_tokens=12 cannot be dealt out to 5 ranks"):
        source(0, 5)


def capture_rows(lm, rows, layer):
    return capture_tokens(lm, torch.stack(rows), lm.hook_points([layer]))[0]


def test_ranks_out_of_range_and_shares_of_shares_are_errors(lm):
    with pytest.raises(ValueError, match="rank=2 of world=2"):
        rows_of(lm).shard(2, 2)
    with pytest.raises(ValueError, match="a share already"):
        rows_of(lm).shard(0, 2).shard(0, 2)


# -- what the model is spared ----------------------------------------------------------------------


def counted(lm, monkeypatch):
    """Tokens of every pass of the model."""
    seen = []
    capture = lm.capture
    monkeypatch.setattr(
        lm, "capture", lambda ids, *a, **k: seen.append(ids.numel()) or capture(ids, *a, **k)
    )
    return seen


def test_the_first_buffer_serves_calibration_and_training_alike(lm, monkeypatch):
    sizes = {"batch_tokens": 8, "buffer_tokens": 64, "model_rows": 2}
    points = lm.hook_points([0, 2])
    expected = take(ActivationBatches(lm, rows_of(lm), points, **sizes).batches(), 20)
    source = ActivationBatches(lm, rows_of(lm), points, **sizes)
    seen = counted(lm, monkeypatch)
    first = next(source.sequential())
    assert sum(seen) <= 64 + 3 * 16
    calibrating = sum(seen)
    got = take(source.batches(), 8)
    assert sum(seen) == calibrating
    got += take(source.batches(got[-1][1]), 12)
    for (xs, at), (ys, same) in zip(expected, got, strict=True):
        assert at == same
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    assert torch.equal(first[0][:3], capture_rows(lm, list(rows_of(lm))[:2], 0)[:3])


@pytest.mark.parametrize("passes", [0, 1, 2, 4, 40], ids=str)
def test_what_calibration_reads_beyond_it_is_not_read_again(lm, monkeypatch, passes):
    """`passes` beyond the first buffer; beyond a second buffer nothing more is held."""
    sizes = {"batch_tokens": 8, "buffer_tokens": 64, "model_rows": 2}
    points = lm.hook_points([0, 2])
    expected = take(ActivationBatches(lm, rows_of(lm), points, **sizes).batches(), 24)
    source = ActivationBatches(lm, rows_of(lm), points, **sizes)
    calibration = source.sequential()
    seen = counted(lm, monkeypatch)
    take(calibration, 2)  # the first buffer, thirty-two tokens at a time
    first = len(seen)
    beyond = len(list(islice(calibration, passes)))
    assert len(seen) == first + beyond
    got = take(source.batches(), 24)
    for (xs, at), (ys, same) in zip(expected, got, strict=True):
        assert at == same
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(xs, ys, strict=True))
    kept = beyond if beyond <= 2 else 0
    whole = 3 * 64  # tokens of three buffers, and what may be too many of each
    assert sum(seen) <= whole + 3 * 16 + (beyond - kept) * 32
    assert sum(seen) >= whole


def test_calibration_goes_over_the_text_once(lm):
    of = capture_rows(lm, list(rows_of(lm)), 2)
    for buffer in (64, 10_000):  # shorter and longer than the text
        sizes = {"batch_tokens": 8, "buffer_tokens": buffer}
        source = ActivationBatches(lm, rows_of(lm), lm.hook_points([0, 2]), **sizes)
        seen = torch.cat([xs[1] for xs in source.sequential()])
        assert len(of) - 16 < len(seen) <= len(of)  # a part of a row at the end of the buffer
        torch.testing.assert_close(seen[:60], of[:60])


def test_the_last_buffer_is_no_larger_than_needed(lm, monkeypatch):
    seen = counted(lm, monkeypatch)
    sizes = {"batch_tokens": 8, "buffer_tokens": 64, "total_tokens": 88}
    source = ActivationBatches(lm, rows_of(lm), lm.hook_points([0]), **sizes)
    got = take(source.batches(), 11)
    assert [at.fill for _, at in got] == [0] * 8 + [1] * 3
    assert sum(seen) < 88 + 4 * 16


def test_the_model_may_have_another_dtype_and_device(lm):
    half = tiny.pythia()
    half.model.to(torch.bfloat16)
    sizes = {"batch_tokens": 8, "buffer_tokens": 64}
    source = ActivationBatches(half, rows_of(half), half.hook_points([2]), **sizes)
    (xs,), _ = next(source.batches())
    assert xs.dtype == torch.float32
    assert torch.equal(xs, xs.bfloat16().float())
    assert source._refill(source.activations.reader(0), Position()).xs[0].dtype == torch.bfloat16
    elsewhere = ActivationBatches(lm, rows_of(lm), lm.hook_points([2]), **sizes, device="meta")
    fill = elsewhere._refill(elsewhere.activations.reader(0), Position())
    assert fill.xs[0].device.type == "meta"


def test_rows_read_ahead_can_be_taken_in_parts():
    rows = iter([([2, 1, 3], [torch.arange(6)]), ([1], [torch.tensor([6])])])
    read = _with_lookahead(deque([next(rows)]), lambda n: next(rows))  # noqa: ARG005
    assert read(1)[0] == [2]
    counts, (x,) = read(5)
    assert (counts, x.tolist()) == ([1, 3], [2, 3, 4, 5])
    assert read(1)[1][0].tolist() == [6]


def test_a_buffer_in_bfloat16_holds_the_same_batches_rounded(lm):
    points = lm.hook_points([0, 2])
    sizes = {"batch_tokens": 8, "buffer_tokens": 64}
    exact, rounded = (
        ActivationBatches(lm, rows_of(lm), points, buffer_dtype=dtype, **sizes)
        for dtype in (None, torch.bfloat16)
    )
    for source in (exact, rounded):
        for _ in source.sequential():  # what calibration reads ahead is held alike
            pass
    buffers = [source._first.xs for source in (exact, rounded) if source._first]
    whole, half = (sum(x.nbytes for x in xs) for xs in buffers)
    assert half == whole / 2
    pairs = islice(zip(exact.batches(), rounded.batches(), strict=True), 20)
    for (xs, position), (ys, same) in pairs:
        assert position == same
        for x, y in zip(xs, ys, strict=True):
            assert y.dtype == torch.float32
            assert torch.equal(y, x.bfloat16().float())


def test_the_embedded_corpus_is_read_in_the_order_of_datasets():
    import datasets

    from resae.assets import CORPUS

    theirs = datasets.load_dataset(
        "parquet", data_files=str(CORPUS / "validation.parquet"), split="train"
    )
    expected = list(theirs.shuffle(3)["text"])  # type: ignore[index]
    assert load_texts("embedded", split="validation", seed=3) == expected
