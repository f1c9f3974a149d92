"""Small HTML tables for notebooks, for `_repr_html_` of codes, stacks and reports. Every text is
escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 8
"""Tokens of a code that are shown."""
MOST_LATENTS = 6
"""Latents of each that are shown."""


def table_html(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a title; floats in four digits."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_shown(value))}</td>' for value in row)}</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{html.escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def code_html(acts: Tensor, indices: Tensor) -> str:
    """The strongest latents of the first tokens of a code `[..., k]`."""
    k = acts.shape[-1]
    flat, latents = acts.detach().reshape(-1, k), indices.reshape(-1, k)
    shown, latents = flat[:MOST_TOKENS].float().cpu(), latents[:MOST_TOKENS].cpu()
    rows: list[Sequence[object]] = []
    for token in range(len(shown)):
        order = shown[token].argsort(descending=True)
        active = order[shown[token, order] > 0]
        pairs = [f"{int(latents[token, i])}: {float(shown[token, i]):.4g}" for i in active]
        more = f" … {len(pairs) - MOST_LATENTS} more" * (len(pairs) > MOST_LATENTS)
        rows.append((token, len(pairs), "  ".join(pairs[:MOST_LATENTS]) + more))
    shape = " × ".join(map(str, acts.shape[:-1])) or "one"
    title = f"sparse code: {shape} tokens, k = {k}, {str(acts.dtype).removeprefix('torch.')}"
    left = f", the first {MOST_TOKENS} tokens" * (len(flat) > MOST_TOKENS)
    return table_html(title + left, ("token", "active", "latent: act"), rows)
