"""Ways of running a model, and their next-token losses beside those of the unchanged model.

Passes start at the first layer that they change, and at the last one where that overwrites the
others (`resae.models.restart`). Logits are made and compared in blocks of the vocabulary
(`resae.evaluation.next_token`); what the head reads is kept of every pass over one batch.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resae.choices import Loop, Mode
from resae.evaluation.next_token import next_token_losses
from resae.evaluation.sums import Sums, per_row
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.restart import CleanPass, SharedPasses
from resae.models.sinks import SinkRule
from resae.replacements.context import Replacement, replacement
from resae.stack.stack import AffineOnly, ReSAE


@dataclass(frozen=True)
class Replaced:
    """A way of running the model: layers replaced by a stack."""

    stack: ReSAE | AffineOnly
    mode: Mode
    loop: Loop | None
    layers: tuple[str, ...]
    sums: Sums

    @property
    def overwrites(self) -> bool:
        """Does the replacement of the last layer overwrite all earlier ones?"""
        return self.mode == Mode.TEACHER_FORCED

    def active(
        self, lm: HookedLM, clean: CleanPass, left_alone: Tensor
    ) -> AbstractContextManager[Replacement]:
        del left_alone  # the stack's own rule
        options: dict[str, Any] = {"mode": self.mode, "loop": self.loop or "open"}
        if self.mode != Mode.ONLINE:
            options["clean"] = clean.streams
        return replacement(lm, self.stack, layers=self.layers, **options)


@dataclass(frozen=True)
class Ablated:
    """A way of running the model: constants at the tokens of layers that are not left alone."""

    constants: Mapping[HookPoint, Tensor]
    """`[D]` per layer."""
    layers: tuple[str, ...]
    sums: Sums
    overwrites: bool = True

    def active(
        self, lm: HookedLM, clean: CleanPass, left_alone: Tensor
    ) -> AbstractContextManager[None]:
        del clean
        return lm.replacing(
            {point: _put_constant(value, left_alone) for point, value in self.constants.items()}
        )


class Passes:
    """Measures ways of running a model on batches, and the model as it is.

    Args:
        documents: `[R]` number of the document of every row.
        clean: where the losses of the unchanged model are summed.
    """

    def __init__(
        self, shared: SharedPasses, rules: Sequence[SinkRule], documents: Tensor, clean: Sums
    ):
        self._shared = shared
        self._rules = rules
        self._documents = documents
        self.clean = clean

    def measure(self, batch: Tensor, rows: Tensor, runs: Sequence[Replaced | Ablated]) -> CleanPass:
        """Run the token rows `batch [B, T]`, numbers `rows [B]` of the evaluation, unchanged and in
        every way, and add the losses to `sums`."""
        lm, unembedding = self._shared.lm, self._shared.unembedding
        special = lm.is_special(batch)
        counted = ~special[:, :-1]
        clean = self._shared.clean(batch)
        sinks = [sinks_of([rule], clean.streams, special) for rule in self._rules]
        masks = [special, *(special | found for found in sinks)]
        left_alone = torch.stack(masks).any(0)
        # One that is left alone behind replaced ones keeps what it read of them. A stack leaves
        # alone by its own rule or, without one, only special tokens.
        overwritten = not any(_left_alone_inside(mask).any() for mask in (*masks, left_alone))
        targets = batch[:, 1:][counted]
        documents, positions = self._documents[rows.cpu()], counted.sum(1).tolist()

        def add(sums: Sums, ce: Tensor, kl: Tensor) -> None:
            of_rows = {"ce": per_row(ce, positions), "kl": per_row(kl, positions)}
            sums.add_rows(documents, **of_rows, tokens=positions)

        def final(run: Replaced | Ablated) -> Tensor:
            overwrites = run.overwrites and overwritten
            start = self._shared.start(lm.hook_points(run.layers), overwrites=overwrites)
            with run.active(lm, clean, left_alone) as active:
                ended = _at(counted, self._shared.final(clean, start))
            if active is not None:
                run.sums.add("sinks", torch.tensor(max(count.sinks for count in active.counts)))
            return ended

        unchanged = _at(counted, clean.final)
        targets = targets.to(unchanged.device)
        at_once = len(runs) if unembedding.path is not None else 1  # whole logits: one pass's
        for i in range(0, len(runs), at_once):
            now = runs[i : i + at_once]
            losses = next_token_losses(unembedding, [unchanged, *map(final, now)], targets)
            if i == 0:
                add(self.clean, losses.ce[0], losses.kl[0])
            for run, ce, kl in zip(now, losses.ce[1:], losses.kl[1:], strict=True):
                add(run.sums, ce, kl)
        return clean


def alike(lm: HookedLM, batch: Tensor) -> Generator[Tensor]:
    """Numbers of the rows of a batch without special tokens behind others, and of those with such;
    either of them only if there are any."""
    inside = _left_alone_inside(lm.is_special(batch))
    for chosen in (~inside, inside):
        rows = chosen.nonzero().squeeze(1)
        if len(rows):
            yield rows


def sinks_of(rules: Sequence[SinkRule], xs: Sequence[Tensor], special: Tensor) -> Tensor:
    """`[B, T]` bool: sinks by any of the rules, from streams `[B, T, D]`; special tokens are
    none."""
    found = torch.zeros_like(special)
    for rule in rules:
        found |= rule.anywhere(xs).to(found.device)
    return found & ~special


def _at(counted: Tensor, final: Tensor) -> Tensor:
    """`[n, D]` of `final [B, T, D]` at the evaluated positions `counted [B, T−1]`."""
    return final[:, :-1][counted.to(final.device)]


def _left_alone_inside(left_alone: Tensor) -> Tensor:
    """`[B]` bool of `left_alone [B, T]`: is there such a token behind one that is replaced?"""
    return (left_alone[:, 1:] & ~left_alone[:, :-1]).any(1)


def _put_constant(value: Tensor, special: Tensor) -> Callable[[Tensor], Tensor]:
    keep = special.unsqueeze(-1)
    return lambda stream: torch.where(keep, stream, value.to(stream))
