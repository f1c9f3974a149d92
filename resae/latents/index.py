"""The index of a stack's latents: what each fired on in a text, in memory that the text's length
hardly changes.

    per latent     histogram of acts, sum of acts, its n strongest passages and s random ones
    per token      its id, 4 bytes

    M·L · (4·32 + 4 + 8 + (n + s)·(16 + 2·W)) + 4·tokens bytes       `index_bytes`

`resae.latents.collect` fills it; `save` and `load` keep it in one file, whole or absent.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.evaluation.sums import digest
from resae.latents.firings import Firings
from resae.latents.passages import PARTS, Passages
from resae.stack.stack import ReSAE
from resae.storage import load_tensors, save_tensors
from resae.strict_json import parse, require_fields

BINS = 32
FORMAT_VERSION = 1
RECORD = {
    "format_version": int,
    "layers": [str],
    "d_sae": [int],
    "passages": int,
    "samples": int,
    "window": int,
    "row_tokens": int,
    "rows_done": int,
    "tokens": int,
    "settings": dict,
}


@dataclass(frozen=True)
class IndexSizes:
    """Sizes of an index."""

    passages: int = 8
    """n, strongest passages kept per latent."""
    samples: int = 4
    """s, random passages kept per latent."""
    window: int = 32
    """W, tokens of a passage; at most the tokens of a row."""

    def bytes_per_latent(self) -> int:
        of_passages = Passages.bytes_per_latent(1, self.window)
        return 4 * BINS + 4 + 8 + (self.passages + self.samples) * of_passages


def index_bytes(stack: ReSAE, sizes: IndexSizes, tokens: int) -> int:
    """Bytes that an index of a stack takes in memory and on disk."""
    M = sum(stack.sae(layer).config.d_sae for layer in range(stack.n_layers))
    return M * sizes.bytes_per_latent() + 4 * tokens


def fingerprint(stack: ReSAE) -> str:
    """Hash of all numbers of a stack: an index of other weights under the same name is noticed."""
    names, tensors = zip(*sorted(stack.state_dict().items()), strict=True)
    return digest(names, tensors).hex()[:16]


class Histograms:
    """One histogram of acts per latent: 32 bins from 0 to a power of two above the largest act.

    When an act beyond the range comes, the range is doubled and pairs of bins become one: the
    result is the same in whatever order acts come.
    """

    def __init__(self, M: int):
        self.counts = torch.zeros(M, BINS, dtype=torch.int32)
        """`[M, 32]`"""
        self.exponents = torch.full((M,), -126, dtype=torch.int32)
        """`[M]`; the range is 0 to 2^exponent."""

    def add(self, latents: Tensor, values: Tensor) -> None:
        """Add acts `[F]` > 0 of `latents [F]`, ascending."""
        touched, which = latents.unique_consecutive(return_inverse=True)
        largest = values.new_zeros(len(touched)).scatter_reduce_(0, which, values, "amax")
        self._widen(touched, torch.frexp(largest).exponent)
        bins = torch.ldexp(values, -self.exponents[latents]).mul_(BINS).long().clamp_(0, BINS - 1)
        ones = torch.ones_like(bins, dtype=torch.int32)
        self.counts.view(-1).scatter_add_(0, latents * BINS + bins, ones)

    def _widen(self, latents: Tensor, exponents: Tensor) -> None:
        steps = exponents - self.exponents[latents]
        latents, steps = latents[steps > 0], steps[steps > 0]
        if len(latents):
            target = torch.arange(BINS).expand(len(latents), BINS) >> steps.clamp(max=5)[:, None]
            before = self.counts[latents]
            self.counts[latents] = torch.zeros_like(before).scatter_add_(1, target, before)
            self.exponents[latents] += steps

    def edges(self, latent: int) -> list[float]:
        """Bounds of the bins of one latent, 33."""
        width = 2.0 ** int(self.exponents[latent]) / BINS
        return [width * i for i in range(BINS + 1)]


class LayerIndex:
    """Firings of the latents of one layer.

    Attributes:
        histograms: of acts.
        sums: `[M]` float64, sum of acts.
        strongest, sampled: passages of highest act, and random ones.
    """

    def __init__(self, M: int, sizes: IndexSizes):
        self.histograms = Histograms(M)
        self.sums = torch.zeros(M, dtype=torch.float64)
        self.strongest = Passages(M, sizes.passages, sizes.window)
        self.sampled = Passages(M, sizes.samples, sizes.window)

    def add(self, firings: Firings, first_token: int) -> None:
        """Add the firings of a block that begins at token `first_token` of the text."""
        if not len(firings.keys):
            return
        latents = firings.latents
        self.histograms.add(latents, firings.values)
        self.sums.scatter_add_(0, latents, firings.values.double())
        peaks = firings.peaks()
        self.strongest.offer(peaks, peaks.values, firings, first_token)
        rows = (peaks.tokens + first_token) // firings.row_tokens
        self.sampled.offer(peaks, _chances(peaks.latents, rows), firings, first_token)

    @property
    def firings(self) -> Tensor:
        """`[M]` int64: tokens at which each latent fired."""
        return self.histograms.counts.sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name: the very tensors."""
        found = {"counts": self.histograms.counts, "exponents": self.histograms.exponents}
        found["sums"] = self.sums
        for name, passages in (("strongest", self.strongest), ("sampled", self.sampled)):
            found |= {f"{name}.{part}": getattr(passages, part) for part in PARTS}
        return found


@dataclass
class LatentIndex:
    """Firings of the latents of all selected layers on one text."""

    layer_names: list[str]
    """Hook points of the stack."""
    layers: list[LayerIndex]
    sizes: IndexSizes
    row_tokens: int
    """T, tokens of a row."""
    rows: list[Tensor] = field(default_factory=list[Tensor])
    """Token ids read so far, blocks `[B, T]` int32."""
    rows_done: int = 0
    tokens: int = 0
    """Tokens encoded so far: those that are neither special nor sinks."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Text and how it was read (JSON)."""

    @classmethod
    def empty(
        cls,
        stack: ReSAE,
        row_tokens: int,
        sizes: IndexSizes | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "LatentIndex":
        """An index of nothing yet.

        Raises:
            ValueError: a window that is longer than a row.
        """
        sizes = sizes or IndexSizes()
        if not 1 <= sizes.window <= row_tokens:
            raise ValueError(
                f"latents: window={sizes.window} tokens, expected 1 to the {row_tokens} of a row"
            )
        M = [stack.sae(layer).config.d_sae for layer in range(stack.n_layers)]
        layers = [LayerIndex(M_l, sizes) for M_l in M]
        return cls(stack.hook_points, layers, sizes, row_tokens, settings=dict(settings or {}))

    def token_ids(self) -> Tensor:
        """`[R, T]` int32, the rows read so far."""
        if len(self.rows) != 1:
            none = torch.zeros(0, self.row_tokens, dtype=torch.int32)
            self.rows = [torch.cat(self.rows) if self.rows else none]
        return self.rows[0]

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        record = {
            "format_version": FORMAT_VERSION,
            "layers": self.layer_names,
            "d_sae": [len(layer.sums) for layer in self.layers],
            "passages": self.sizes.passages,
            "samples": self.sizes.samples,
            "window": self.sizes.window,
            "row_tokens": self.row_tokens,
            "rows_done": self.rows_done,
            "tokens": self.tokens,
            "settings": self.settings,
        }
        text = json.dumps(record).encode()
        tensors = {"record": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        tensors["rows"] = self.token_ids()
        for number, layer in enumerate(self.layers):
            tensors |= {f"{number}.{name}": tensor for name, tensor in layer.tensors().items()}
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> "LatentIndex":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged or of another version.
        """
        tensors = load_tensors(path, "latents")
        record = _record(tensors, path)
        sizes = IndexSizes(record["passages"], record["samples"], record["window"])
        for number, M in enumerate(record["d_sae"]):  # held against the file before memory is taken
            for name, n in (("strongest", sizes.passages), ("sampled", sizes.samples)):
                _taken(tensors, f"{number}.{name}.shares", (M, n, sizes.window), path)
        layers = [LayerIndex(M, sizes) for M in record["d_sae"]]
        index = cls(record["layers"], layers, sizes, record["row_tokens"])
        index.rows = [_taken(tensors, "rows", (record["rows_done"], index.row_tokens), path)]
        index.rows_done, index.tokens = record["rows_done"], record["tokens"]
        index.settings = record["settings"]
        for number, layer in enumerate(layers):
            for name, tensor in layer.tensors().items():
                tensor.copy_(_taken(tensors, f"{number}.{name}", tensor.shape, path))
            for passages in (layer.strongest, layer.sampled):
                _require_places(passages.places, index.rows[0].numel(), path)
        return index


def _chances(latents: Tensor, rows: Tensor) -> Tensor:
    """`[P]` float32 from 0 to 1, as good as random, that follow from latent and row alone: the
    samples do not depend on the batches that text comes in (the finaliser of SplitMix64)."""
    x = latents * 0x5851F42D4C957F2D + rows * 0x14057B7EF767814F
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 39) & 0xFFFFFF).float() / (1 << 24)


def _record(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    where = f"latents: {path}"
    if "record" not in tensors or tensors["record"].dtype != torch.uint8:
        raise ValueError(f"{where} is no index of latents; remove it, and it is made anew")
    text = bytes(tensors["record"].tolist()).decode(errors="replace")
    record = require_fields(parse(text, where), RECORD, where)
    if record["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {record['format_version']}, expected {FORMAT_VERSION}; "
            f"remove it, and it is made anew"
        )
    counts = ("passages", "window", "row_tokens", "rows_done", "tokens")
    if min(record[name] for name in counts) < 1 or record["samples"] < 0:
        raise ValueError(f"{where} holds no passages; remove it, and it is made anew")
    return record


def _require_places(places: Tensor, tokens: int, path: Path) -> None:
    if places.numel() and not -1 <= int(places.min()) <= int(places.max()) < tokens:
        raise ValueError(
            f"latents: {path}: passages beyond the {tokens:,} tokens that it holds; remove the "
            f"file, and it is made anew"
        )


def _taken(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], path: Path) -> Tensor:
    found = tensors.get(name)
    if found is None or list(found.shape) != list(shape):
        got = "no tensor" if found is None else f"shape {list(found.shape)}"
        raise ValueError(
            f"latents: {path}: {name}: {got}, expected {list(shape)}; remove the file, and it is "
            f"made anew"
        )
    return found
