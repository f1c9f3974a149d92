"""Passes that share a beginning: one whole pass without changes, and passes that start behind its
first blocks.

A pass that changes nothing before some hook point repeats the clean pass up to there. Such a pass
is started behind a block: that block and all before it return the output that this block had in
the clean pass, and everything around the blocks (masks, rotary embeddings, final norm) runs as
ever. A pass that overwrites the whole stream at a hook point may start there too, whatever else it
changes earlier. Whether a model allows one or the other is not read off its architecture but tried,
on one row of tokens.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.splice import add_function, around_in_this_thread
from resae.models.unembedding import Unembedding, unembedding_of

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference between the ends of two passes taken as equal, relative to the largest
entry."""


@dataclass(frozen=True)
class CleanPass:
    """A whole pass in which nothing was changed."""

    input_ids: Tensor
    """`[B, T]`."""
    streams: list[Tensor]
    """Activations `[B, T, D]` at the hook points, in their order."""
    outputs: Mapping[int, Any]
    """Output of each block behind which passes may start, with all that it returned."""
    final: Tensor
    """`[B, T, D]` that the head reads; whole logits `[B, T, V]` where the head is not known."""


class SharedPasses:
    """Passes of a model that are changed at some of these hook points only.

    Args:
        points: where passes may be changed, in order.
        row: `[1, T]` tokens to try the model on: one clean pass, one per hook point started there,
            and one per later hook point that overwrites it.
    """

    def __init__(self, lm: HookedLM, points: Sequence[HookPoint], row: Tensor):
        self.lm = lm
        self.points = list(points)
        self.unembedding: Unembedding = unembedding_of(lm, row)
        self._blocks = {point: _block_before(point) for point in points}
        clean = self.clean(row)
        self._restarts = {point for point in points if self._restart_agrees(clean, point)}
        self._overwrites = {point for point in points if self._overwrite_agrees(clean, point)}
        if missing := [point.name for point in points if point not in self._restarts]:
            log.warning(
                "model %s: a pass started at %s does not end as the whole pass does, so whole "
                "passes are run",
                lm.name,
                ", ".join(missing),
            )

    def clean(self, input_ids: Tensor) -> CleanPass:
        """One whole pass over `input_ids [B, T]`, without gradient."""
        streams: dict[HookPoint, Tensor] = {}
        outputs: dict[int, Any] = {}

        def keep_output(block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs[block] = output = forward(*args, **kwargs)
            return output

        keep_stream = {p: partial(streams.__setitem__, p) for p in self.points}
        blocks = {block for block in self._blocks.values() if block >= 0}
        with (
            self.lm.replacing(keep_stream),
            _around_blocks(self.lm, {block: partial(keep_output, block) for block in blocks}),
        ):
            final = self.unembedding.final(input_ids)
        return CleanPass(input_ids, [streams[point] for point in self.points], outputs, final)

    def start(self, changed: Sequence[HookPoint], *, overwrites: bool) -> HookPoint | None:
        """The latest hook point at which a pass may start that is changed at these; None: it has to
        be whole.

        Args:
            overwrites: whether it overwrites the activation of every token at the last of them, or
                leaves only tokens alone that read no overwritten one.
        """
        if overwrites and (last := max(changed)) in self._overwrites:
            return last
        first = min(changed)
        return first if first in self._restarts and self._blocks[first] >= 0 else None

    def final(self, clean: CleanPass, start: HookPoint | None) -> Tensor:
        """`CleanPass.final` of a pass with the changes in force now, started at a hook point."""
        if start is None:
            return self.unembedding.final(clean.input_ids)
        with _started_behind(self.lm, self._blocks[start], clean.outputs[self._blocks[start]]):
            return self.unembedding.final(clean.input_ids)

    def _restart_agrees(self, clean: CleanPass, point: HookPoint) -> bool:
        """True if a pass started at `point` without changes ends as the whole pass did."""
        if self._blocks[point] < 0:
            return True
        return _equal(self.final(clean, point), clean.final)

    def _overwrite_agrees(self, clean: CleanPass, point: HookPoint) -> bool:
        """True if nothing is left of changes at earlier points once `point` is overwritten."""
        if point not in self._restarts or self._blocks[point] < 0:
            return False
        streams = dict(zip(self.points, clean.streams, strict=True))
        changes = {p: -stream for p, stream in streams.items() if p < point}
        with self.lm.replacing(changes | {point: streams[point]}):
            return _equal(self.final(clean, None), clean.final)


def _block_before(point: HookPoint) -> int:
    """The last block that is done when a pass reaches `point`; −1: none."""
    return point.layer if point.site == "resid_post" else point.layer - 1


@contextmanager
def _started_behind(lm: HookedLM, block: int, output: Any) -> Generator[None]:
    """Context in which blocks up to `block` return its `output` of an earlier pass, of which only
    the stream is a copy: later blocks may write into it."""

    def replay(_forward: Callable[..., Any], *_: Any, **__: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].clone(), *output[1:])
        return output.clone()

    with _around_blocks(lm, dict.fromkeys(range(block + 1), replay)):
        yield


@contextmanager
def _around_blocks(lm: HookedLM, functions: Mapping[int, Callable[..., Any]]) -> Generator[None]:
    """Context in which `function(forward, *args, **kwargs)` runs in place of each of these blocks,
    in passes of this thread; the hooks at their ends see what it returns."""
    with ExitStack() as stack:
        for block, function in functions.items():
            around = around_in_this_thread(function)
            stack.callback(add_function(lm.blocks, str(block), "around", 0, around))
        yield


def _equal(final: Tensor, expected: Tensor) -> bool:
    if final.shape != expected.shape:
        return False
    difference = (final.double() - expected.double()).abs().max()
    return bool(difference <= TOLERANCE * expected.double().abs().max())
