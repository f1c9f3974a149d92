import pytest
import tiny
import torch

from resae.data import (
    ActivationBatches,
    Position,
    StoredActivations,
    TokenRows,
    capture_tokens,
    load_texts,
    train_and_held_out,
)

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "def f(x):\n    return x",
    "",
] * 5


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


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


def test_a_buffer_gives_each_of_its_tokens_at_most_once(lm):
    texts = list(load_texts("embedded", split="validation"))[:3]
    source = ActivationBatches(
        lm, rows_of(lm, texts), lm.hook_points([2]), batch_tokens=8, buffer_tokens=64
    )
    tokens = torch.cat([xs[0] for xs, at in take(source.batches(), 9) if at.fill == 0])
    assert len(tokens) >= 64
    assert len(tokens.unique(dim=0)) == len(tokens)


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
