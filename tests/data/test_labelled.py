"""Labelled documents of a file, and of the public datasets on made-up rows."""

import json

import datasets
import pytest

from resae.data.labelled import document_ids, load_labelled
from resae.data.public_labelled import PUBLIC, SKIPPED_CHARACTERS, TABLES


def test_classes_are_balanced_over_an_attribute_and_a_fifth_is_set_aside(tmp_path):
    lines = [
        {"text": f"{label} {i}", "kind": label, "half": i % 2 == 0 and 1 or 2.5}
        for label in ("a", "b", "c")
        for i in range(10)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    options = {"label_column": "kind", "attribute_column": "half", "train_documents": 5}
    found = load_labelled(str(path), **options, test_documents=9)
    assert found.classes == ["a", "b", "c"]
    for label in found.classes:
        own = [pair for pair in found.train.pairs if pair[0] == label]
        assert sorted(own) == [(label, "1.0")] * 2 + [(label, "2.5")] * 2
    assert all(text[0] == label for text, label in zip(*found.train[:2], strict=True))
    assert not set(found.train.texts) & set(found.test.texts)
    assert found == load_labelled(str(path), **options, test_documents=9)
    assert found != load_labelled(str(path), **options, test_documents=9, seed=1)


def test_only_the_embedded_corpus_has_attributes_by_itself():
    found = load_labelled(train_documents=3, test_documents=2)
    assert len(found.classes) == 7
    assert sum(pair is not None for pair in found.train.pairs) == 12
    assert found.test.take([0]).pairs is None  # not all four domains


def test_documents_begin_as_training_rows_do():
    from tiny import pythia

    lm = pythia()
    found = document_ids(lm, ["The cat sat on the mat.", ""], 4)
    whole = lm.tokenizer("The cat sat on the mat.", add_special_tokens=False)["input_ids"]
    assert found == [[0, *whole[:3]], [0]]
    with pytest.raises(ValueError, match="longer than its context of 64"):
        document_ids(lm, ["a"], 65)


class Hub:
    """Stands in for `datasets.load_dataset`: rows with the columns of the public datasets."""

    def __init__(self):
        self.asked = []

    def __call__(self, path, name=None, *, split, streaming=False, data_files=None):
        self.asked.append((path, name, split, streaming))
        if path == "Helsinki-NLP/europarl":
            return iter(
                [{"translation": {c: f"{c} {i}" for c in name.split("-")}} for i in range(9)]
            )
        if path == "parquet":
            assert data_files.startswith("hf://datasets/codeparrot/github-code/")
            licence = "L" * SKIPPED_CHARACTERS
            rows = [
                {
                    "language": language,
                    "code": licence + f"{language} {i} " + "x" * (400 - 99 * (i % 2)),
                }
                for i in range(30)
                for language in ("C", "Python", "Rust", "HTML", "Java", "PHP")
            ]
            return iter(rows)
        if split not in ("train", "test"):
            raise ValueError("no such split")
        table = next(t for t in TABLES.values() if t.hub == path)
        sizes = {"train": 40, "test": 20}
        columns = {
            "hard_text": [f"{split} {i}" for i in range(sizes[split] * 28)],
            "text": [f"{split} {i}" for i in range(sizes[split] * 28)],
            table.label: [i % 28 for i in range(sizes[split] * 28)],
            "profession": [i % 28 for i in range(sizes[split] * 28)],
            "category": [i % 28 for i in range(sizes[split] * 28)],
            "gender": [(i // 28) % 2 for i in range(sizes[split] * 28)],
            "rating": [(1.0, 5.0)[(i // 28) % 2] for i in range(sizes[split] * 28)],
        }
        return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_datasets_are_read_by_their_columns(name, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = load_labelled(name, train_documents=6, test_documents=2)
    assert found.name == name
    assert len(found.classes) == {"fancyzhx/ag_news": 4, f"{PUBLIC[3]}_sentiment": 2}.get(name, 5)
    for part, size in ((found.train, 6), (found.test, 2)):
        assert [part.labels.count(c) for c in found.classes] == [size] * len(found.classes)
        assert len(set(part.texts)) == len(part.texts)
    if name in TABLES:
        assert {split for _, _, split, _ in hub.asked} == {"train", "test"}
        assert found.classes == sorted(TABLES[name].classes)
        assert all(text.startswith("test ") for text in found.test.texts)
        assert (found.train.pairs is None) == (TABLES[name].attribute is None)
        for pair in set(found.train.pairs or ()):
            assert found.train.pairs.count(pair) == 3
    elif name == "Helsinki-NLP/europarl":
        assert all(t[:2] == c for t, c in zip(*found.train[:2], strict=True))
        assert len(hub.asked) == 5
    else:
        assert all(t.startswith(f"{c} ") for t, c in zip(*found.train[:2], strict=True))
        assert all(len(text) > 400 for text in found.train.texts)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be read \(no route\); it is on the Hug"):
        load_labelled("Helsinki-NLP/europarl")
    with pytest.raises(FileNotFoundError, match=r"'fancyzhx/ag_news' not found \(no route\)"):
        load_labelled("fancyzhx/ag_news")
