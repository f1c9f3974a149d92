"""Activations of several hook points on disk: written once, read in place of running the model.

    cache.json             what they are of: model, weights, text, layers, dtype; the shards there
    shard_00000.safetensors  rows 0 … R−1: per hook point `[tokens, D]`, and the tokens of each row

A shard is written whole when its first row is asked for and it is not there; so a run that was
interrupted goes on where it stopped, one with more tokens adds to what there is, and a second run
of the same settings never runs the model. Reading maps the file and takes the rows asked for.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resae.choices import DTYPES
from resae.data.activations import MODEL_ROWS, ModelActivations, RowReader
from resae.models.hooked import HookedLM
from resae.models.identity import ModelIdentity
from resae.storage import load_json, save_json, save_tensors

log = logging.getLogger(__name__)

SHARD_TOKENS = 16_384
"""Approximate number of tokens per file: 0.5 GB with four layers of width 2048 in float32."""
FORMAT_VERSION = 1
ROWS = "tokens_per_row"
"""Name of the tensor `[rows]` int32 in a shard."""


class ActivationCache:
    """The activations of `activations` in `folder`; an `ActivationBatches(cache=…)` reads them.

    Args:
        folder: of this cache alone; made when something is written.
        activations: what is stored: a model, its rows (of one rank), the hook points.
        data: further settings that the rows depend on, such as the name of the dataset.
        dtype: `float32`, `bfloat16` or `float16`; None: that of the model, which loses nothing.
            bfloat16 halves the disk of a float32 model and keeps 8 bits of each number, a relative
            error of at most 2⁻⁹.

    Raises:
        ValueError: the folder holds something else, or activations of other settings: the message
            says which.
    """

    def __init__(
        self,
        folder: str | Path,
        activations: ModelActivations,
        *,
        data: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ):
        self.folder = Path(folder)
        self.activations = activations
        lm, rows = activations.lm, activations.rows
        model_dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
        if (dtype or model_dtype) not in DTYPES:
            raise ValueError(
                f"ActivationCache: unknown dtype {dtype or model_dtype!r}; choose one of "
                f"{', '.join(DTYPES)}"
            )
        self.dtype: torch.dtype = getattr(torch, dtype or model_dtype)
        self._rows_per_shard = MODEL_ROWS * max(
            1, SHARD_TOKENS // (MODEL_ROWS * rows.context_tokens)
        )
        first_rows = [row.tolist() for row in islice(rows.from_row(0), MODEL_ROWS)]
        self._index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **{f"model {name}": value for name, value in asdict(ModelIdentity.of(lm)).items()},
            "model dtype": model_dtype,
            "model weights": _fingerprint(lm),
            **dict(data or {}),
            "context_tokens": rows.context_tokens,
            "rows skipped": rows.skip,
            "rows at most": rows.take,
            "rank": rows.rank,
            "world": rows.world,
            "first rows": hashlib.sha256(json.dumps(first_rows).encode()).hexdigest()[:16],
            "layers": [point.name for point in activations.points],
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows_per_shard": self._rows_per_shard,
        }
        self._settings = list(self._index)
        self._index |= {"rows_in_all": None, "shards": {}}
        self._open: tuple[int, _Shard] | None = None
        self._model: tuple[int, RowReader] | None = None
        self._find()

    @property
    def stored_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self._index["shards"].values())

    def bytes_for(self, tokens: int) -> int:
        """Bytes on disk of this number of tokens."""
        lm = self.activations.lm
        return tokens * len(self.activations.points) * lm.d_model * self.dtype.itemsize

    def require_disk(self, tokens: int) -> None:
        """Raise ValueError unless the disk has room for this number of new tokens."""
        missing = self.bytes_for(tokens)
        there = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents)
                     if p.exists())  # fmt: skip
        free = shutil.disk_usage(there).free
        if missing > free:
            raise ValueError(
                f"activation cache {self.folder}: {missing / 1e9:.1f} GB are to be written, and "
                f"{free / 1e9:.1f} GB are free; choose another folder, fewer layers or tokens, or "
                f"--cache-dtype bfloat16"
            )

    def reader(self, row: int) -> RowReader:
        """A reader from this row on (`RowActivations`)."""
        at = row

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            nonlocal at
            counts: list[int] = []
            pieces: list[list[Tensor]] = []
            while len(counts) < n:
                number, first = divmod(at, self._rows_per_shard)
                shard = self._shard(number)
                if shard is None or first >= len(shard.counts):
                    break
                taken, xs = shard.read(first, n - len(counts))
                counts += taken
                pieces.append(xs)
                at += len(taken)
            return counts, [torch.cat(layer) for layer in zip(*pieces, strict=True)]

        return read

    # -- files -------------------------------------------------------------------------------------

    def _find(self) -> None:
        """Take up what the folder holds, if it is of the same settings."""
        path = self.folder / "cache.json"
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"activation cache: {self.folder} exists and holds no cache.json; choose an "
                    f"empty or new folder"
                )
            return
        found = load_json(path, "activation cache")
        differing = [name for name in self._settings if found.get(name) != self._index[name]]
        if differing:
            says = "; ".join(
                f"{name}: {found.get(name)}, here {self._index[name]}" for name in differing
            )
            raise ValueError(
                f"activation cache {self.folder} is of other activations ({says}); use the same "
                f"settings, or another folder"
            )
        self._index |= {"rows_in_all": found["rows_in_all"], "shards": found["shards"]}
        for left_over in self.folder.glob(".shard_*"):
            left_over.unlink()
        for name, shard in list(self._index["shards"].items()):
            file = self.folder / name
            size = file.stat().st_size if file.exists() else 0
            if size != shard["bytes"]:
                self._forget(name, f"has {size:,} of {shard['bytes']:,} bytes")

    def _forget(self, name: str, reason: str) -> None:
        log.warning("activation cache: %s %s; it is written again", self.folder / name, reason)
        del self._index["shards"][name]

    def _shard(self, number: int) -> "_Shard | None":
        """The open shard; None beyond the end of the data."""
        if self._open is not None and self._open[0] == number:
            return self._open[1]
        self._open = None
        in_all = self._index["rows_in_all"]
        if in_all is not None and number * self._rows_per_shard >= in_all:
            return None
        name = f"shard_{number:05d}.safetensors"
        names = [point.name for point in self.activations.points]
        if name in self._index["shards"]:
            try:
                self._open = (number, _Shard(self.folder / name, names))
            except SafetensorError as error:
                self._forget(name, f"is damaged ({error})")
        if name not in self._index["shards"]:
            if not self._write(number, name):
                return None
            self._open = (number, _Shard(self.folder / name, names))
        assert self._open is not None
        return self._open[1]

    def _write(self, number: int, name: str) -> bool:
        """Run the model on the rows of one shard; False if there are none."""
        row = number * self._rows_per_shard
        if self._model is None or self._model[0] != row:
            self._model = (row, self.activations.reader(row))
        read = self._model[1]
        counts: list[int] = []
        pieces: list[list[Tensor]] = []
        while len(counts) < self._rows_per_shard:
            taken, xs = read(min(MODEL_ROWS, self._rows_per_shard - len(counts)))
            if not taken:
                break
            counts += taken
            pieces.append([x.to("cpu", self.dtype) for x in xs])
        self._model = (row + len(counts), read)
        if len(counts) < self._rows_per_shard:
            self._index["rows_in_all"] = row + len(counts)
        if counts:
            tensors = {
                point.name: torch.cat(layer)
                for point, layer in zip(
                    self.activations.points, zip(*pieces, strict=True), strict=True
                )
            }
            tensors[ROWS] = torch.tensor(counts, dtype=torch.int32)
            save_tensors(self.folder / name, tensors)
            self._index["shards"][name] = {
                "rows": len(counts),
                "tokens": sum(counts),
                "bytes": (self.folder / name).stat().st_size,
            }
        save_json(self.folder / "cache.json", self._index)
        return bool(counts)


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path, names: list[str]):
        file: Any = safe_open(path, framework="pt")
        self.counts: list[int] = file.get_tensor(ROWS).tolist()
        self._starts = [0, *accumulate(self.counts)]
        self._slices = [file.get_slice(name) for name in names]

    def read(self, first: int, n: int) -> tuple[list[int], list[Tensor]]:
        """At most n rows from this one on."""
        last = min(first + n, len(self.counts))
        tokens = slice(self._starts[first], self._starts[last])
        return self.counts[first:last], [piece[tokens] for piece in self._slices]


def _fingerprint(lm: HookedLM) -> str:
    """Hash of some numbers from every parameter: other weights under the same name are noticed."""
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].double().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
