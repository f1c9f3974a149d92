"""Texts of a dataset: of the hub, of local files, or of the embedded corpus."""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from resae.assets import CORPUS
from resae.models.hooked import EMBEDDED

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that describe the data; `datasets` skips them too."""


def load_texts(
    data: str,
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    seed: int = 0,
) -> Iterable[str]:
    """Texts of a dataset in shuffled order (documents of one source tend to lie together).

    Args:
        data: `embedded`; a file (.txt, .parquet, .jsonl, .json, .csv); a folder of .txt files or of
            dataset files of one kind; or a hub dataset, `owner/name` or
            `owner/name:configuration`.
        split: which split; a single file or a folder of .txt files counts as "train".
        text_column: the column that holds the text.
        streaming: read a hub dataset while it downloads; shuffled in a buffer of 10 000 documents.

    Raises:
        FileNotFoundError: no such dataset or split.
        ValueError: files of several kinds in one folder; bytes that are not UTF-8; a damaged file;
            no such column, or one of other things than strings. Of a stream the bytes and entries
            are looked at as they come.
    """
    if data == EMBEDDED and not streaming:
        return _embedded_texts(split, text_column, seed)
    path = Path(CORPUS if data == EMBEDDED else data).expanduser()
    local = data.startswith((".", "/", "~")) or path.suffix in (".txt", *READERS)
    if not data or (local and not path.exists()):
        raise FileNotFoundError(_not_found(data, "no such file or folder"))
    files = _files(data, path) if path.exists() else []
    if path.is_file() or {file.suffix for file in files} == {".txt"}:
        _require_train_split(data, split)
    for file in files:
        if file.suffix != ".parquet" and not (streaming and file.suffix in READERS):
            _require_utf8(file)
    if files and files[0].suffix == ".txt":
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        return [files[i].read_text("utf-8") for i in order.tolist()]
    if files and not any(file.stat().st_size for file in files):
        raise ValueError(f"dataset {data!r} is empty: {_join(files)} of 0 bytes; give more text")
    loaded = _load_dataset(data, path, split, streaming, files)
    _require_text_column(data, loaded, text_column)
    if streaming:
        shuffled = loaded.shuffle(seed=seed, buffer_size=10_000)
        return _StreamedColumn(data, shuffled, text_column)
    return _Column(data, loaded.shuffle(seed), text_column)


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
        if path.suffix not in (".txt", *READERS):
            raise FileNotFoundError(
                f"dataset {data!r}: unknown ending {path.suffix!r}; expected .txt, "
                f"{', '.join(READERS)}"
            )
        return [path]
    plain = sorted(path.glob("*.txt"))
    tables = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in READERS
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    kinds = {READERS[file.suffix] for file in tables}
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
        groups.setdefault(file.suffix, []).append(file.name)
    return ", ".join(
        f"{len(names)} {ending} ({names[0]}{', …' if len(names) > 1 else ''})"
        for ending, names in groups.items()
    )


def _require_utf8(path: Path) -> None:
    """Raise ValueError, with the place, unless a file is UTF-8 throughout."""
    decoder = getincrementaldecoder("utf-8")()
    read = 0
    with path.open("rb") as file:
        while True:
            piece = file.read(1 << 24)
            read += len(piece)
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                offset = read - len(error.object) + error.start
                raise ValueError(
                    f"{path}: byte 0x{error.object[error.start]:02x} at offset {offset:,} is not "
                    f"UTF-8; convert the file, for example with iconv -f LATIN1 -t UTF-8"
                ) from None
            if not piece:
                return


def _load_dataset(data: str, path: Path, split: str, streaming: bool, files: Sequence[Path]) -> Any:
    import datasets  # heavy, and absent where only kernels are used
    from datasets.exceptions import DatasetsError

    if path.is_file():
        source: dict[str, Any] = {"path": READERS[path.suffix], "data_files": str(path)}
    else:
        name, _, configuration = (str(path), "", "") if path.is_dir() else data.partition(":")
        source = {"path": name, "name": configuration or None}
    try:
        return datasets.load_dataset(**source, split=split, streaming=streaming)
    except OSError as error:  # not there, or the hub cannot be reached
        raise FileNotFoundError(_not_found(data, _first_line(error))) from None
    except (ValueError, RuntimeError, DatasetsError) as error:
        if type(error) is ValueError:
            raise FileNotFoundError(
                f"dataset {data!r}: cannot read split {split!r} ({_first_line(error)})"
            ) from None
        raise ValueError(_damaged(data, error.__cause__ or error, files)) from None


def _damaged(data: str, error: BaseException, files: Sequence[Path] = ()) -> str:
    place = next((f" ({line})" for file in files if (line := _damaged_line(file))), "")
    return (
        f"dataset {data!r} cannot be read: {_first_line(error)}{place}; mend or remove what is "
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _require_text_column(data: str, loaded: Any, column: str) -> None:
    """Raise ValueError unless a dataset has this column, of strings, none of them missing. Of a
    stream only what is known of it is looked at."""
    _require_column(data, column, loaded.column_names)
    features = loaded.features
    if features is not None and not _is_text(features[column]):
        texts = [name for name, feature in features.items() if _is_text(feature)]
        held = getattr(features[column], "dtype", None) or "values of several types"
        raise ValueError(
            f"dataset {data!r}: column {column!r} holds {held}, expected strings; columns of "
            f"strings: {', '.join(texts) or 'none'} (--text-column)"
        )
    entries = getattr(loaded, "data", None)
    if entries is not None and (absent := entries.column(column)).null_count:
        raise ValueError(
            f"dataset {data!r}: {absent.null_count} of {len(absent)} entries of column {column!r} "
            f"are null, the first in row {absent.is_null().index(True).as_py()} (from 0); remove "
            f"these rows, or name another column (--text-column)"
        )


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


class _Column:
    """One column of a dataset, re-iterable."""

    def __init__(self, data: str, dataset: Any, column: str):
        self._data = data
        self._dataset = dataset
        self._column = column

    def __iter__(self) -> Iterator[str]:
        for text in self._entries():
            if not isinstance(text, str):
                raise ValueError(
                    f"dataset {self._data!r}: column {self._column!r} holds {text!r}, expected a "
                    f"string in every row; remove these rows, or name another column "
                    f"(--text-column)"
                )
            yield text

    def _entries(self) -> Iterator[Any]:
        from datasets.exceptions import DatasetsError

        try:
            for row in self._dataset:
                yield row.get(self._column)
        except (ValueError, DatasetsError) as error:
            raise ValueError(_damaged(self._data, error.__cause__ or error)) from None


class _StreamedColumn(_Column):
    """One column of a dataset that is read while it downloads."""

    def shard(self, rank: int, world: int) -> "_StreamedColumn":
        """Every document in the share of one rank: whole files where they can be dealt out evenly,
        so that no rank downloads what another reads."""
        from datasets.distributed import split_dataset_by_node

        share = split_dataset_by_node(self._dataset, rank, world)
        return _StreamedColumn(self._data, share, self._column)


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


def fingerprint(texts: Iterable[str], documents: int = 256) -> dict[str, Any]:
    """Identify a text in a record: number, length in characters and SHA-256 of the first documents
    in their shuffled order, which follows from the seed and from how many there are in all."""
    found, characters, digest = 0, 0, sha256()
    for text in islice(texts, documents):
        found += 1
        characters += len(text)
        digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
    return {"documents": found, "characters": characters, "sha256": digest.hexdigest()}
