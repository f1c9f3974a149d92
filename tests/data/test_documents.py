"""Data as people have it: saved folders, token ids, conversations, other encodings, compression."""

import gzip
import json
import struct

import datasets
import pyarrow
import pytest
import tiny
import torch
from pyarrow import parquet

from resae.cli import main
from resae.data.rows import TokenRows, has_heads, special_tokens, train_and_held_out
from resae.data.text_record import RunText
from resae.data.texts import fingerprint, load_texts
from resae.models.hooked import HookedLM

SENTENCE = "In the beginning God created the heaven and the earth. "
CHATS = [
    [{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": SENTENCE * 3}]
    for i in range(8)
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def chat_lm():
    lm = tiny.pythia()
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def ids_of(lm, texts):
    return lm.tokenizer(texts, add_special_tokens=False)["input_ids"]


def saved(folder, **columns):
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return str(folder)


# -- saved folders ---------------------------------------------------------------------------------


def test_a_saved_folder_is_read_in_place_and_shuffled(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    data = saved(tmp_path / "saved", text=texts, other=range(20))
    read = list(load_texts(data, seed=1))
    assert sorted(read) == sorted(texts)
    assert read != texts
    assert list(load_texts(data, seed=1)) == read
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        load_texts(data, split="test")


def test_a_saved_folder_of_several_splits_holds_out_its_validation(lm, tmp_path):
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} " * 30] * 5})
        for name in ("train", "validation", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = str(tmp_path / "saved")
    assert set(load_texts(data, split="test")) == {"test " * 30}
    train, held_out = train_and_held_out(data, lm, context_tokens=16, held_out_rows=2)
    assert (train.skip, set(held_out.texts)) == (0, {"validation " * 30})
    train, held_out = train_and_held_out(
        data, lm, context_tokens=16, held_out_rows=2, split="validation"
    )
    assert train.skip == 2  # validation is trained on here, but for these rows
    with pytest.raises(FileNotFoundError, match="no split 'dev' but train, validation, test"):
        load_texts(data, split="dev")


def test_other_columns_of_a_saved_folder_are_not_read(tmp_path):
    """They are not checked, and what is mapped into memory ends the process where offsets are
    wrong."""
    texts = [f"text {i}" for i in range(8)]
    data = saved(tmp_path / "saved", text=texts, other=["x" * (1_001 + i) for i in range(8)])
    (file,) = (tmp_path / "saved").glob("*.arrow")
    offsets = struct.pack("<3i", 0, 1_001, 2_003)
    content = file.read_bytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, struct.pack("<3i", 0, 2**31 - 1, -(2**31))))
    assert sorted(load_texts(data)) == texts
    with pytest.raises(ValueError, match="cannot be read"):
        load_texts(data, text_column="other")


@pytest.mark.parametrize("features", [{"text": "x"}, [], "x", {"text": {"_type": "x"}}])
def test_a_parquet_with_a_wrong_description_is_refused(tmp_path, features):
    """datasets reads one from its metadata, and fails in many ways."""
    description = json.dumps({"info": {"features": features}})
    table = pyarrow.table({"text": ["a", "b"]})
    table = table.replace_schema_metadata({"huggingface": description})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises((ValueError, FileNotFoundError), match="cannot") as raised:
        list(load_texts(str(tmp_path / "a.parquet")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", "..", 1, None])
def test_a_saved_folder_reads_no_file_of_another_folder(tmp_path, name):
    data = saved(tmp_path / "saved", text=["a", "b"])
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "outside.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="filename" if name is None or name == 1 else "not one"):
        load_texts(data)


def test_a_truncated_saved_folder_is_named(tmp_path):
    data = saved(tmp_path / "saved", text=["abc" * 1000] * 9)
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be read"):
        list(load_texts(data))


# -- token ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["saved", "jsonl", "parquet"])
def test_rows_of_token_ids_are_those_of_their_texts(lm, tmp_path, form):
    texts = [f"{i}: {SENTENCE}" for i in range(9)]
    ids = ids_of(lm, texts)
    data = str(tmp_path / f"ids.{form}")
    table = datasets.Dataset.from_dict({"input_ids": ids, "text": texts})
    {"saved": table.save_to_disk, "jsonl": table.to_json, "parquet": table.to_parquet}[form](data)
    without = HookedLM(lm.model, None, "tiny-neox")
    read = {
        column: train_and_held_out(
            data, model, context_tokens=16, held_out_rows=2, text_column=column
        )
        for column, model in (("text", lm), ("input_ids", without))
    }
    for part in (0, 1):
        by_text, by_ids = (list(read[column][part]) for column in ("text", "input_ids"))
        assert torch.equal(torch.stack(by_text), torch.stack(by_ids))


def test_a_bos_or_eos_of_a_document_is_not_doubled(lm):
    ids = ids_of(lm, [SENTENCE])[0]
    plain = list(TokenRows([ids] * 5, lm.tokenizer, 16))
    for document in ([0, *ids], [*ids, 0], [0, *ids, 0]):
        rows = list(TokenRows([document] * 5, lm.tokenizer, 16))
        assert torch.equal(torch.stack(rows), torch.stack(plain))
    assert list(TokenRows([[0], [], [0, 0]], lm.tokenizer, 16)) == []


@pytest.mark.parametrize("wrong", [2048, -1])
def test_token_ids_of_another_vocabulary_are_refused_before_weights_are_read(lm, tmp_path, wrong):
    data = saved(tmp_path / "saved", input_ids=[[wrong] * 40] * 4)
    with pytest.raises(ValueError, match=r"token ids from -?\d+ to -?\d+ .* 2048 tokens"):
        train_and_held_out(data, lm, context_tokens=16, held_out_rows=1, text_column="input_ids")


def test_texts_for_a_model_without_tokenizer_are_refused(lm, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCE * 50)
    with pytest.raises(ValueError, match="has no tokenizer.*--text-column input_ids"):
        train_and_held_out(
            str(tmp_path / "a.txt"),
            HookedLM(lm.model, None, "tiny"),
            context_tokens=16,
            held_out_rows=1,
        )


def test_special_tokens_are_the_tokenizers_or_the_configs(lm):
    without = HookedLM(lm.model, None, "tiny")
    assert special_tokens(lm) is lm.tokenizer
    assert special_tokens(without) == (0, 0)
    assert has_heads(lm)
    assert has_heads(without)


# -- conversations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_conversations_go_through_the_chat_template(chat_lm, tmp_path, keys):
    names = {"user": "human", "assistant": "gpt"} if keys[0] == "from" else {}
    chats = [
        [{keys[0]: names.get(m["role"], m["role"]), keys[1]: m["content"]} for m in chat]
        for chat in CHATS
    ]
    data = saved(tmp_path / "saved", messages=chats)
    rows, _ = train_and_held_out(
        data, chat_lm, context_tokens=32, held_out_rows=0, text_column="messages"
    )
    written = chat_lm.tokenizer.decode(torch.cat(list(rows)))
    assert "even?\n<assistant>In the beginning" in written
    texts = [f"<user>{u['content']}\n<assistant>{a['content']}\n" for u, a in CHATS]
    expected = TokenRows(sorted(texts), chat_lm.tokenizer, 32)
    assert sorted(torch.cat(list(rows)).tolist()) == sorted(torch.cat(list(expected)).tolist())
    assert fingerprint(rows.texts)["documents"] == 8


def test_conversations_without_a_chat_template_are_refused(lm, tmp_path):
    data = saved(tmp_path / "saved", messages=CHATS)
    with pytest.raises(ValueError, match="no chat template"):
        train_and_held_out(data, lm, context_tokens=16, held_out_rows=1, text_column="messages")


def test_a_conversation_that_the_template_refuses_is_named(chat_lm, monkeypatch):
    raising = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(chat_lm.tokenizer, "chat_template", raising)
    with pytest.raises(ValueError, match="does not take a conversation.*roles must alternate"):
        list(TokenRows(CHATS, chat_lm.tokenizer, 16))


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": None}], [{"role": "user", "content": "a"}, None], []]
)
def test_an_incomplete_conversation_is_named(tmp_path, messages):
    data = saved(tmp_path / "saved", messages=[*CHATS, messages])
    with pytest.raises(ValueError, match="column 'messages' holds .*expected"):
        list(load_texts(data, text_column="messages"))


def test_a_column_of_something_else_names_those_that_would_do(tmp_path):
    columns = {"number": [1, 2], "text": ["a", "b"], "ids": [[1], [2]], "chat": CHATS[:2]}
    data = saved(tmp_path / "saved", **columns)
    with pytest.raises(ValueError, match=r"int64.*strings: text, of the others: ids, chat"):
        load_texts(data, text_column="number")


def test_nulls_are_counted_and_their_row_is_named(tmp_path):
    for name, column in (("text", ["a", None, None]), ("ids", [[1], None, None])):
        data = saved(tmp_path / name, **{name: column})
        with pytest.raises(ValueError, match=r"2 of 3 entries .* first in row 1 "):
            load_texts(data, text_column=name)


# -- encodings and compression ---------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "txt.gz", "jsonl.gz", "csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_text_is_read_in_its_encoding_compressed_or_not(tmp_path, ending, encoding):
    text = "schöne Bücher"
    content = {"txt": text, "jsonl": f'{{"text": "{text}"}}\n' * 2, "csv": f"text\n{text}\n"}
    raw = content[ending.removesuffix(".gz")].encode(encoding)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert set(load_texts(str(path), encoding=encoding)) == {text}
    if encoding == "latin-1":
        with pytest.raises(ValueError, match="is not UTF-8; give its encoding"):
            load_texts(str(path))


def test_a_folder_of_compressed_files_is_one_dataset(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(f"text {i}".encode()))
    assert sorted(load_texts(str(tmp_path))) == ["text 0", "text 1", "text 2"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(ValueError, match=r"several kinds: 3 \.txt .*, 1 \.jsonl \(b.jsonl.gz\)"):
        load_texts(str(tmp_path))


def test_a_file_that_grows_without_bound_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("resae.data.texts.LEAST_LIMIT", 1 << 16)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(1 << 26)))
    with pytest.raises(ValueError, match="more than 100 times as large"):
        load_texts(str(tmp_path / "bomb.txt.gz"))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"text" * 999)[:-9]])
def test_a_damaged_gz_file_is_named(tmp_path, content):
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.txt.gz is damaged"):
        load_texts(str(tmp_path / "a.txt.gz"))


def test_zst_is_read_where_zstandard_is_there_or_says_what_to_install(tmp_path):
    path = tmp_path / "a.txt.zst"
    try:
        import zstandard
    except ModuleNotFoundError:
        path.write_bytes(b"x")
        with pytest.raises(ModuleNotFoundError, match="pip install zstandard"):
            load_texts(str(path))
        return
    path.write_bytes(zstandard.compress(b"text"))
    assert list(load_texts(str(path))) == ["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "klingon"}, "unknown encoding 'klingon'"),
        ({"revision": "v1"}, "is local and has no revision 'v1'"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / "a.txt"), **options)
    with pytest.raises(ValueError, match=message):
        load_texts("embedded", **options)


def test_an_encoding_is_refused_where_it_would_do_nothing(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    for data in (str(tmp_path / "a.parquet"), saved(tmp_path / "saved", text=["a"]), "embedded"):
        with pytest.raises(ValueError, match="--encoding is for local"):
            load_texts(data, encoding="latin-1")


def test_a_revision_goes_to_the_hub(monkeypatch):
    asked = {}

    def load_dataset(**options):
        asked.update(options)
        raise OSError("not here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="not here"):
        load_texts("owner/name", revision="v1", split="train[:10%]")
    assert (asked["revision"], asked["split"]) == ("v1", "train[:10%]")


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_on_token_ids_needs_no_tokenizer_and_knows_its_text(lm, tmp_path, capsys):
    lm.model.save_pretrained(tmp_path / "model")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 2000, (60, 40), generator=random).tolist()
    data = saved(tmp_path / "saved", input_ids=ids)
    train = ["train", str(tmp_path / "model"), data, "--text-column", "input_ids"]
    train += ["--layers", "0,1", "--k", "2", "--d-sae", "64", "--context-tokens", "32"]
    train += ["--train-tokens", "512", "--batch-tokens", "128", "--buffer-tokens", "256"]
    train += ["--calibration-tokens", "256", "--held-out-rows", "4", "--device", "cpu"]
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["split"], record["encoding"], record["revision"]) == ("train", "utf-8", None)
    text = RunText.load(tmp_path / "run")
    trained, held_out = train_and_held_out(
        data, lm, context_tokens=32, held_out_rows=4, text_column="input_ids"
    )
    assert text.overlap(torch.stack(list(held_out))) is None
    assert text.overlap(torch.stack(list(trained))).new is False
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["eval", str(tmp_path / "run"), "--split", "train", "--held-out-rows", "30"]) == 2
    assert "was trained on this text" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
