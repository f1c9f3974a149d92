"""Rows of token ids → activations of several hook points, by running the model."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from resae.data.rows import TokenRows
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.sinks import SINK_FACTOR, SinkRule
from resae_kernels.cpu.onednn import OneDNNLinear

MODEL_ROWS = 8
"""Rows per forward pass. With more, on a CPU, an op's output is so large that it goes back to the
system each time and comes anew page by page: 16 rows of 128 tokens took about a tenth longer."""


def capture_tokens(
    lm: HookedLM,
    input_ids: Tensor,
    points: Sequence[HookPoint],
    *,
    sinks: SinkRule | None = None,
) -> list[Tensor]:
    """Activations `[N, D]` in fp32 at each point, of the tokens that are neither special nor, with
    a rule, sinks."""
    xs = [x.float() for x in _captured(lm, input_ids, points)[1]]
    if sinks is None:
        return xs
    kept = ~sinks.anywhere(xs)
    return [x[kept.to(x.device)] for x in xs]


def _captured(
    lm: HookedLM, input_ids: Tensor, points: Sequence[HookPoint]
) -> tuple[list[int], list[Tensor]]:
    """Number of non-special tokens of each row, and their activations in the model's dtype."""
    input_ids = input_ids.to(lm.device)
    keep = ~lm.is_special(input_ids)
    with OneDNNLinear():
        captured = lm.capture(input_ids, points)
    kept = keep.view(-1).nonzero().squeeze(1)
    # A model may be spread over devices: blocks are where their activations are.
    xs = [captured[point].flatten(0, 1) for point in points]
    return keep.sum(1).tolist(), [x.index_select(0, kept.to(x.device)) for x in xs]


RowReader = Callable[[int], tuple[list[int], list[Tensor]]]
"""Called with n: the number of tokens of each of the next n rows (fewer at the end of the data) and
L activations `[tokens, D]` of them, the tokens of a row one after another."""


class RowActivations(Protocol):
    """Activations of rows in their order: from a model, or from disk."""

    def reader(self, row: int) -> RowReader:
        """A reader of one epoch, from this row on."""
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

    def reader(self, row: int) -> RowReader:
        rows = self.rows.from_row(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            ids = list(islice(rows, n))
            return _captured(self.lm, torch.stack(ids), self.points) if ids else ([], [])

        return read


MEDIAN_TOKENS = 4_096
"""Tokens that the median norms are taken of: enough for two digits, where a factor is asked for."""


def measure_sinks(activations: RowActivations, factor: float = SINK_FACTOR) -> SinkRule:
    """The rule of sink tokens with the median norms of the first rows.

    Raises:
        ValueError: there are no rows.
    """
    read, pieces, held = activations.reader(0), [], 0
    while held < MEDIAN_TOKENS and (taken := read(MODEL_ROWS))[0]:
        pieces.append(taken[1])
        held += sum(taken[0])
    xs = [torch.cat(layer) for layer in zip(*pieces, strict=True)]
    return SinkRule.measured(xs, factor)


class WithoutSinks:
    """Activations of rows without their sink tokens, which are found as they are read: a cache
    holds them, and serves every rule."""

    def __init__(self, activations: RowActivations, rule: SinkRule):
        self.activations = activations
        self.rule = rule
        self.left_out = 0
        """Sink tokens met so far, in all epochs."""

    def reader(self, row: int) -> RowReader:
        read_all = self.activations.reader(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            counts, xs = read_all(n)
            if not counts:
                return counts, xs
            sinks = self.rule.anywhere(xs)
            found = int(sinks.sum())
            if not found:
                return counts, xs
            self.left_out += found
            kept = (~sinks).nonzero().squeeze(1)
            counts = [int(k.sum()) for k in (~sinks).split(counts)]
            return counts, [x.index_select(0, kept.to(x.device)) for x in xs]

        return read
