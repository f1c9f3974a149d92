"""Labelled documents: texts, the class of each, and where there is one a second attribute.

Classes are sampled to equal sizes where the data has enough documents; test documents come from a
split of their own where the dataset has one (`test`, otherwise `validation`), otherwise a fifth of
each class is set aside.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from resae.data.public_labelled import STREAMS, TABLES, Stream
from resae.data.texts import load_columns
from resae.models.hooked import EMBEDDED, HookedLM
from resae.strict_json import first_line

TEST_SPLITS = ("test", "validation")
TEST_SHARE = 0.2
"""Share of each class that is set aside for testing where the data has no split for it."""

EMBEDDED_ATTRIBUTES = {
    "pysrc": ("code", "Python"),
    "pydocs": ("prose", "Python"),
    "csrc": ("code", "SQLite"),
    "sqldoc": ("prose", "SQLite"),
}
"""Domains of the embedded corpus that differ in two attributes: kind of text, and project."""


class Documents(NamedTuple):
    """Texts with their labels, one each."""

    texts: list[str]
    labels: list[str]
    attributes: list[str] | None = None
    """A second label of each text, which classes are balanced over; None: there is none."""

    @property
    def pairs(self) -> list[tuple[str, str] | None] | None:
        """Label and attribute of each text, by which spurious correlations are made; None: there
        are no attributes. Of the embedded corpus they are kind of text and project, and None of
        domains that have none."""
        if self.attributes is not None:
            return list(zip(self.labels, self.attributes, strict=True))
        if set(EMBEDDED_ATTRIBUTES) <= set(self.labels):
            return [EMBEDDED_ATTRIBUTES.get(label) for label in self.labels]
        return None

    def take(self, chosen: Sequence[int]) -> "Documents":
        """The documents of these numbers."""
        attributes = self.attributes
        return Documents(
            [self.texts[i] for i in chosen],
            [self.labels[i] for i in chosen],
            None if attributes is None else [attributes[i] for i in chosen],
        )


class LabelledTexts(NamedTuple):
    """Documents of one dataset: probes are fitted on `train` and scored on `test`."""

    name: str
    train: Documents
    test: Documents

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.train.labels))


def load_labelled(
    data: str = EMBEDDED,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    attribute_column: str | None = None,
    revision: str | None = None,
    train_documents: int = 2000,
    test_documents: int = 500,
    seed: int = 42,
) -> LabelledTexts:
    """Labelled documents of `embedded` (its seven domains), of a local .jsonl, .csv or .parquet
    file, of a folder with splits, or of the hub. The eight datasets of SAEBench, by its names for
    them (`resae.data.public_labelled.PUBLIC`), have columns and classes of their own.

    Args:
        text_column, label_column: columns; label_column None: `label`, of the embedded corpus
            `domain`.
        attribute_column: column of a second label, over which each class is balanced.
        revision: branch, tag or commit of a hub dataset.
        train_documents, test_documents: documents of each class; fewer where there are fewer.
        seed: of the sampling.

    Raises:
        FileNotFoundError: no such dataset.
        ValueError: no such column, texts that are none, fewer than two classes, or a class without
            test documents.
    """
    if data in STREAMS:
        return _streamed(data, STREAMS[data], train_documents, test_documents, seed)
    hub, classes = data, None
    if data in TABLES:
        hub, text_column, label_column, classes, attribute_column = TABLES[data]
    label_column = label_column or ("domain" if data == EMBEDDED else "label")
    columns = [text_column, label_column, *([attribute_column] if attribute_column else [])]
    train, test = _splits(hub, columns, revision, seed)
    if classes is not None:
        train, test = (
            part.take([i for i, label in enumerate(part.labels) if label in classes])
            for part in (train, test)
        )
    sizes = (train_documents, test_documents)
    train, test = (
        documents.take(_sampled(documents, size, seed))
        for documents, size in zip((train, test), sizes, strict=True)
    )
    _require_classes(data, label_column, train, test)
    return LabelledTexts(data, train, test)


def document_ids(lm: HookedLM, texts: Sequence[str], context_tokens: int) -> list[list[int]]:
    """Token ids of each text, at most `context_tokens`: BOS (or EOS, where there is no BOS) as at
    the start of training rows, then the beginning of the text.

    Raises:
        ValueError: a model without tokenizer, or with a shorter context.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise ValueError(f"model {lm.name} has no tokenizer; labelled texts need one")
    lm.require_context(context_tokens)
    bos = tokenizer.bos_token_id
    head = tokenizer.eos_token_id if bos is None else bos
    heads = [] if head is None else [head]
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [(heads + ids)[:context_tokens] for ids in found]


def _streamed(data: str, stream: Stream, train: int, test: int, seed: int) -> LabelledTexts:
    """Documents of a stream, which is read until every class has enough."""
    import datasets

    found: dict[str, list[str]] = {name: [] for name in stream.classes}
    try:
        for label, text in stream.read(datasets.load_dataset):
            found[label].append(text)
            if all(len(texts) >= train + test for texts in found.values()):
                break
    except Exception as error:  # datasets raises whatever a connection or a file runs into
        raise FileNotFoundError(
            f"dataset {data!r} cannot be read ({first_line(error)}); it is on the Hugging Face "
            f"hub, which must be reachable: give a local file, or embedded"
        ) from None
    whole = Documents(
        [text for texts in found.values() for text in texts],
        [label for label, texts in found.items() for _ in texts],
    )
    rest, tested = _set_aside(whole, seed, test / (train + test))
    parts = rest.take(_sampled(rest, train, seed)), tested.take(_sampled(tested, test, seed))
    _require_classes(data, "label", *parts)
    return LabelledTexts(data, *parts)


def _splits(
    data: str, columns: Sequence[str], revision: str | None, seed: int
) -> tuple[Documents, Documents]:
    train = _documents(data, columns, load_columns(data, columns, split="train", revision=revision))
    for split in TEST_SPLITS:
        try:
            found = load_columns(data, columns, split=split, revision=revision)
        except FileNotFoundError:
            continue
        return train, _documents(data, columns, found)
    return _set_aside(train, seed, TEST_SHARE)


def _set_aside(documents: Documents, seed: int, share: float) -> tuple[Documents, Documents]:
    """The documents without a share of each class, and that share."""
    generator = np.random.default_rng(seed)
    aside: set[int] = set()
    for members in _groups(documents.labels).values():
        size = max(1, round(len(members) * share))
        aside.update(generator.permutation(members)[:size].tolist())
    rest = [i for i in range(len(documents.texts)) if i not in aside]
    return documents.take(rest), documents.take(sorted(aside))


def _documents(data: str, columns: Sequence[str], found: list[list[Any]]) -> Documents:
    for column, values in zip(columns, found, strict=True):
        wanted = str if column == columns[0] else (str, int, float)
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, wanted)), None)
        if wrong is not None:
            raise ValueError(
                f"dataset {data!r}: column {column!r} holds {type(values[wrong]).__name__} in row "
                f"{wrong} (from 0), expected {'texts' if wanted is str else 'texts or numbers'} "
                f"in every row; mend or remove it, or name another column"
            )
    texts, *labels = found
    return Documents(list(texts), *(list(map(str, values)) for values in labels))


def _sampled(documents: Documents, size: int, seed: int) -> list[int]:
    """Numbers of at most `size` documents of each class, as many of each attribute."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for members in _groups(documents.labels).values():
        if documents.attributes is None:
            chosen += generator.permutation(members)[:size].tolist()
            continue
        parts = _groups([documents.attributes[i] for i in members]).values()
        each = min(size // len(parts), *map(len, parts))
        for part in parts:
            chosen += [members[i] for i in generator.permutation(part)[:each]]
    return chosen


def _groups(labels: Sequence[str]) -> dict[str, list[int]]:
    """Label → numbers of its documents, labels in order."""
    groups: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for i, label in enumerate(labels):
        groups[label].append(i)
    return groups


def _require_classes(data: str, column: str, train: Documents, test: Documents) -> None:
    classes, tested = set(train.labels), set(test.labels)
    if len(classes) < 2:
        raise ValueError(
            f"dataset {data!r}: column {column!r} holds {len(classes)} classes, expected at least 2"
        )
    if classes != tested:
        absent = sorted(classes ^ tested)[0]
        raise ValueError(
            f"dataset {data!r}: class {absent!r} has no documents in "
            f"{'the test split' if absent in classes else 'the training split'}; add some, or "
            f"remove the class"
        )
