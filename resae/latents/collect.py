"""One pass over a text: what every latent of every selected layer fires on.

Per batch of rows: clean activations, codes of all layers, and from each code `[N, k]` its firings
(`resae.latents.firings`). Special tokens, sinks and, in a stack with a sink rule, the first token
of a row are left out, as replacement leaves them alone.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from resae.choices import Loop
from resae.data.activations import MODEL_ROWS
from resae.latents.firings import Firings
from resae.latents.index import IndexSizes, LatentIndex
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode
from resae_kernels.cpu.onednn import OneDNNLinear

BATCH_ROWS = 64
"""Rows that are indexed at once: with 8, as the model runs them, half of the time goes into tables
of the latents concerned, which are nearly all of them at first."""


@torch.no_grad()
def clean_codes(
    lm: HookedLM, stack: ReSAE, input_ids: Tensor, loop: Loop | str = "open"
) -> tuple[Tensor, list[SparseCode]]:
    """Codes of all layers on clean passes over `input_ids [B, T]`.

    Returns:
        `[N]` int64, the number of each encoded token in the flattened rows, and L codes `[N, k]`;
        on the CPU.
    """
    tokens, codes, first = [], [], 0
    for rows in input_ids.split(MODEL_ROWS):
        kept, found = _codes_of_pass(lm, stack, rows, loop)
        tokens.append(kept.cpu() + first)
        codes.append([SparseCode(acts.float().cpu(), i.cpu()) for acts, i in found])
        first += rows.numel()
    by_layer = zip(*codes, strict=True)
    whole = [SparseCode(*map(torch.cat, zip(*parts, strict=True))) for parts in by_layer]
    return torch.cat(tokens), whole


def _codes_of_pass(
    lm: HookedLM, stack: ReSAE, input_ids: Tensor, loop: Loop | str
) -> tuple[Tensor, list[SparseCode]]:
    """`clean_codes` of one pass, where they are computed."""
    input_ids = input_ids.to(lm.device)
    points = lm.hook_points(stack.hook_points)
    with OneDNNLinear():
        captured = lm.capture(input_ids, points)
    streams = [captured[point] for point in points]
    kept = ~lm.is_special(input_ids)
    if stack.sinks is not None:
        kept &= ~stack.sinks.anywhere(streams).to(kept.device)
        kept[:, 0] = False
    tokens = kept.flatten().nonzero().squeeze(1)
    device = next(stack.parameters()).device
    xs = [x.flatten(0, 1).to(device)[tokens.to(device)].float() for x in streams]
    return tokens, stack.encode(xs, loop=loop)


def collect_latents(
    lm: HookedLM,
    stack: ReSAE,
    batches: Iterable[Tensor],
    *,
    loop: Loop | str = "open",
    sizes: IndexSizes | None = None,
    index: LatentIndex | None = None,
    on_batch: Callable[[LatentIndex], bool] | None = None,
) -> LatentIndex:
    """Index what the latents of all layers fire on, in one pass.

    Args:
        batches: token ids `[B, T]`, T alike in all; for an index that is continued the rows after
            those that it has.
        loop: residuals against predictions from true activations (open) or from reconstructions
            (closed).
        sizes: of a new index.
        index: one to continue; None: a new one.
        on_batch: called with the index after each batch, where it is whole; True ends the pass.

    Raises:
        ValueError: no tokens, a stack of another model, or rows of another length.
    """
    stack.require_model(lm)
    for batch in batches:
        if index is None:
            index = LatentIndex.empty(stack, batch.shape[1], sizes)
        if batch.shape[1] != index.row_tokens:
            raise ValueError(
                f"latents: rows of {batch.shape[1]} tokens after rows of {index.row_tokens}; give "
                f"rows of one length"
            )
        _add(lm, stack, batch, loop, index)
        if on_batch is not None and on_batch(index):
            break
    if index is None or not index.tokens:
        raise ValueError("latents: the text has no tokens to encode; give more text")
    return index


def _add(lm: HookedLM, stack: ReSAE, batch: Tensor, loop: str, index: LatentIndex) -> None:
    tokens, codes = clean_codes(lm, stack, batch, loop)
    first = index.rows_done * index.row_tokens
    for layer, code in zip(index.layers, codes, strict=True):
        firings = Firings.of(code, tokens, block_tokens=batch.numel(), row_tokens=index.row_tokens)
        layer.add(firings, first)
    index.rows.append(batch.int().cpu())
    index.rows_done += len(batch)
    index.tokens += len(tokens)
