"""Texts → rows `[T]` of token ids: BOS, then T−1 tokens of the documents joined by EOS."""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from resae.data.config import Source
from resae.data.texts import load_texts
from resae.models.hooked import HookedLM


class TokenRows:
    """Rows of `context_tokens` token ids, packed without padding; re-iterable.

    Each row is BOS and then the next stretch of the documents joined by EOS (a tokenizer without
    BOS uses its EOS, one with neither gets plain stretches). The last, incomplete row is dropped.

    Args:
        texts: documents; iterated anew for each epoch.
        tokenizer: an HF tokenizer.
        context_tokens: T, the length of a row.
        skip, take: leave out the first rows; stop after this number.
        rank, world: of what is left, rows rank, rank + world, … (see `shard`).
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        context_tokens: int,
        *,
        skip: int = 0,
        take: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if context_tokens < 2:
            raise ValueError(f"context_tokens={context_tokens}, expected at least 2")
        _require_rank(rank, world)
        self.texts = texts
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.skip = skip
        self.take = take
        self.rank = rank
        self.world = world
        self._note: Callable[[list[int]], None] | None = None

    def noted(self, note: Callable[[list[int]], None]) -> "TokenRows":
        """The same rows; `note` is called with the token ids of each that is read."""
        rows = copy(self)
        rows._note = note
        return rows

    def shard(self, rank: int, world: int) -> "TokenRows":
        """The share of one of `world` processes: disjoint, and every row is in one of them.

        Rows are dealt out one by one, and every rank tokenizes all text. Only a streamed dataset
        with nothing skipped or cut is dealt out by documents, which each rank packs by itself: no
        document is downloaded or tokenized twice, and rows are other rows than those of one
        process.
        """
        _require_rank(rank, world)
        if world == 1:
            return self
        if self.world != 1:
            raise ValueError(f"rows of rank {self.rank} of {self.world} are a share already")
        deal = getattr(self.texts, "shard", None)
        share = copy(self)
        if deal is not None and self.skip == 0 and self.take is None:
            share.texts = deal(rank, world)
        else:
            share.rank, share.world = rank, world
        return share

    def __iter__(self) -> Iterator[Tensor]:
        return self.from_row(0)

    def from_row(self, row: int) -> Iterator[Tensor]:
        """The rows from this one on."""
        first = self.skip + self.rank + row * self.world
        stop = None if self.take is None else self.skip + self.take
        for ids in islice(self._pack(), first, stop, self.world):
            if self._note is not None:
                self._note(ids)
            yield torch.tensor(ids)

    def _pack(self) -> Iterator[list[int]]:
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
                yield head + pending[cut : cut + body]
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


def _require_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} of world={world}, expected 0 ≤ rank < world")


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
        ValueError: too few tokens for either, or rows longer than the model's context.
    """
    lm.require_context(context_tokens)
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


def read_rows(source: Source, lm: HookedLM) -> tuple[TokenRows, TokenRows]:
    """Training rows and held-out rows of a source; errors as of `train_and_held_out`."""
    return train_and_held_out(
        source.data,
        lm,
        context_tokens=source.context_tokens,
        held_out_rows=source.held_out_rows,
        text_column=source.text_column,
        streaming=source.streaming,
        seed=source.seed,
    )
