"""The eight labelled datasets of SAEBench's sparse probing, by the names that it gives them.

Columns, classes and texts are SAEBench's; which documents are drawn is not. Two are read as streams
until every class has enough: github-code, of which each file loses its first 150 characters, often
a licence, and europarl, of which each language is one side of a pair. None of them could be read
where this was written: they are tested on made-up rows of the same columns.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

SKIPPED_CHARACTERS = 150
LEAST_CHARACTERS = 3 * 128 + SKIPPED_CHARACTERS
"""Length of a file of code below which it is left out."""


class Table(NamedTuple):
    """A dataset with columns and splits."""

    hub: str
    text: str
    label: str
    classes: tuple[str, ...]
    attribute: str | None = None
    """Column over which classes are balanced."""


_BIOS = ("LabHC/bias_in_bios", "hard_text", "profession")
_REVIEWS = "canrager/amazon_reviews_mcauley_1and5"
TABLES = {
    "LabHC/bias_in_bios_class_set1": Table(*_BIOS, ("0", "1", "2", "6", "9"), "gender"),
    "LabHC/bias_in_bios_class_set2": Table(*_BIOS, ("11", "13", "14", "18", "19"), "gender"),
    "LabHC/bias_in_bios_class_set3": Table(*_BIOS, ("20", "21", "22", "25", "26"), "gender"),
    _REVIEWS: Table(_REVIEWS, "text", "category", ("1", "2", "3", "5", "6"), "rating"),
    f"{_REVIEWS}_sentiment": Table(_REVIEWS, "text", "rating", ("1.0", "5.0")),
    "fancyzhx/ag_news": Table("fancyzhx/ag_news", "text", "label", ("0", "1", "2", "3")),
}
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
"""Language of europarl → the pair that it is read from."""
CODE = ("C", "Python", "HTML", "Java", "PHP")


def code_files(load: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Label and text of files of github-code; `load` is `datasets.load_dataset`."""
    # Its script is not run, which datasets no longer does; the files beside it are Parquet.
    files = "hf://datasets/codeparrot/github-code/data/train-*.parquet"
    for row in load("parquet", data_files=files, split="train", streaming=True):
        if row["language"] in CODE and len(row["code"]) > LEAST_CHARACTERS:
            yield row["language"], row["code"][SKIPPED_CHARACTERS:]


def parliament(load: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Label and text of europarl, one language after the other in turns."""
    streams = {
        language: iter(load("Helsinki-NLP/europarl", pair, split="train", streaming=True))
        for language, pair in LANGUAGES.items()
    }
    while True:
        for language, stream in streams.items():
            row = next(stream, None)
            if row is None:
                return
            yield language, row["translation"][language]


class Stream(NamedTuple):
    """A dataset that is read until every class has enough documents."""

    classes: tuple[str, ...]
    read: Callable[[Callable[..., Any]], Iterator[tuple[str, str]]]


STREAMS: Mapping[str, Stream] = {
    "codeparrot/github-code": Stream(CODE, code_files),
    "Helsinki-NLP/europarl": Stream(tuple(LANGUAGES), parliament),
}
PUBLIC = (*TABLES, *STREAMS)
