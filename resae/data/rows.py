"""Documents → rows `[T]` of token ids: BOS, then T−1 tokens of the documents joined by EOS."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae.data.config import Source
from resae.data.texts import Document, load_texts, messages_of
from resae.models.hooked import HookedLM


class TokenRows:
    """Rows of `context_tokens` token ids, packed without padding; re-iterable.

    Each row is BOS and then the next stretch of the documents joined by EOS (a tokenizer without
    BOS uses its EOS, one with neither gets plain stretches). The last, incomplete row is dropped.

    Args:
        texts: documents; iterated anew for each epoch. Conversations go through the tokenizer's
            chat template. Lists of token ids are taken as they are, but for a BOS at their start
            and an EOS at their end, which rows have of their own.
        tokenizer: an HF tokenizer; for lists of token ids `special_tokens` will do.
        context_tokens: T, the length of a row.
        skip, take: leave out the first rows; stop after this number.
        rank, world: of what is left, rows rank, rank + world, … (see `shard`).
        vocab_size: token ids are below it; None: not checked.

    Raises:
        ValueError: a context below 2. While documents are read: token ids outside the vocabulary,
            or a conversation that the chat template does not take.
    """

    def __init__(
        self,
        texts: Iterable[Document],
        tokenizer: Any,
        context_tokens: int,
        *,
        skip: int = 0,
        take: int | None = None,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
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
        self.vocab_size = vocab_size
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
            for ids in self._encode(documents):
                pending += ids + separator
            cut = 0
            while len(pending) - cut >= body:
                yield head + pending[cut : cut + body]
                cut += body
            pending = pending[cut:]

    def _encode(self, documents: Sequence[Document]) -> Iterable[list[int]]:
        """The token ids of documents of one kind."""
        if all(isinstance(document, str) for document in documents):
            if not callable(self.tokenizer):
                raise ValueError(
                    "the model has no tokenizer: save it there too, with "
                    "tokenizer.save_pretrained, or give data with a column of token ids "
                    "(--text-column input_ids)"
                )
            tokenizer: Any = self.tokenizer
            return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        if all(_is_conversation(document) for document in documents):
            return self._encode([self._chat(document) for document in documents])
        return [self._without_ends(ids) for ids in documents]  # type: ignore[arg-type]

    def _chat(self, conversation: Any) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the data holds conversations, and the model's tokenizer has no chat template; "
                "name a column of texts (--text-column), or take a chat model"
            )
        try:
            return self.tokenizer.apply_chat_template(messages_of(conversation), tokenize=False)
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(
                f"the chat template does not take a conversation ({str(error)[:200]}); remove it, "
                f"or write conversations out as text"
            ) from None

    def _without_ends(self, ids: list[int]) -> list[int]:
        if self.vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"token ids from {min(ids)} to {max(ids)} in a document, but the model has "
                f"{self.vocab_size} tokens; they belong to another tokenizer"
            )
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = int(bool(ids) and ids[0] == (eos if bos is None else bos))
        last = len(ids) - int(len(ids) > first and ids[-1] == eos)
        return ids[first:last]

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


class SpecialTokens(NamedTuple):
    """The part of a tokenizer that rows need where documents are token ids already."""

    bos_token_id: int | None
    eos_token_id: int | None


def special_tokens(lm: HookedLM) -> Any:
    """The tokenizer of a model, or the BOS and EOS of its config where it has none."""
    if lm.tokenizer is not None:
        return lm.tokenizer
    ids: list[Any] = [getattr(lm.config, name, None) for name in SpecialTokens._fields]
    bos, eos = ((i or [None])[0] if isinstance(i, list) else i for i in ids)
    return SpecialTokens(bos, eos)


def has_heads(lm: HookedLM) -> bool:
    """True if rows begin with a token that is not part of the text."""
    tokens = special_tokens(lm)
    return (tokens.bos_token_id, tokens.eos_token_id) != (None, None)


def _is_conversation(document: Document) -> bool:
    return isinstance(document, list) and bool(document) and isinstance(document[0], dict)


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
    split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
) -> tuple[TokenRows, TokenRows]:
    """Training rows of a split, and `held_out_rows` rows that training never sees: of the split
    "validation" where the dataset has one that is not trained on, otherwise the first rows of the
    shuffled training split. Options of the data as of `load_texts`.

    Raises:
        ValueError: too few tokens for either, or rows longer than the model's context.
    """
    lm.require_context(context_tokens)
    options: dict[str, Any] = {"text_column": text_column, "streaming": streaming, "seed": seed}
    options |= {"revision": data_revision, "encoding": encoding}
    texts = load_texts(data, split=split, **options)
    of_model: Any = (special_tokens(lm), context_tokens)
    vocab_size = int(lm.config.vocab_size)
    try:
        if split.partition("[")[0] == "validation":
            raise FileNotFoundError
        unseen = load_texts(data, split="validation", **options)
        skip = 0
    except FileNotFoundError:
        unseen, skip = texts, held_out_rows
    held_out = TokenRows(unseen, *of_model, take=held_out_rows, vocab_size=vocab_size)
    held_out.require_rows(held_out_rows, f"held-out rows of {data!r}")
    train = TokenRows(texts, *of_model, skip=skip, vocab_size=vocab_size)
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
        split=source.split,
        data_revision=source.data_revision,
        encoding=source.encoding,
    )


def rows_of_split(source: Source, lm: HookedLM) -> TokenRows:
    """The first `held_out_rows` rows of the split that a source names, whatever others there are;
    errors as of `train_and_held_out`."""
    lm.require_context(source.context_tokens)
    texts = load_texts(
        source.data,
        split=source.split,
        text_column=source.text_column,
        streaming=source.streaming,
        seed=source.seed,
        revision=source.data_revision,
        encoding=source.encoding,
    )
    rows = TokenRows(
        texts,
        special_tokens(lm),
        source.context_tokens,
        take=source.held_out_rows,
        vocab_size=int(lm.config.vocab_size),
    )
    rows.require_rows(source.held_out_rows, f"rows of split {source.split!r} of {source.data!r}")
    return rows
