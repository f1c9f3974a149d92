"""Mean activations of documents: of a model's channels, and of the latents of stacks, sparse.

Tokens that are special, or sinks by the rule of any of the stacks, count for nothing. A mean over a
document has at most `tokens · k` entries that are not 0; only these are kept, at 12 bytes each.
While a batch of 8 documents is summed there is one float32 array `[8, M]`, of one layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from resae.choices import Loop
from resae.data.activations import MODEL_ROWS
from resae.evaluation.methods import Method
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode
from resae_kernels.cpu.onednn import OneDNNLinear

BYTES_PER_ENTRY = 12


@dataclass(frozen=True)
class Pooled:
    """Means of `shape[1]` units over each of `shape[0]` documents: the E that are not 0."""

    shape: tuple[int, int]
    documents: Tensor
    """`[E]` int32, document of each entry."""
    units: Tensor
    """`[E]` int32, latent or channel of each entry."""
    values: Tensor
    """`[E]` float32."""

    @classmethod
    def join(cls, parts: Sequence["Pooled"]) -> "Pooled":
        """The units of all parts side by side, for the same documents."""
        first = 0
        units: list[Tensor] = []
        for part in parts:
            units.append(part.units + first)
            first += part.shape[1]
        documents, values = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("documents", "values")
        )
        return cls((parts[0].shape[0], first), documents, torch.cat(units), values)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`[M]` float64: the sum over documents of their means times `weights [n]`."""
        products = self.values.double() * weights.double()[self.documents.long()]
        return torch.zeros(self.shape[1], dtype=torch.float64).index_add_(0, self.units, products)

    def columns(self, units: Tensor) -> Tensor:
        """`[n, S]` float64 of some different units `[S]`."""
        place = torch.full((self.shape[1],), -1)
        place[units] = torch.arange(len(units))
        column = place[self.units.long()]
        held = column >= 0
        found = torch.zeros(self.shape[0], len(units), dtype=torch.float64)
        found[self.documents[held].long(), column[held]] = self.values[held].double()
        return found

    def dense(self) -> Tensor:
        """`[n, M]` float64."""
        return self.columns(torch.arange(self.shape[1]))


class CodeSource(NamedTuple):
    """Codes of one stack in one loop."""

    method: Method
    loop: Loop | None
    """None where there is but one."""

    @property
    def stack(self) -> ReSAE:
        stack = self.method.stack
        assert isinstance(stack, ReSAE)
        return stack

    @property
    def loop_name(self) -> str | None:
        return None if self.loop is None else str(self.loop)


class PooledDocuments(NamedTuple):
    """Means over the same documents."""

    channels: list[Pooled]
    """Per layer, of the residual stream."""
    codes: list[list[Pooled]]
    """Per source and layer, of the latents."""
    active: list[list[float]]
    """Per source and layer, active latents per token."""
    tokens: int
    """Tokens that the means are over."""


class _Sums:
    """Collects the means of one array of units, batch by batch."""

    def __init__(self, width: int):
        self.width = width
        self.active = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, sums: Tensor, documents: Tensor, counts: Tensor) -> None:
        """Add the sums `[B, M]` over the tokens of these documents, `counts [B]` of each."""
        rows, units = sums.nonzero(as_tuple=True)
        values = (sums / counts[:, None])[rows, units]
        self._parts.append((documents[rows.cpu()].int(), units.cpu().int(), values.cpu().float()))

    def add_code(self, code: SparseCode, rows: Tensor, documents: Tensor, counts: Tensor) -> None:
        """Add codes `[N, k]` of tokens of the documents `rows [N]` of a batch."""
        sums = torch.zeros(len(documents) * self.width, device=code.acts.device)
        flat = rows.to(sums.device)[:, None] * self.width + code.indices
        sums.index_add_(0, flat.flatten(), code.acts.float().flatten())
        self.active += int((code.acts > 0).sum())
        self.add(sums.view(len(documents), self.width), documents, counts.to(sums.device))

    def pooled(self, documents: int) -> Pooled:
        return Pooled((documents, self.width), *map(torch.cat, zip(*self._parts, strict=True)))


@torch.no_grad()
def pool_documents(
    lm: HookedLM,
    sources: Sequence[CodeSource],
    ids: Sequence[Sequence[int]],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> PooledDocuments:
    """Run the model once over documents of token ids, and keep the mean of every channel and latent
    over the tokens of each.

    Args:
        sources: stacks of the same layers.
        on_batch: called with the number of documents done.
    """
    names = sources[0].stack.hook_points
    points = lm.hook_points(names)
    rules = [s.stack.sinks for s in sources if s.stack.sinks is not None]
    channels = [_Sums(lm.d_model) for _ in points]
    codes = [[_Sums(s.stack.sae(i).config.d_sae) for i in range(len(points))] for s in sources]
    # Documents of similar length together: little padding. What follows a token does not reach it.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    tokens = 0
    for begin in range(0, len(order), MODEL_ROWS):
        documents = torch.tensor(order[begin : begin + MODEL_ROWS])
        rows = [torch.tensor(ids[i]) for i in documents.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(lm.device)
        with OneDNNLinear():
            captured = lm.capture(padded, points)
        xs = [captured[point].float() for point in points]
        kept = torch.arange(padded.shape[1]) < lengths[:, None]
        kept &= ~lm.is_special(padded).cpu()
        for rule in rules:
            kept &= ~rule.anywhere(xs).cpu()
        counts = kept.sum(1).clamp_min(1)
        row = kept.nonzero()[:, 0]
        tokens += len(row)
        flat = [x[kept.to(x.device)] for x in xs]
        for sums, x in zip(channels, flat, strict=True):
            total = torch.zeros(len(documents), x.shape[1], device=x.device)
            sums.add(total.index_add_(0, row.to(x.device), x), documents, counts.to(x.device))
        for source, of_layers in zip(sources, codes, strict=True):
            for sums, code in zip(
                of_layers, source.stack.encode(flat, loop=source.loop or Loop.OPEN), strict=True
            ):
                sums.add_code(code, row, documents, counts)
        if on_batch is not None:
            on_batch(min(begin + MODEL_ROWS, len(order)))
    return PooledDocuments(
        [sums.pooled(len(ids)) for sums in channels],
        [[sums.pooled(len(ids)) for sums in of_layers] for of_layers in codes],
        [[sums.active / max(1, tokens) for sums in of_layers] for of_layers in codes],
        tokens,
    )


def most_bytes(sources: Sequence[CodeSource], documents: int, context_tokens: int) -> int:
    """Upper bound of the memory that the means of all sources take."""
    entries = 0
    for source in sources:
        for layer in range(source.stack.n_layers):
            config = source.stack.sae(layer).config
            entries += min(config.d_sae, config.k * context_tokens)
    return documents * entries * BYTES_PER_ENTRY
