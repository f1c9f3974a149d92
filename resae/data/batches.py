"""Batches of activations `[N, D]` of several hook points, shuffled in a bounded buffer.

Every iteration can be started again at a recorded position and then gives bitwise the same
batches. A position names the epoch, the first row of the buffer in use, and the batch within
it.

W processes share the work by `rank`: process r reads rows r, r+W, r+2W, … (`TokenRows.shard`) and
makes batches of N/W tokens. Batch s of the whole is the batches s of all ranks one after another,
which one process gets from W sources of the same ranks. Every rank is at the same fill and batch at
the same step; the number of rows read differs by a few, so that each rank has its own position.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from resae.data.activations import MODEL_ROWS, ModelActivations, RowActivations, RowReader
from resae.data.rows import TokenRows
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint


class WithRows:
    """Activations from elsewhere, such as a cache, whose rows are read along with them: for what
    `TokenRows.noted` does."""

    def __init__(self, activations: RowActivations, rows: TokenRows):
        self.activations = activations
        self.rows = rows

    def reader(self, row: int) -> RowReader:
        activations, rows = self.activations.reader(row), self.rows.from_row(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            taken = activations(n)
            deque(islice(rows, len(taken[0])), maxlen=0)
            return taken

        return read


class Position(NamedTuple):
    """Position in the activation batches: enough to continue with bitwise the same batches."""

    epoch: int = 0
    row: int = 0
    """First row of the buffer in use."""
    fill: int = 0
    """Number of buffers before this one; seeds the shuffle."""
    batch: int = 0
    """Batches of this buffer already used."""


class ActivationSource(Protocol):
    """Source of training batches: endless, from any recorded position."""

    def batches(self, start: Position) -> Iterator[tuple[list[Tensor], Position]]:
        """L activations `[N, D]`, and the position after them."""
        ...


def sequential(activations: RowActivations, row: int = 0) -> Iterator[list[Tensor]]:
    """L activations `[n, D]` in fp32 of the rows from this one on, pass by pass, for one epoch."""
    read = activations.reader(row)
    while (taken := read(MODEL_ROWS))[0]:
        yield [x.float() for x in taken[1]]


class ActivationBatches:
    """Shuffled activations of several hook points from one pass over the rows; special tokens left
    out; the rows start over when they end.

    Args:
        lm, rows, points: the model, its input rows, and the hook points to capture. With
            `world` > 1 the rows of all ranks: each takes its share.
        batch_tokens: N, tokens per batch, of all ranks together.
        buffer_tokens: tokens whose activations are held and shuffled together, of all ranks
            together.
        buffer_dtype: data type of the buffer; None: that of the model. bfloat16 has the
            range of float32, and a relative error of at most 1/512 per entry.
        total_tokens: total to be read; the last buffer is then no larger than needed.
        model_rows: rows per forward pass.
        device: device of the buffer and the batches; None: the model's.
        rank, world: number of this process and of all that share the work.
        cache: gives the activations of the rows in place of running the model, such as an
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
        cache: RowActivations | None = None,
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
        self.activations = cache or ModelActivations(lm, rows, points)
        self.batch_tokens = batch_tokens // world
        self.batches_per_fill = buffer_tokens // batch_tokens
        self.batches_in_all = None if total_tokens is None else -(-total_tokens // batch_tokens)
        self.context_tokens = rows.context_tokens
        self.buffer_dtype = buffer_dtype
        self.model_rows = model_rows
        self.seed = seed
        self.device = device
        self._first: _Buffer | None = None

    def batches(self, start: Position = Position()) -> Iterator[tuple[list[Tensor], Position]]:  # noqa: B008
        position, read = start, None
        while True:
            if position.fill == 0 and self._first is not None:
                fill, self._first = self._first, None
            else:
                read = read or self.activations.reader(position.row)
                fill = self._refill(read, position)
            _, xs, epoch, row, read = fill
            del fill  # the batches are all that holds on to the buffer
            for batch, picked in _shuffled(xs, self.batch_tokens, self.seed, position.fill):
                if batch >= position.batch:
                    yield [x.float() for x in picked], position._replace(batch=batch + 1)
            del xs  # before the next buffer is filled
            position = Position(epoch, row, position.fill + 1)

    def sequential(self) -> Iterator[list[Tensor]]:
        """L activations `[n, D]` of the first epoch in the order of the rows, for calibration.

        The first buffer comes first. What is read here, up to a buffer beyond the first, is kept
        for `batches`: the model runs on it only once.
        """
        first = self._first or self._refill(self.activations.reader(0), Position())
        tokens, xs, epoch, row, read = first
        ahead: deque[tuple[list[int], list[Tensor]]] = deque()
        self._first = first._replace(read=_with_lookahead(ahead, read))
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

    def _refill(self, read: RowReader, at: Position) -> "_Buffer":
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
        return _Buffer(first_epoch, xs, epoch, row, read)


def _with_lookahead(ahead: deque[tuple[list[int], list[Tensor]]], read: RowReader) -> RowReader:
    """Yield the rows that were read ahead, then those that `read` continues with."""

    def again(n: int) -> tuple[list[int], list[Tensor]]:
        if not ahead:
            return read(n)
        counts, xs = ahead.popleft()
        tokens = sum(counts[:n])
        if n < len(counts):
            ahead.appendleft((counts[n:], [x[tokens:] for x in xs]))
        return counts[:n], [x[:tokens] for x in xs]

    return again


class _Buffer(NamedTuple):
    """A buffer, and the position in the rows after it."""

    tokens: int
    """Rows read in the epoch in which the buffer began."""
    xs: list[Tensor]
    epoch: int
    row: int
    read: RowReader


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


class RowBatches:
    """Batches of token ids `[B, T]`, rows in their order; they start over when they end.

    Args:
        rows: the rows.
        batch_rows: B.
    """

    def __init__(self, rows: TokenRows, batch_rows: int):
        self.rows = rows
        self.batch_rows = batch_rows

    def batches(self, start: Position = Position()) -> Iterator[tuple[list[Tensor], Position]]:  # noqa: B008
        """`[ids]`, and the position after them.

        Raises:
            ValueError: the data holds no row.
        """
        epoch, row = start.epoch, start.row
        reader = self.rows.from_row(row)
        while True:
            batch: list[Tensor] = []
            while len(batch) < self.batch_rows:
                taken = list(islice(reader, self.batch_rows - len(batch)))
                batch += taken
                row += len(taken)
                if len(batch) < self.batch_rows:
                    if row == 0:
                        raise ValueError("rows: the dataset holds no row of tokens; give more")
                    epoch, row = epoch + 1, 0
                    reader = self.rows.from_row(0)
            yield [torch.stack(batch)], Position(epoch, row)


def _shuffled(
    xs: Sequence[Tensor], batch_tokens: int, seed: int, fill: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Full batches of one buffer in an order fixed by `(seed, fill)`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + fill)
    order = torch.randperm(len(xs[0]), generator=generator).to(xs[0].device)
    for batch in range(len(order) // batch_tokens):
        picked = order[batch * batch_tokens : (batch + 1) * batch_tokens]
        yield batch, [x.index_select(0, picked) for x in xs]
