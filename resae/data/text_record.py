"""Record of the text that a run was trained on and of the rows it held out, by content:
independent of the name of the data, of its order and of how it is cut into rows.

    held_out.safetensors       the token ids of the rows that were held out
    trained_text.safetensors   hashes of the text that was trained on; of W ranks one file each

The text that is trained on is hashed in windows of 16 tokens, one at every token of a row but its
last 15. Of the hashes the 2²⁰ smallest are kept (8 MB): every window of runs up to about a million
tokens, and a random sample of the windows of longer ones, of 5·10⁸ tokens one in 500. A hash is
kept whatever its window's place is, so that other rows of the same text have the same hashes.
Text of other tokenizers is not comparable, nor are rows of less than 17 tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resae.storage import load_tensors, save_tensors

WINDOW = 16
"""Tokens that are hashed together; a power of two. In the embedded corpus 0.9 % of the windows of
64 rows occur again in the 40,000 others, of windows of 8 tokens 10 %."""
KEPT = 1 << 20
"""Most hashes that are kept: the smallest."""
CHANCE = 0.05
"""Share of the windows of unseen text that may occur in the training text all the same: phrases,
licences, what a corpus holds twice."""
ENOUGH = 10
"""Windows that must be comparable to tell new text from text that was trained on."""

_ROWS_AT_ONCE = 256
_MIX = np.uint64(0xD6E8FEB86659FD93)
_BASE = 0x9E3779B97F4A7C15
_ALL = 2**64 - 1


class Overlap(NamedTuple):
    """Share of some text that was trained on."""

    known: int
    """Windows that occur in the training text."""
    compared: int
    """Windows that would have been kept if they did."""

    @property
    def new(self) -> bool | None:
        """True if the text is new, up to chance; None if too little of it can be compared."""
        if self.known > max(1, CHANCE * self.compared):
            return False
        return True if self.compared >= ENOUGH else None


class TrainedText:
    """The hashed windows of the rows that a run was trained on."""

    def __init__(self) -> None:
        self._hashes = np.zeros(0, np.uint64)
        """Sorted, without repeats."""
        self._limit = _ALL
        """Hashes up to here are kept."""
        self._rows: list[Sequence[int]] = []
        self._new: list[np.ndarray] = []

    def add(self, row: Sequence[int]) -> None:
        """Note a row of token ids, each of the same length."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_AT_ONCE:
            self._hash_rows()

    def overlap(self, rows: Tensor) -> Overlap:
        """The windows of rows `[R, T]` that were trained on."""
        self._settle()
        hashes = _windows(rows.numpy())
        hashes = hashes[hashes <= self._limit]
        first, last = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        return Overlap(int((first < last).sum()), len(hashes))

    def include(self, other: "TrainedText") -> None:
        """Note everything that another one did."""
        other._settle()
        self._new.append(other._hashes)
        self._limit = min(self._limit, other._limit)
        self._settle()

    def save(self, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        self._settle()
        limit = np.array([self._limit], np.uint64)
        fixed = {"limit": _signed(limit), "ranks": torch.tensor(ranks)}
        save_tensors(folder / _name(rank, ranks), {"hashes": _signed(self._hashes), **fixed})

    @classmethod
    def load(cls, folder: Path, rank: int | None = None, ranks: int = 1) -> "TrainedText | None":
        """The text of a run, of all ranks or of one; None where it was not recorded."""
        pattern = "trained_text*.safetensors" if rank is None else _name(rank, ranks)
        files = [load_tensors(path, "trained text") for path in sorted(folder.glob(pattern))]
        if not files or (rank is None and len(files) < int(files[0]["ranks"])):
            return None
        whole = cls()
        for tensors in files:
            part = cls()
            part._hashes = tensors["hashes"].numpy().view(np.uint64)
            part._limit = int(tensors["limit"].numpy().view(np.uint64)[0])
            whole.include(part)
        return whole

    def _hash_rows(self) -> None:
        if self._rows:
            hashes = _windows(np.array(self._rows))
            self._new.append(hashes[hashes <= self._limit])
            self._rows = []
        if sum(map(len, self._new)) > KEPT:
            self._settle()

    def _settle(self) -> None:
        """Bring everything noted into `_hashes`."""
        new, self._new = self._new, []
        if self._rows:
            self._hash_rows()
            new += self._new
            self._new = []
        if new:
            hashes = np.sort(np.concatenate([self._hashes, *new]))  # tenfold faster than np.unique
            once = np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]
            self._hashes = hashes[once & (hashes <= self._limit)][:KEPT]
            if len(self._hashes) == KEPT:
                self._limit = int(self._hashes[-1])


def _windows(rows: np.ndarray) -> np.ndarray:
    """Hashes `[R · (T − 16)]` of the windows of rows `[R, T]`, whose first token begins every
    row."""
    hashes = rows[:, 1:].astype(np.uint64) * _MIX + np.uint64(1)
    span, base = 1, _BASE
    while span < WINDOW:  # a polynomial in `_BASE`, by doubling
        hashes = hashes[:, :-span] * np.uint64(base) + hashes[:, span:]
        span, base = 2 * span, base * base & _ALL
    hashes = (hashes ^ hashes >> np.uint64(32)) * _MIX
    return (hashes ^ hashes >> np.uint64(29)).flatten()


def _signed(hashes: np.ndarray) -> Tensor:
    return torch.from_numpy(hashes.view(np.int64))


def _name(rank: int, ranks: int) -> str:
    return f"trained_text{f'.{rank}of{ranks}' if ranks > 1 else ''}.safetensors"


class RunText(NamedTuple):
    """Text record of a run."""

    held_out: Tensor
    """`[R, T]` int64, token ids."""
    trained: TrainedText

    @classmethod
    def load(cls, folder: Path) -> "RunText | None":
        """None where a run has no record: of an earlier version, or a stack alone."""
        trained, path = TrainedText.load(folder), folder / "held_out.safetensors"
        if trained is None or not path.exists():
            return None
        return cls(load_tensors(path, "held-out rows")["rows"].long(), trained)

    def overlap(self, rows: Tensor) -> Overlap | None:
        """Share of rows `[R, T]` that was trained on; held-out rows do not count as trained on.
        None if all rows were held out."""
        kept = set(map(tuple, self.held_out.tolist()))
        others = [row for row in rows.tolist() if tuple(row) not in kept]
        if not others:
            return None
        known = self.trained.overlap(torch.tensor(others)).known
        return Overlap(known, self.trained.overlap(rows).compared)


def save_held_out(folder: Path, rows: Iterable[Tensor], context_tokens: int) -> None:
    """Save rows `[context_tokens]` of token ids, of which there may be none."""
    stacked = torch.stack([torch.zeros(context_tokens, dtype=torch.int64), *rows])[1:]
    save_tensors(folder / "held_out.safetensors", {"rows": stacked.int()})


def held_out_by_all(records: Sequence[RunText]) -> Tensor:
    """The rows `[R, T]` of the first run that the others held out too; all where there are none of
    these."""
    rows = records[0].held_out.tolist()
    for record in records[1:]:
        kept = set(map(tuple, record.held_out.tolist()))
        rows = [row for row in rows if tuple(row) in kept]
    return torch.tensor(rows, dtype=torch.int64) if rows else records[0].held_out


def in_rows_of(rows: Tensor, context_tokens: int, headed: bool) -> Tensor:
    """The text of consecutive rows `[R, T]` in rows of another length.

    Args:
        headed: every row begins with a token that is not of the text (BOS).
    """
    if rows.shape[1] == context_tokens:
        return rows
    head, body = rows[:1, : int(headed)], rows[:, int(headed) :].flatten()
    length = context_tokens - head.shape[1]
    count = len(body) // length
    return torch.cat([head.expand(count, -1), body[: count * length].view(count, length)], 1)
