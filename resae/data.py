"""Text → rows of token ids → shuffled activations of several hook points from one forward pass.

    load_texts        hub name, local folder or file, or `embedded` → texts
    TokenRows         texts → rows `[T]`: BOS, then T−1 tokens of the documents joined by EOS
    ActivationBatches rows → batches of L activations `[N, D]`, shuffled in a bounded buffer

Everything is an iteration that can be started again at a recorded position and then goes on with
the same bits: a position names the epoch, the first row of the buffer in use, and the batch within
it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resae.assets import CORPUS
from resae.model import EMBEDDED, HookedLM, HookPoint

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


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
        data: `embedded`; a file (.txt, .parquet, .jsonl, .csv); a folder of .txt files or of
            dataset files; or a hub dataset, `owner/name` or `owner/name:configuration`.
        split: which split; a single file or a folder of .txt files counts as "train".
        text_column: the column that holds the text.
        streaming: read a hub dataset while it downloads; shuffled in a buffer of 10 000 documents.

    Raises:
        FileNotFoundError: no such dataset or split.
        ValueError: no such column.
    """
    path = Path(CORPUS if data == EMBEDDED else data).expanduser()
    plain = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
    local = data.startswith((".", "/", "~")) or path.suffix in (".txt", *READERS)
    if local and not path.exists():
        raise FileNotFoundError(_not_found(data, "no such file or folder"))
    if plain:
        _require_train_split(data, split)
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed))
        return [plain[i].read_text(errors="replace") for i in order.tolist()]

    if path.is_file():
        _require_train_split(data, split)
        if path.suffix not in READERS:
            raise FileNotFoundError(
                f"dataset {data!r}: unknown ending {path.suffix!r}; expected .txt, "
                f"{', '.join(READERS)}"
            )

    import datasets  # heavy, and absent where only kernels are used

    try:
        if path.is_file():
            loaded: Any = datasets.load_dataset(
                READERS[path.suffix], data_files=str(path), split=split, streaming=streaming
            )
        else:
            name, _, configuration = (str(path), "", "") if path.is_dir() else data.partition(":")
            loaded = datasets.load_dataset(
                name, configuration or None, split=split, streaming=streaming
            )
    except OSError as error:  # not there, or the hub cannot be reached
        raise FileNotFoundError(_not_found(data, str(error).splitlines()[0])) from None
    except ValueError as error:
        raise FileNotFoundError(
            f"dataset {data!r}: cannot read split {split!r} ({str(error).splitlines()[0]})"
        ) from None
    columns = loaded.column_names
    if columns is not None and text_column not in columns:
        raise ValueError(
            f"dataset {data!r} has no column {text_column!r} but {', '.join(columns)}; name the "
            f"one that holds the text (--text-column)"
        )
    loaded = loaded.shuffle(seed=seed, buffer_size=10_000) if streaming else loaded.shuffle(seed)
    return _Column(loaded, text_column)


class _Column:
    """One column of a dataset, re-iterable."""

    def __init__(self, dataset: Any, column: str):
        self._dataset = dataset
        self._column = column

    def __iter__(self) -> Iterator[str]:
        return (row[self._column] for row in self._dataset)


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


class TokenRows:
    """Rows of `context_tokens` token ids, packed without padding; re-iterable.

    Each row is BOS and then the next stretch of the documents joined by EOS (a tokenizer without
    BOS uses its EOS, one with neither gets plain stretches). The last, incomplete row is dropped.

    Args:
        texts: documents; iterated anew for each epoch.
        tokenizer: an HF tokenizer.
        context_tokens: T, the length of a row.
        skip, take: leave out the first rows; stop after so many.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        context_tokens: int,
        *,
        skip: int = 0,
        take: int | None = None,
    ):
        if context_tokens < 2:
            raise ValueError(f"context_tokens={context_tokens}, expected at least 2")
        self.texts = texts
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.skip = skip
        self.take = take

    def __iter__(self) -> Iterator[Tensor]:
        stop = None if self.take is None else self.skip + self.take
        return islice(self._pack(), self.skip, stop)

    def _pack(self) -> Iterator[Tensor]:
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
                yield torch.tensor(head + pending[cut : cut + body])
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
        ValueError: too few tokens for either.
    """
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
    input_ids = input_ids.to(lm.device)
    keep = ~lm.is_special(input_ids)
    captured = lm.capture(input_ids, points)
    return [captured[point][keep].float() for point in points]


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


class ActivationBatches:
    """Shuffled activations of several hook points from one pass over the rows; special tokens left
    out; the rows start over when they end.

    Args:
        lm, rows, points: what to run on what, and where to look.
        batch_tokens: N, tokens per batch.
        buffer_tokens: tokens whose activations are held and shuffled together; L·D·4 bytes each.
        model_rows: rows per forward pass.
    """

    def __init__(
        self,
        lm: HookedLM,
        rows: TokenRows,
        points: Sequence[HookPoint],
        *,
        batch_tokens: int,
        buffer_tokens: int,
        model_rows: int = 16,
        seed: int = 0,
    ):
        if buffer_tokens < batch_tokens:
            raise ValueError(
                f"buffer_tokens={buffer_tokens} is below batch_tokens={batch_tokens}; raise it"
            )
        self.lm = lm
        self.rows = rows
        self.points = list(points)
        self.batch_tokens = batch_tokens
        self.buffer_tokens = buffer_tokens
        self.model_rows = model_rows
        self.seed = seed

    def batches(self, start: Position = Position()) -> Iterator[tuple[list[Tensor], Position]]:  # noqa: B008
        position = start
        rows = islice(self.rows, start.row, None)
        while True:
            xs, epoch, row, rows = self._fill(rows, position.epoch, position.row)
            for batch, picked in _shuffled(xs, self.batch_tokens, self.seed, position.fill):
                if batch >= position.batch:
                    yield picked, position._replace(batch=batch + 1)
            position = Position(epoch, row, position.fill + 1)

    def _fill(
        self, rows: Iterator[Tensor], epoch: int, row: int
    ) -> tuple[list[Tensor], int, int, Iterator[Tensor]]:
        """Activations of the next `buffer_tokens` tokens, and where the rows then stand."""
        pieces: list[list[Tensor]] = []
        held = 0
        while held < self.buffer_tokens:
            ids = list(islice(rows, self.model_rows))
            if not ids:
                if row == 0:
                    raise ValueError("activations: the dataset holds no row of tokens; give more")
                epoch, row, rows = epoch + 1, 0, iter(self.rows)
                continue
            row += len(ids)
            pieces.append(capture_tokens(self.lm, torch.stack(ids), self.points))
            held += len(pieces[-1][0])
        return [torch.cat(layer) for layer in zip(*pieces, strict=True)], epoch, row, rows


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
        yield batch, [x[picked] for x in xs]
