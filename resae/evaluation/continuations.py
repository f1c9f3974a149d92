"""Text that a model writes with layers replaced, against what it writes unchanged.

Prompts are continued greedily, with the KV cache, unchanged and with every selected layer replaced
online. Three questions:

    perplexity   how likely is the text to the unchanged model: exp of its mean cross-entropy there
    agreement    how many tokens are written before the first that the unchanged model does not
    KL           KL(unchanged ‖ replaced) of the next token, at every position of the unchanged
                 model's text, read by both

Greedy text that repeats itself is likely to any model: the share of repeated 4-grams is given too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resae.choices import Loop
from resae.evaluation.intervals import Bootstrap, Quantity
from resae.evaluation.methods import Method, counterpart, known_reference
from resae.evaluation.next_token import next_token_losses
from resae.evaluation.rows import GenerationRow
from resae.evaluation.sums import Sums
from resae.models.hooked import HookedLM
from resae.models.unembedding import Unembedding, unembedding_of
from resae.replacements.context import replacement

NGRAM = 4
"""Tokens that are repeated together."""


@torch.no_grad()
def continuation_rows(
    lm: HookedLM,
    methods: Sequence[Method],
    prompts: Tensor,
    *,
    new_tokens: int,
    reference: str | None = None,
    batch_rows: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> list[GenerationRow]:
    """Continue every prompt with every method in every loop, and measure the text.

    A text does not end at EOS: each has `new_tokens` tokens.

    Args:
        prompts: `[R, P]` token ids, without padding.
        reference: name of the method that differences of KL are taken from; None: the first.
        batch_rows: prompts at a time.
        on_batch: called with the number of prompts done.

    Raises:
        ValueError: no prompts, no new tokens, more of both than the model's context, stacks of
            another model.
    """
    if not len(prompts) or new_tokens < 1:
        raise ValueError(
            f"continuations: {len(prompts)} prompts and new_tokens={new_tokens}, expected at least "
            f"one of each"
        )
    lm.require_context(prompts.shape[1] + new_tokens)
    reference = known_reference(methods, reference)
    for method in methods:
        method.stack.require_model(lm)
    prompts = prompts.to(lm.device)
    unembedding = unembedding_of(lm, prompts[:1])
    runs = [(method, loop, Sums(len(prompts))) for method in methods for loop in method.loops]
    plain = Sums(len(prompts))
    for start in range(0, len(prompts), batch_rows):
        batch = prompts[start : start + batch_rows]
        rows = torch.arange(start, start + len(batch))
        _measure(lm, unembedding, batch, new_tokens, rows, plain, runs)
        if on_batch is not None:
            on_batch(start + len(batch))
    bootstrap = Bootstrap(len(prompts))
    against = {(m.k, loop): sums for m, loop, sums in runs if m.name == reference}
    rows = []
    for method, loop, sums in runs:
        theirs = None if method.name == reference else counterpart(method.k, loop, against)
        shape = (len(prompts), prompts.shape[1], new_tokens)
        named = None if theirs is None else reference
        rows.append(_row(method, loop, bootstrap, shape, plain, sums, theirs, named))
    return rows


def greedy(lm: HookedLM, prompts: Tensor, new_tokens: int) -> Tensor:
    """`[B, new_tokens]`: the most likely tokens after `prompts [B, P]`, one after another."""
    read, cache, written = prompts, None, []
    for _ in range(new_tokens):
        out: Any = lm.model(read, use_cache=True, **{lm.cache_name: cache})
        read, cache = out.logits[:, -1:].argmax(-1), out[lm.cache_name]
        written.append(read)
    return torch.cat(written, 1)


def repeated(text: Tensor) -> Tensor:
    """`[B]`: number of the 4-grams of `text [B, G]` that occurred in it before."""
    grams = text.unfold(1, NGRAM, 1) if text.shape[1] >= NGRAM else text.new_zeros(len(text), 0, 1)
    different = [len(torch.unique(row, dim=0)) if len(row) else 0 for row in grams]
    return torch.tensor([grams.shape[1] - n for n in different])


def _measure(
    lm: HookedLM,
    unembedding: Unembedding,
    prompts: Tensor,
    new_tokens: int,
    rows: Tensor,
    plain: Sums,
    runs: Sequence[tuple[Method, Loop | None, Sums]],
) -> None:
    """Continue `prompts [B, P]`, numbers `rows [B]` of all, in every way, and add to the sums."""
    shape = (len(prompts), new_tokens)

    def finals(text: Tensor) -> Tensor:
        """`[B·G, D]` that the head reads where the tokens of `text [B, G]` are predicted."""
        whole = unembedding.final(torch.cat([prompts, text], 1))
        return whole[:, -new_tokens - 1 : -1].flatten(0, 1)

    def add_text(sums: Sums, text: Tensor, read: Tensor) -> None:
        losses = next_token_losses(unembedding, [read], text.flatten().to(read.device))
        ce = losses.ce[0].view(shape).sum(1)
        sums.add_rows(rows, ce=ce, repeated=repeated(text))

    original = greedy(lm, prompts, new_tokens)
    clean = finals(original)
    add_text(plain, original, clean)
    targets = original.flatten().to(clean.device)
    for method, loop, sums in runs:
        with replacement(lm, method.stack, loop=loop or "open"):
            text = greedy(lm, prompts, new_tokens)
            replaced = finals(original)
        kl = next_token_losses(unembedding, [clean, replaced], targets).kl[1]
        agreed = (text == original).long().cumprod(1).sum(1)
        sums.add_rows(rows, kl=kl.view(shape), agreed=agreed)
        add_text(sums, text, finals(text))


def _row(
    method: Method,
    loop: Loop | None,
    bootstrap: Bootstrap,
    shape: tuple[int, int, int],
    plain: Sums,
    sums: Sums,
    theirs: Sums | None,
    reference: str | None,
) -> GenerationRow:
    prompts, prompt_tokens, new_tokens = shape

    def per_token(of: Sums, name: str, count: int = new_tokens) -> Quantity:
        values = of[name].view(prompts, -1).sum(1)
        return bootstrap.per_token(values, np.full(prompts, max(1, count)))

    kl = per_token(sums, "kl")
    grams = new_tokens - NGRAM + 1
    columns: dict[str, Any] = {}
    quantities: dict[str, Quantity | None] = {
        "perplexity": np.exp(per_token(sums, "ce")),
        "perplexity_plain": np.exp(per_token(plain, "ce")),
        "agreement_tokens": per_token(sums, "agreed", 1),
        "kl": kl,
        "difference": None if theirs is None else kl - per_token(theirs, "kl"),
        "repetition": per_token(sums, "repeated", grams),
        "repetition_plain": per_token(plain, "repeated", grams),
    }
    for name, quantity in quantities.items():
        columns |= bootstrap.columns(name, quantity)
    positions = [
        bootstrap.columns("kl", bootstrap.total(of_position) / bootstrap.total(np.ones(prompts)))
        for of_position in sums["kl"].T
    ]
    if prompts > 1:
        for end in ("low", "high"):
            columns[f"kl_by_position_{end}"] = [of[f"kl_{end}"] for of in positions]
    return GenerationRow(
        method=method.name,
        loop=None if loop is None else str(loop),
        k=method.k,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        kl_by_position=sums["kl"].mean(0).tolist(),
        reference=reference,
        **columns,
    )
