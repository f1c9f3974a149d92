"""Text → rows of token ids → shuffled activations of several hook points from one forward pass.

    load_texts        hub name, local folder or file, or `embedded` → texts
    TokenRows         texts → rows `[T]`: BOS, then T−1 tokens of the documents joined by EOS
    ModelActivations  rows → L activations of each row, by running the model
    ActivationBatches those → batches of L activations `[N, D]`, shuffled in a bounded buffer

Everything is an iteration that can be started again at a recorded position and then goes on with
the same bits: a position names the epoch, the first row of the buffer in use, and the batch within
it.

W processes share the work by `rank`: process r reads rows r, r+W, r+2W, … (`TokenRows.shard`) and
makes batches of N/W tokens. Batch s of the whole is the batches s of all ranks one after another,
which one process gets from W sources of the same ranks. Every rank is at the same fill and batch at
the same step; how many rows a fill took differs by a few, so that each rank keeps its own position.
"""

import json
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resae.assets import CORPUS
from resae.model import EMBEDDED, HookedLM, HookPoint
from resae_kernels.cpu.onednn import OneDNNLinear

MODEL_ROWS = 8
"""Rows per forward pass. With more, on a CPU, an op's output is so large that it goes back to the
system each time and comes anew page by page: 16 rows of 128 tokens took about a tenth longer."""
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files beside the data that say something of it; datasets passes over them too."""


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
        raise ValueError(f"dataset {data!r} is empty: {_listed(files)} of 0 bytes; give more text")
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
    from pyarrow import parquet

    path = CORPUS / f"{split}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"dataset {EMBEDDED!r}: cannot read split {split!r}")
    texts: list[str] = []
    with parquet.ParquetFile(path) as file:
        _require_column(EMBEDDED, text_column, file.schema_arrow.names)
        # Piece by piece: Arrow keeps what it has once taken from the system.
        for piece in file.iter_batches(512, columns=[text_column], use_threads=False):
            texts += piece.column(0).to_pylist()
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts)).tolist()]


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
    # A README.md may say which files are which split: datasets reads it.
    if (plain and tables) or (len(kinds) > 1 and not (path / "README.md").exists()):
        raise ValueError(
            f"dataset {data!r} holds files of several kinds: {_listed([*plain, *tables])}; only "
            f"one kind is read: pass one of the files, or a folder that holds one kind alone"
        )
    return plain or tables


def _listed(files: Sequence[Path]) -> str:
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


class TokenRows:
    """Rows of `context_tokens` token ids, packed without padding; re-iterable.

    Each row is BOS and then the next stretch of the documents joined by EOS (a tokenizer without
    BOS uses its EOS, one with neither gets plain stretches). The last, incomplete row is dropped.

    Args:
        texts: documents; iterated anew for each epoch.
        tokenizer: an HF tokenizer.
        context_tokens: T, the length of a row.
        skip, take: leave out the first rows; stop after so many.
        rank, world: of what is left, rows rank, rank + world, … (see `shard`).
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        context_tokens: int,
        *,
        skip: int = 0,
        take: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if context_tokens < 2:
            raise ValueError(f"context_tokens={context_tokens}, expected at least 2")
        _require_rank(rank, world)
        self.texts = texts
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.skip = skip
        self.take = take
        self.rank = rank
        self.world = world
        self._note: Callable[[list[int]], None] | None = None

    def noted(self, note: Callable[[list[int]], None]) -> "TokenRows":
        """The same rows; `note` is called with the token ids of each that is read."""
        rows = copy(self)
        rows._note = note
        return rows

    def shard(self, rank: int, world: int) -> "TokenRows":
        """The share of one of `world` processes: disjoint, and every row is in one of them.

        Rows are dealt out one by one, and every rank tokenizes all text. Only a streamed dataset
        with nothing skipped or cut is dealt out by documents, which each rank packs by itself: no
        document is downloaded or tokenized twice, and rows are other rows than those of one
        process.
        """
        _require_rank(rank, world)
        if world == 1:
            return self
        if self.world != 1:
            raise ValueError(f"rows of rank {self.rank} of {self.world} are a share already")
        deal = getattr(self.texts, "shard", None)
        share = copy(self)
        if deal is not None and self.skip == 0 and self.take is None:
            share.texts = deal(rank, world)
        else:
            share.rank, share.world = rank, world
        return share

    def __iter__(self) -> Iterator[Tensor]:
        return self.from_row(0)

    def from_row(self, row: int) -> Iterator[Tensor]:
        """The rows from this one on."""
        first = self.skip + self.rank + row * self.world
        stop = None if self.take is None else self.skip + self.take
        for ids in islice(self._pack(), first, stop, self.world):
            if self._note is not None:
                self._note(ids)
            yield torch.tensor(ids)

    def _pack(self) -> Iterator[list[int]]:
        eos = self.tokenizer.eos_token_id
        bos = self.tokenizer.bos_token_id
        bos = eos if bos is None else bos
        head = [] if bos is None else [bos]
        separator = [] if eos is None else [eos]
        body = self.context_tokens - len(head)
        pending: list[int] = []
        texts = iter(self.texts)
        while documents := [text for text in islice(texts, 64)]:
            encoded = self.tokenizer(documents, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            for ids in encoded:
                pending += ids + separator
            cut = 0
            while len(pending) - cut >= body:
                yield head + pending[cut : cut + body]
                cut += body
            pending = pending[cut:]

    def batches(self, batch_rows: int) -> Iterator[Tensor]:
        """Batches `[B, T]`, the last one possibly smaller."""
        rows = iter(self)
        while batch := list(islice(rows, batch_rows)):
            yield torch.stack(batch)

    def require_rows(self, needed: int, what: str) -> None:
        """Raise ValueError unless there are `needed` rows."""
        found = sum(1 for _ in islice(self, needed))
        if found < needed:
            raise ValueError(
                f"{what}: the dataset is empty or too short: {found} rows of "
                f"{self.context_tokens} tokens, expected at least {needed}; give more text or a "
                f"smaller context"
            )


def _require_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} of world={world}, expected 0 ≤ rank < world")


def train_and_held_out(
    data: str,
    lm: HookedLM,
    *,
    context_tokens: int,
    held_out_rows: int,
    text_column: str = "text",
    streaming: bool = False,
    seed: int = 0,
) -> tuple[TokenRows, TokenRows]:
    """Training rows, and `held_out_rows` rows that training never sees: of the split "validation"
    where the dataset has one, otherwise the first rows of the shuffled training split.

    Raises:
        ValueError: too few tokens for either, or rows longer than the model's context.
    """
    lm.require_context(context_tokens)
    if lm.tokenizer is None:
        raise ValueError(f"model {lm.name} has no tokenizer; load it with HookedLM.from_pretrained")
    options: dict[str, Any] = {"text_column": text_column, "streaming": streaming, "seed": seed}
    texts = load_texts(data, **options)
    try:
        held_out = TokenRows(
            load_texts(data, split="validation", **options),
            lm.tokenizer,
            context_tokens,
            take=held_out_rows,
        )
        skip = 0
    except FileNotFoundError:
        held_out = TokenRows(texts, lm.tokenizer, context_tokens, take=held_out_rows)
        skip = held_out_rows
    held_out.require_rows(held_out_rows, f"held-out rows of {data!r}")
    train = TokenRows(texts, lm.tokenizer, context_tokens, skip=skip)
    train.require_rows(1, f"training rows of {data!r}")
    return train, held_out


def capture_tokens(lm: HookedLM, input_ids: Tensor, points: Sequence[HookPoint]) -> list[Tensor]:
    """Activations `[N, D]` in fp32 at each point, of the tokens that are not special."""
    return [x.float() for x in _captured(lm, input_ids, points)[1]]


def _captured(
    lm: HookedLM, input_ids: Tensor, points: Sequence[HookPoint]
) -> tuple[list[int], list[Tensor]]:
    """How many tokens of each row are not special, and their activations in the model's dtype."""
    input_ids = input_ids.to(lm.device)
    keep = ~lm.is_special(input_ids)
    with OneDNNLinear():
        captured = lm.capture(input_ids, points)
    kept = keep.view(-1).nonzero().squeeze(1)
    # A model may be spread over devices: blocks are where their activations are.
    xs = [captured[point].flatten(0, 1) for point in points]
    return keep.sum(1).tolist(), [x.index_select(0, kept.to(x.device)) for x in xs]


Read = Callable[[int], tuple[list[int], list[Tensor]]]
"""Called with n: the number of tokens of each of the next n rows (fewer at the end of the data) and
L activations `[tokens, D]` of them, the tokens of a row one after another."""


class RowActivations(Protocol):
    """Activations of rows in their order: from a model, or from disk."""

    def reader(self, row: int) -> Read:
        """What reads from this row on, for one epoch."""
        ...


class ModelActivations:
    """Activations of rows by running the model, special tokens left out.

    Args:
        lm, rows, points: what to run on what, and where to look.
    """

    def __init__(self, lm: HookedLM, rows: TokenRows, points: Sequence[HookPoint]):
        self.lm = lm
        self.rows = rows
        self.points = list(points)

    def reader(self, row: int) -> Read:
        rows = self.rows.from_row(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            ids = list(islice(rows, n))
            return _captured(self.lm, torch.stack(ids), self.points) if ids else ([], [])

        return read


class WithRows:
    """Activations from elsewhere, such as a cache, whose rows are read along with them: for what
    `TokenRows.noted` does."""

    def __init__(self, activations: RowActivations, rows: TokenRows):
        self.activations = activations
        self.rows = rows

    def reader(self, row: int) -> Read:
        activations, rows = self.activations.reader(row), self.rows.from_row(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            taken = activations(n)
            deque(islice(rows, len(taken[0])), maxlen=0)
            return taken

        return read


class Position(NamedTuple):
    """Where an iteration of activation batches stands: enough to go on with the same bits."""

    epoch: int = 0
    row: int = 0
    """First row of the buffer in use."""
    fill: int = 0
    """How many buffers came before: seeds the shuffle."""
    batch: int = 0
    """Batches of this buffer already used."""


class ActivationSource(Protocol):
    """What training reads: endless batches, from any recorded position."""

    def batches(self, start: Position) -> Iterator[tuple[list[Tensor], Position]]:
        """L activations `[N, D]`, and the position after them."""
        ...


def in_order(activations: RowActivations, row: int = 0) -> Iterator[list[Tensor]]:
    """L activations `[n, D]` in fp32 of the rows from this one on, pass by pass, for one epoch."""
    read = activations.reader(row)
    while (taken := read(MODEL_ROWS))[0]:
        yield [x.float() for x in taken[1]]


class ActivationBatches:
    """Shuffled activations of several hook points from one pass over the rows; special tokens left
    out; the rows start over when they end.

    Args:
        lm, rows, points: what to run on what, and where to look. With `world` > 1 the rows of all
            ranks: each takes its share.
        batch_tokens: N, tokens per batch, of all ranks together.
        buffer_tokens: tokens whose activations are held and shuffled together, of all ranks
            together.
        buffer_dtype: in which they are held; None: as the model computes them. bfloat16 has the
            range of float32, and a relative error of at most 1/512 per entry.
        total_tokens: how many will be taken in all; the last buffer is then no larger than needed.
        model_rows: rows per forward pass.
        device: where the buffer is, and batches come from; None: on the model's.
        rank, world: of several processes that share the work.
        stored: reads the activations of the rows in place of running the model, such as an
            `ActivationCache`.
    """

    def __init__(
        self,
        lm: HookedLM,
        rows: TokenRows,
        points: Sequence[HookPoint],
        *,
        batch_tokens: int,
        buffer_tokens: int,
        total_tokens: int | None = None,
        buffer_dtype: torch.dtype | None = None,
        model_rows: int = MODEL_ROWS,
        seed: int = 0,
        device: str | torch.device | None = None,
        rank: int = 0,
        world: int = 1,
        stored: RowActivations | None = None,
    ):
        if buffer_tokens < batch_tokens:
            raise ValueError(
                f"buffer_tokens={buffer_tokens} is below batch_tokens={batch_tokens}; raise it"
            )
        if batch_tokens % world:
            raise ValueError(
                f"batch_tokens={batch_tokens} cannot be dealt out to {world} ranks evenly; make it "
                f"a multiple"
            )
        rows = rows.shard(rank, world)
        self.activations = stored or ModelActivations(lm, rows, points)
        self.batch_tokens = batch_tokens // world
        self.batches_per_fill = buffer_tokens // batch_tokens
        self.batches_in_all = None if total_tokens is None else -(-total_tokens // batch_tokens)
        self.context_tokens = rows.context_tokens
        self.buffer_dtype = buffer_dtype
        self.model_rows = model_rows
        self.seed = seed
        self.device = device
        self._first: _Fill | None = None

    def batches(self, start: Position = Position()) -> Iterator[tuple[list[Tensor], Position]]:  # noqa: B008
        position, read = start, None
        while True:
            if position.fill == 0 and self._first is not None:
                fill, self._first = self._first, None
            else:
                read = read or self.activations.reader(position.row)
                fill = self._fill(read, position)
            _, xs, epoch, row, read = fill
            del fill  # the batches are all that holds on to the buffer
            for batch, picked in _shuffled(xs, self.batch_tokens, self.seed, position.fill):
                if batch >= position.batch:
                    yield [x.float() for x in picked], position._replace(batch=batch + 1)
            del xs  # before the next buffer is filled
            position = Position(epoch, row, position.fill + 1)

    def in_order(self) -> Iterator[list[Tensor]]:
        """L activations `[n, D]` of the first epoch in the order of the rows, for calibration.

        The first buffer comes first. What is read here, up to a buffer beyond the first, is kept
        for `batches`: the model runs on it only once.
        """
        first = self._first or self._fill(self.activations.reader(0), Position())
        tokens, xs, epoch, row, read = first
        ahead: deque[tuple[list[int], list[Tensor]]] = deque()
        self._first = first._replace(read=_reading_again(ahead, read))
        step = self.model_rows * self.context_tokens
        for start in range(0, tokens, step):
            yield [x[start : min(start + step, tokens)].float() for x in xs]
        held = 0
        while epoch == 0 and (taken := read(self.model_rows))[0]:
            held += sum(taken[0])
            if held <= tokens:
                ahead.append((taken[0], [x.to(self.buffer_dtype or x.dtype) for x in taken[1]]))
            elif ahead:  # too much to hold: from there on it is read anew
                ahead.clear()
                self._first = first._replace(read=self.activations.reader(row))
            yield [x.float() for x in taken[1]]

    def _fill(self, read: Read, at: Position) -> "_Fill":
        """The next buffer: as many tokens as its batches have, and a part of a row at most."""
        batches = self.batches_per_fill
        if self.batches_in_all is not None:
            left = self.batches_in_all - at.fill * batches
            batches = max(1, min(batches, left))
        wanted = batches * self.batch_tokens
        epoch, row = at.epoch, at.row
        xs: list[Tensor] = []
        held, first_epoch = 0, wanted
        while held < wanted:
            missing = -(-(wanted - held) // self.context_tokens)
            counts, pieces = read(min(self.model_rows, missing))
            if not counts:
                if row == 0:
                    raise ValueError("activations: the dataset holds no row of tokens; give more")
                first_epoch = min(first_epoch, held)
                epoch, row, read = epoch + 1, 0, self.activations.reader(0)
                continue
            row += len(counts)
            if not xs:
                whole = (wanted, pieces[0].shape[1])
                xs = [
                    piece.new_empty(whole, device=self.device, dtype=self.buffer_dtype)
                    for piece in pieces
                ]
            taken = slice(held, min(wanted, held + sum(counts)))
            for x, piece in zip(xs, pieces, strict=True):
                x[taken] = piece[: taken.stop - taken.start]
            held = taken.stop
        return _Fill(first_epoch, xs, epoch, row, read)


def _reading_again(ahead: deque[tuple[list[int], list[Tensor]]], read: Read) -> Read:
    """What was read ahead, and then what `read` goes on with."""

    def again(n: int) -> tuple[list[int], list[Tensor]]:
        if not ahead:
            return read(n)
        counts, xs = ahead.popleft()
        tokens = sum(counts[:n])
        if n < len(counts):
            ahead.appendleft((counts[n:], [x[tokens:] for x in xs]))
        return counts[:n], [x[:tokens] for x in xs]

    return again


class _Fill(NamedTuple):
    """A buffer, and where the rows stand after it."""

    tokens: int
    """Of the epoch in which it began."""
    xs: list[Tensor]
    epoch: int
    row: int
    read: Read


class StoredActivations:
    """Activations already in memory, `L × [N_all, D]`, shuffled anew each epoch: for training
    several stacks on the same tokens without running the model again."""

    def __init__(self, xs: Sequence[Tensor], *, batch_tokens: int, seed: int = 0):
        if len(xs[0]) < batch_tokens:
            raise ValueError(
                f"{len(xs[0])} activations stored, expected at least batch_tokens={batch_tokens}"
            )
        self.xs = list(xs)
        self.batch_tokens = batch_tokens
        self.seed = seed

    def batches(self, start: Position = Position()) -> Iterator[tuple[list[Tensor], Position]]:  # noqa: B008
        position = start
        while True:
            for batch, picked in _shuffled(self.xs, self.batch_tokens, self.seed, position.fill):
                if batch >= position.batch:
                    yield picked, position._replace(batch=batch + 1)
            position = Position(position.epoch + 1, 0, position.fill + 1)


def _shuffled(
    xs: Sequence[Tensor], batch_tokens: int, seed: int, fill: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Full batches of one buffer in an order fixed by `(seed, fill)`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + fill)
    order = torch.randperm(len(xs[0]), generator=generator).to(xs[0].device)
    for batch in range(len(order) // batch_tokens):
        picked = order[batch * batch_tokens : (batch + 1) * batch_tokens]
        yield batch, [x.index_select(0, picked) for x in xs]
