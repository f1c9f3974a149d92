"""Documents of a dataset: of the hub, of local files, or of the embedded corpus.

A document is a text, a list of token ids, or a conversation: a list of messages. Which of them a
column holds, its type says.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from resae.assets import CORPUS
from resae.models.hooked import EMBEDDED
from resae.storage import load_json, require_inside, safe_file_name
from resae.strict_json import brief, first_line, require_fields

Document = str | list[int] | list[dict[str, Any]]
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
COMPRESSED = (".gz", ".zst")
"""Endings after that of the kind: `.jsonl.gz`."""
LEAST_LIMIT, MOST_RATIO = 1 << 28, 100
"""A compressed file may become 256 MiB, or 100 times as large; text becomes 10 times as large."""


DESCRIPTIONS = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)
"""Files that describe the data; `datasets` skips them too."""


def load_texts(
    data: str,
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    seed: int = 0,
    revision: str | None = None,
    encoding: str = "utf-8",
) -> Iterable[Document]:
    """Documents of a dataset in shuffled order (those of one source tend to lie together).

    Args:
        data: `embedded`; a file (.txt, .parquet, .jsonl, .json, .csv; all but parquet also
            compressed: .txt.gz, .jsonl.zst); a folder of .txt files, of dataset files of one kind,
            or that `datasets.save_to_disk` wrote (read in place); or a hub dataset, `owner/name` or
            `owner/name:configuration`.
        split: which split; a single file or a folder of .txt files counts as "train".
        text_column: the column that holds strings, lists of token ids, or conversations: lists of
            `{"role": …, "content": …}` or `{"from": …, "value": …}`.
        streaming: read a hub dataset while it downloads; shuffled in a buffer of 10 000 documents.
        revision: branch, tag or commit of a hub dataset; None: its main branch.
        encoding: of local .txt, .json, .jsonl and .csv files.

    Raises:
        FileNotFoundError: no such dataset or split.
        ModuleNotFoundError: a .zst file without zstandard.
        ValueError: files of several kinds in one folder; bytes that are not of `encoding`; a
            damaged file; no such column, one of other things, or with nulls; a revision or an
            encoding of what has none. Of a stream the bytes and entries are looked at as they come.
    """
    path = Path(CORPUS if data == EMBEDDED else data).expanduser()
    saved = _is_saved(path)
    text = path.exists() and data != EMBEDDED and not saved and _kind(path) != ".parquet"
    _require_options(data, data == EMBEDDED or path.exists(), text, revision, encoding)
    if data == EMBEDDED and not streaming:
        return _embedded_texts(split, text_column, seed)
    local = data.startswith((".", "/", "~")) or _kind(path) in (".txt", *READERS)
    if not data or (local and not path.exists()):
        raise FileNotFoundError(_not_found(data, "no such file or folder"))
    if saved:
        return _shuffled(data, _load_saved(data, path, split, text_column), text_column, seed)
    files = _files(data, path) if path.exists() else []
    if path.is_file() or {_kind(file) for file in files} == {".txt"}:
        _require_train_split(data, split)
    for file in files:
        if _kind(file) == ".parquet":
            _require_options(data, True, False, revision, encoding)
        elif not (streaming and _kind(file) in READERS):
            _require_encoding(file, encoding)
    if files and _kind(files[0]) == ".txt":
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        return [_read_text(files[i], encoding) for i in order.tolist()]
    if files and not any(file.stat().st_size for file in files):
        raise ValueError(f"dataset {data!r} is empty: {_join(files)} of 0 bytes; give more text")
    options = {"revision": revision} if revision else {}
    options |= {"encoding": encoding} if encoding != "utf-8" else {}
    loaded = _load_dataset(data, path, split, streaming, files, options)
    if streaming:
        check = _check_of(data, loaded, text_column)
        shuffled = loaded.shuffle(seed=seed, buffer_size=10_000)
        return _StreamedColumn(data, shuffled, text_column, check)
    return _shuffled(data, loaded, text_column, seed)


def load_columns(
    data: str, columns: Sequence[str], *, split: str = "train", revision: str | None = None
) -> list[list[Any]]:
    """Whole columns of a dataset with named columns, in the order of the dataset: of labelled text
    the texts and their labels.

    Args:
        data, split, revision: as of `load_texts`; local files are UTF-8.

    Raises:
        FileNotFoundError: no such dataset or split.
        ValueError: no such column, text without columns, damaged data, a revision of what has none.
    """
    path = Path(CORPUS if data == EMBEDDED else data).expanduser()
    _require_options(data, data == EMBEDDED or path.exists(), False, revision, "utf-8")
    if data == EMBEDDED:
        file = path / f"{split}.parquet"
        if not file.exists():
            raise FileNotFoundError(f"dataset {EMBEDDED!r}: cannot read split {split!r}")
        return [_read_column(file, column) for column in columns]
    local = data.startswith((".", "/", "~")) or _kind(path) in (".txt", *READERS)
    if not data or (local and not path.exists()):
        raise FileNotFoundError(_not_found(data, "no such file or folder"))
    if _is_saved(path):
        loaded = _load_saved(data, path, split, columns[0])
    else:
        files = _files(data, path) if path.exists() else []
        if any(_kind(file) == ".txt" for file in files):
            raise ValueError(
                f"dataset {data!r} holds plain text without columns; expected .jsonl, .csv or "
                f".parquet with {', '.join(columns)}"
            )
        options = {"revision": revision} if revision else {}
        loaded = _load_dataset(data, path, split, False, files, options)
    for column in columns:
        if column not in loaded.column_names:
            raise ValueError(
                f"dataset {data!r} has no column {column!r} but {', '.join(loaded.column_names)}; "
                f"name the one that is meant"
            )
    return [list(loaded[column]) for column in columns]


def _require_options(
    data: str, local: bool, text: bool, revision: str | None, encoding: str
) -> None:
    """Raise ValueError for a revision of what is local, an unknown encoding, or one of what is not
    local text."""
    if local and revision is not None:
        raise ValueError(
            f"dataset {data!r} is local and has no revision {revision!r}; leave --data-revision "
            f"out, or give a hub name"
        )
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError):
        raise ValueError(
            f"unknown encoding {brief(encoding)}; expected one of Python's, such as utf-8, latin-1 "
            f"or cp1252 (--encoding)"
        ) from None
    if not text and codecs.lookup(encoding).name != "utf-8":
        raise ValueError(
            f"dataset {data!r}: --encoding is for local .txt, .json, .jsonl and .csv files; leave "
            f"it out"
        )


def _embedded_texts(split: str, text_column: str, seed: int) -> Iterable[str]:
    """The corpus of the package, in the order that `datasets` gives it: importing that takes a
    tenth of a short training's time, and 50 MiB."""
    import numpy as np
    import pyarrow

    path = CORPUS / f"{split}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"dataset {EMBEDDED!r}: cannot read split {split!r}")
    texts = _read_column(path, text_column)
    pyarrow.default_memory_pool().release_unused()  # Arrow keeps 20 MiB for itself otherwise
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts)).tolist()]


def _read_column(path: Path, column: str) -> list[str]:
    from pyarrow import parquet

    texts: list[str] = []
    with parquet.ParquetFile(path) as file:
        _require_column(EMBEDDED, column, file.schema_arrow.names)
        # Piece by piece, so that Arrow takes less memory at a time.
        for piece in file.iter_batches(512, columns=[column], use_threads=False):
            texts += piece.column(0).to_pylist()
    return texts


def _require_column(data: str, column: str, names: Sequence[str] | None) -> None:
    if names is not None and column not in names:
        raise ValueError(
            f"dataset {data!r} has no column {column!r} but {', '.join(names)}; name the "
            f"one that holds the text (--text-column)"
        )


def _files(data: str, path: Path) -> list[Path]:
    """The data files of a local file or folder, which are of one kind: .txt directly in a folder,
    others anywhere below it. None that we know is left to datasets.

    Raises:
        ValueError: several kinds. FileNotFoundError: an unknown one.
    """
    if path.is_file():
        if _kind(path) not in (".txt", *READERS):
            raise FileNotFoundError(
                f"dataset {data!r}: unknown ending {path.suffix!r}; expected .txt, "
                f"{', '.join(READERS)}, or one of these and then {' or '.join(COMPRESSED)}"
            )
        return [path]
    plain = sorted(file for file in path.iterdir() if _kind(file) == ".txt" and file.is_file())
    tables = sorted(
        file
        for file in path.rglob("*")
        if _kind(file) in READERS
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    kinds = {READERS[_kind(file)] for file in tables}
    # A README.md may assign files to splits: datasets reads it.
    if (plain and tables) or (len(kinds) > 1 and not (path / "README.md").exists()):
        raise ValueError(
            f"dataset {data!r} holds files of several kinds: {_join([*plain, *tables])}; only "
            f"one kind is read: pass one of the files, or a folder that holds one kind alone"
        )
    return plain or tables


def _join(files: Sequence[Path]) -> str:
    """`3 .txt (a.txt, …), 1 .csv (b.csv)`"""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(_kind(file), []).append(file.name)
    return ", ".join(
        f"{len(names)} {ending} ({names[0]}{', …' if len(names) > 1 else ''})"
        for ending, names in groups.items()
    )


def _kind(path: Path) -> str:
    """Ending of a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _open(path: Path) -> Any:
    """The bytes of a file, compressed or not."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        zstandard: Any = import_module("zstandard")  # nobody else needs it
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading .zst needs zstandard; pip install zstandard, or decompress the file"
        ) from None
    return zstandard.open(path, "rb")


def _pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file piece by piece.

    Raises:
        ValueError: a compressed file that is damaged, or becomes far larger than text does.
    """
    most = max(LEAST_LIMIT, MOST_RATIO * path.stat().st_size)
    read = 0
    with _open(path) as file:
        while True:
            try:
                piece = file.read(1 << 24)
            except (gzip.BadGzipFile, EOFError, zlib.error, RuntimeError) as error:
                raise ValueError(
                    f"{path} is damaged ({first_line(error)}); copy or download it again"
                ) from None
            except Exception as error:  # zstandard's own
                if path.suffix != ".zst":
                    raise
                raise ValueError(f"{path} is damaged ({first_line(error)})") from None
            read += len(piece)
            if path.suffix in COMPRESSED and read > most:
                raise ValueError(
                    f"{path} becomes more than {MOST_RATIO} times as large, as no text does; "
                    f"decompress it yourself if you trust it"
                )
            if not piece:
                return
            yield piece


def _read_text(path: Path, encoding: str) -> str:
    text = b"".join(_pieces(path)).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _require_encoding(path: Path, encoding: str) -> None:
    """Raise ValueError, with the place, unless a file is of this encoding throughout."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    for piece in _with_end(_pieces(path)):
        read += len(piece)
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeError as error:
            if not isinstance(error, UnicodeDecodeError):  # of the whole file: no mark of its order
                raise ValueError(f"{path} is not {encoding} ({error}); give its encoding") from None
            offset = read - len(error.object) + error.start
            remedy = "give its encoding, for example --encoding latin-1, or convert it"
            name = "UTF-8" if encoding == "utf-8" else encoding
            raise ValueError(
                f"{path}: byte 0x{error.object[error.start]:02x} at offset {offset:,} is not "
                f"{name}; {remedy}"
            ) from None


def _with_end(pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield from pieces
    yield b""


def _is_saved(path: Path) -> bool:
    """True for a folder that `datasets.save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(data: str, path: Path, split: str, column: str) -> Any:
    """A dataset that `datasets.save_to_disk` wrote, mapped into memory; one column is checked."""
    what = f"dataset {data!r}"
    if (path / "dataset_dict.json").is_file():
        found = load_json(path / "dataset_dict.json", what)
        splits = require_fields(found, {"splits": [str]}, what)["splits"]
        if split not in splits:
            raise FileNotFoundError(
                f"{what} has no split {split!r} but {brief(', '.join(splits))[1:-1]} (--split)"
            )
        if not safe_file_name(split):
            raise ValueError(f"{what}: split {brief(split)} is no name of a folder in it")
        path = path / split
        require_inside(path, what)
    else:
        _require_train_split(data, split)
    state = require_fields(load_json(path / "state.json", what), {"_data_files": [dict]}, what)
    load_json(path / "dataset_info.json", what)
    for entry in state["_data_files"]:
        name = require_fields(entry, {"filename": str}, f"{what}: state.json")["filename"]
        if not safe_file_name(name):
            raise ValueError(f"{what}: state.json names a file {brief(name)}, not one beside it")
        require_inside(path / name, what)
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
        _require_column(data, column, loaded.column_names)
        # What is mapped is not checked by reading it: wrong offsets would be read past the end.
        loaded.data.column(column).validate(full=True)
        return loaded
    except FileNotFoundError as error:
        raise FileNotFoundError(_not_found(data, first_line(error))) from None
    except Exception as error:  # datasets raises whatever a wrong description runs into
        if str(error).startswith("dataset "):
            raise
        raise ValueError(_damaged(data, error)) from None


def _load_dataset(
    data: str,
    path: Path,
    split: str,
    streaming: bool,
    files: Sequence[Path],
    options: Mapping[str, str],
) -> Any:
    import datasets  # heavy, and absent where only kernels are used

    if path.is_file():
        source: dict[str, Any] = {"path": READERS[_kind(path)], "data_files": str(path)}
    else:
        name, _, configuration = (str(path), "", "") if path.is_dir() else data.partition(":")
        source = {"path": name, "name": configuration or None}
    try:
        source |= {"split": split, "streaming": streaming, **options}
        return datasets.load_dataset(**source)
    except OSError as error:  # not there, or the hub cannot be reached
        raise FileNotFoundError(_not_found(data, first_line(error))) from None
    except ImportError:
        raise
    except Exception as error:  # datasets raises whatever a wrong description runs into
        if type(error) is ValueError:
            raise FileNotFoundError(
                f"dataset {data!r}: cannot read split {split!r} ({first_line(error)})"
            ) from None
        raise ValueError(_damaged(data, error.__cause__ or error, files)) from None


def _damaged(data: str, error: BaseException, files: Sequence[Path] = ()) -> str:
    place = next((f" ({line})" for file in files if (line := _damaged_line(file))), "")
    return (
        f"dataset {data!r} cannot be read: {first_line(error)}{place}; mend or remove what is "
        f"damaged"
    )


def _damaged_line(path: Path) -> str | None:
    """Name and number of the first line of a .jsonl file that is not JSON; None without one."""
    if path.suffix != ".jsonl":
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line if line.strip() else "null")
            except ValueError:
                return f"{path.name}, line {number}"
    return None


Check = Callable[[Any], bool]
"""Test of a column's values: is it a document of the kind that the column holds?"""


def _check_of(data: str, loaded: Any, column: str) -> Check:
    """The test that documents of a column must pass.

    Raises:
        ValueError: no such column, one that holds no documents, or with nulls. Of a stream only
            what is known of it is looked at.
    """
    _require_column(data, column, loaded.column_names)
    entries = getattr(loaded, "data", None)
    if entries is not None and (absent := entries.column(column)).null_count:
        raise ValueError(
            f"dataset {data!r}: {absent.null_count} of {len(absent)} entries of column {column!r} "
            f"are null, the first in row {absent.is_null().index(True).as_py()} (from 0); remove "
            f"these rows, or name another column (--text-column)"
        )
    if loaded.features is None:
        return lambda value: any(check(value) for check in CHECKS.values())
    kinds = {name: _holds(loaded.features, name) for name in loaded.features}
    if kinds[column] in CHECKS:
        return CHECKS[kinds[column]]
    held = _described(loaded.features.arrow_schema.field(column).type)
    texts, others = ([n for n, kind in kinds.items() if kind in wanted]
                     for wanted in ({"text"}, {"ids", "conversation"}))  # fmt: skip
    raise ValueError(
        f"dataset {data!r}: column {column!r} holds {held}, expected strings, lists of token ids "
        f"(whole numbers) or conversations (lists of messages with role and content); columns of "
        f"strings: {', '.join(texts) or 'none'}, of the others: {', '.join(others) or 'none'} "
        f"(--text-column)"
    )


def _described(kind: Any) -> str:
    """An Arrow type in words: `lists of double`."""
    from pyarrow import BaseExtensionType, types

    if types.is_list(kind) or types.is_large_list(kind):
        return f"lists of {_described(kind.value_type)}"
    if types.is_struct(kind):
        names = brief(", ".join(kind.field(i).name for i in range(kind.num_fields)))
        return f"objects with {names[1:-1]}"
    return "values of several types" if isinstance(kind, BaseExtensionType) else str(kind)


def _holds(features: Any, column: str) -> str | None:
    """`text`, `ids`, `conversation`, or None for anything else."""
    from pyarrow import types

    kind = features.arrow_schema.field(column).type
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return None
    inner = kind.value_type
    if types.is_integer(inner):
        return "ids"
    if not types.is_struct(inner):
        return None
    names = {inner.field(i).name for i in range(inner.num_fields)}
    return "conversation" if any(names >= set(pair) for pair in MESSAGE_KEYS) else None


MESSAGE_KEYS = (("role", "content"), ("from", "value"))
ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in place of which chat templates have others."""


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and any(all(isinstance(message.get(key), str) for key in pair) for pair in MESSAGE_KEYS)
            for message in value
        )
    )


CHECKS: dict[str | None, Check] = {
    "text": lambda value: isinstance(value, str),
    "ids": lambda value: isinstance(value, list) and all(type(token) is int for token in value),
    "conversation": _is_conversation,
}


def messages_of(conversation: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A conversation as chat templates take it: `[{"role": …, "content": …}, …]`."""
    messages = []
    for message in conversation:
        role, content = next(
            pair for pair in MESSAGE_KEYS if all(isinstance(message.get(key), str) for key in pair)
        )
        messages.append(
            {"role": ROLES.get(message[role], message[role]), "content": message[content]}
        )
    return messages


class _Column:
    """One column of a dataset, re-iterable."""

    def __init__(self, data: str, dataset: Any, column: str, check: Check):
        self._data = data
        self._dataset = dataset
        self._column = column
        self._check = check

    def __iter__(self) -> Iterator[Document]:
        for document in self._entries():
            if not self._check(document):
                raise ValueError(
                    f"dataset {self._data!r}: column {self._column!r} holds {brief(document)}, "
                    f"expected a string in every row, or in every row token ids, or messages with "
                    f"role and content; remove these rows, or name another column (--text-column)"
                )
            yield document

    def _entries(self) -> Iterator[Any]:
        from datasets.exceptions import DatasetsError

        try:
            for row in self._dataset:
                yield row.get(self._column)
        except (ValueError, SystemError, DatasetsError) as error:  # SystemError: damaged Arrow
            raise ValueError(_damaged(self._data, error.__cause__ or error)) from None


def _shuffled(data: str, loaded: Any, column: str, seed: int) -> _Column:
    """The documents of one column in shuffled order; no other column is read, which might be
    damaged."""
    check = _check_of(data, loaded, column)
    return _Column(data, loaded.select_columns([column]).shuffle(seed), column, check)


class _StreamedColumn(_Column):
    """One column of a dataset that is read while it downloads."""

    def shard(self, rank: int, world: int) -> "_StreamedColumn":
        """Every document in the share of one rank: whole files where they can be dealt out evenly,
        so that no rank downloads what another reads."""
        from datasets.distributed import split_dataset_by_node

        share = split_dataset_by_node(self._dataset, rank, world)
        return _StreamedColumn(self._data, share, self._column, self._check)


def _not_found(data: str, reason: str) -> str:
    return (
        f"dataset {data!r} not found ({reason}); give a hub name, a local folder or file, or "
        f"{EMBEDDED!r} for the corpus that comes with resae"
    )


def _require_train_split(data: str, split: str) -> None:
    if split != "train":
        raise FileNotFoundError(
            f"dataset {data!r} is one file or folder and has no split {split!r}"
        )


def fingerprint(texts: Iterable[Document], documents: int = 256) -> dict[str, Any]:
    """Identify a text in a record: number, length in characters (of token ids, in tokens) and
    SHA-256 of the first documents in their shuffled order, which follows from the seed and from how
    many there are in all."""
    found, characters, digest = 0, 0, sha256()
    for document in islice(texts, documents):
        found += 1
        characters += len(document)
        text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
        digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
    return {"documents": found, "characters": characters, "sha256": digest.hexdigest()}
