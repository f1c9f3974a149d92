"""Streaming sums in float64, per document, and the file that they are kept in meanwhile.

An evaluation of any length holds one number per quantity and document: a document is a row of
tokens, or neighbouring rows of one text. Whatever is summed lies in one dictionary of tensors, so
that an interrupted evaluation goes on from its file to the same bits.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from resae.storage import load_tensors, save_tensors

MOST_DOCUMENTS = 512
"""Neighbouring documents are drawn as one where there are more: this bounds what is held."""
FEWEST_DOCUMENTS = 16
"""Fewest documents that intervals are made of: of fewer, rows are drawn instead."""


class Sums:
    """Named sums; those of documents are `[documents]` or `[documents, D]`, in float64."""

    def __init__(self, documents: int):
        self.documents = documents
        self.columns: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor of any shape to the sum of this name."""
        value = value.detach().cpu()
        self.columns[name] = self.columns[name] + value if name in self.columns else value

    def add_rows(self, documents: Tensor, **rows: Tensor | Sequence[int]) -> None:
        """Add to the documents `documents [B]` (on the CPU) a number or a vector of each of B
        rows."""
        for name, values in rows.items():
            of_rows = torch.as_tensor(values).to("cpu", torch.float64)
            column = self.columns.get(name)
            if column is None:
                shape = (self.documents, *of_rows.shape[1:])
                column = self.columns[name] = torch.zeros(shape, dtype=torch.float64)
            column.index_add_(0, documents, of_rows)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def total(self, name: str) -> float:
        """Sum over all documents; 0 where nothing was added."""
        return float(self.columns[name].sum()) if name in self.columns else 0.0


def per_row(values: Tensor, tokens: Sequence[int]) -> Tensor:
    """`[B, …]` float64: sums over the tokens of each row, of `values [N, …]` of all rows one after
    another.

    Added up row by row: a scatter on a GPU would add in another order each time."""
    return torch.stack([part.sum(0) for part in values.double().split(list(tokens))])


def number_documents(
    rows: Iterable[Tensor], documents: Sequence[int] | None
) -> tuple[Tensor, bool]:
    """`[R]` int64: the document of every row, counted from 0; and whether they are documents of
    the text, or rows.

    Args:
        rows: per batch `[B, T]` bool, which tokens separate documents (the first of a row does
            not).
        documents: a number for every row, the same for neighbouring rows of one document; None:
            rows that begin in the same document are told by the separators, and where that gives
            fewer than `FEWEST_DOCUMENTS`, every row counts as one.

    Raises:
        ValueError: another number of documents than of rows.
    """
    separators = torch.cat([part[:, 1:].sum(1).cpu() for part in rows])
    if documents is None:
        begins_in = separators.cumsum(0) - separators
        numbers = torch.unique_consecutive(begins_in, return_inverse=True)[1]
        told = int(numbers[-1]) + 1 >= FEWEST_DOCUMENTS
        numbers = numbers if told else torch.arange(len(separators))
    elif len(documents) != len(separators):
        raise ValueError(
            f"evaluate: {len(documents)} documents for {len(separators)} rows; give the number of "
            f"the document of every row"
        )
    else:
        numbers = torch.unique_consecutive(torch.tensor(documents), return_inverse=True)[1]
        told = True
    count = int(numbers[-1]) + 1
    return (numbers * MOST_DOCUMENTS // count if count > MOST_DOCUMENTS else numbers), told


class Checkpoint:
    """The sums of an evaluation on disk, from which the same evaluation goes on.

    Args:
        path: the file; None: nothing is kept.
        sums: all sums, by a name.
        identity: what the evaluation is made of; sums of another one are not continued.
        seconds: time between two writes; 0: after every batch.
    """

    def __init__(
        self,
        path: Path | None,
        sums: Mapping[str, Sums],
        identity: Callable[[], bytes],
        seconds: float,
    ):
        self._path = path
        self._sums = sums
        self._seconds = seconds
        self._written = time.monotonic()
        self._identity = b"" if path is None else identity()
        self.done: dict[str, int] = {}
        """Phase → batches that are in the sums."""
        self.is_of_another = False
        """True if there is a file of another evaluation, which the first write replaces."""
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            found = load_tensors(path, "interrupted evaluation", finite=False)
        except ValueError as error:
            raise ValueError(f"{error}; or remove it, to begin anew") from None
        identity = found.pop("identity", torch.zeros(0, dtype=torch.uint8))
        self.is_of_another = bytes(identity.tolist()) != self._identity
        if self.is_of_another:
            return
        for name, tensor in found.items():
            part, _, column = name.partition("/")
            if part == "done":
                self.done[column] = int(tensor)
            else:
                self._sums[part].columns[column] = tensor

    def after_batch(self, phase: str, done: int, *, last: bool) -> None:
        """Note that `done` batches of a phase are in the sums; write them if it is time to, or if
        this was the last."""
        self.done[phase] = done
        if self._path is None or not (last or self._is_time()):
            return
        tensors = {
            f"{part}/{column}": tensor
            for part, sums in self._sums.items()
            for column, tensor in sums.columns.items()
        }
        tensors |= {f"done/{phase}": torch.tensor(n) for phase, n in self.done.items()}
        tensors["identity"] = torch.tensor(list(self._identity), dtype=torch.uint8)
        save_tensors(self._path, tensors)
        self._written = time.monotonic()

    def _is_time(self) -> bool:
        return time.monotonic() - self._written >= self._seconds

    def remove(self) -> None:
        """Remove the file: the evaluation is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def digest(texts: Iterable[str], tensors: Iterable[Tensor]) -> bytes:
    """SHA-256 of texts, and of tensors with their shapes and dtypes."""
    found = sha256()
    for text in texts:
        found.update(text.encode() + b"\0")
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{list(plain.shape)} {plain.dtype}\0".encode())
        found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.digest()
