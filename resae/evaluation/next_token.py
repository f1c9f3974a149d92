"""Cross-entropy and KL of next tokens, block by block of the vocabulary.

    CE        = log Σ_v exp b_v − b_target
    KL(a ‖ b) = Σ_v p_v (a_v − b_v) − log Σ_v exp a_v + log Σ_v exp b_v

of logits `a` (clean) and `b` (replaced), p = softmax(a). The sums run over blocks of the vocabulary
whose logits are made from what the head reads and dropped again: at no time is there more of them
than `most_logits` of one pass, one of the clean pass and two intermediate results of that size.
Sums over blocks are in float64.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resae.models.unembedding import Unembedding

MOST_ROWS = 1024
MOST_LOGITS = {"cpu": 2**20}
"""Entries of a block of logits, by kind of device: on a CPU what its caches hold."""
MOST_LOGITS_ELSEWHERE = 2**26


class NextTokenLosses(NamedTuple):
    """Nats of P passes at n positions, float64; the first pass is the clean one."""

    ce: Tensor
    """`[P, n]` −log p(next token)."""
    kl: Tensor
    """`[P, n]` KL(clean ‖ pass) of the distributions of the next token."""


@torch.no_grad()
def next_token_losses(
    unembedding: Unembedding,
    finals: Sequence[Tensor],
    targets: Tensor,
    *,
    most_logits: int | None = None,
) -> NextTokenLosses:
    """Losses of P passes at the same n positions.

    Args:
        finals: P of `[n, D]`, what the head reads (`Unembedding.final`); first the clean pass.
        targets: `[n]` ids of the next tokens.
        most_logits: entries of a block; None: `MOST_LOGITS` of the device.
    """
    pieces = [
        _losses(unembedding, [final[rows] for final in finals], targets[rows], most_logits)
        for rows in _rows(len(targets))
    ]
    return NextTokenLosses(*(torch.cat(parts, 1) for parts in zip(*pieces, strict=True)))


def _losses(
    unembedding: Unembedding, finals: Sequence[Tensor], targets: Tensor, most_logits: int | None
) -> NextTokenLosses:
    """`next_token_losses` of at most `MOST_ROWS` positions."""
    shape, options = (len(finals), len(targets)), {"dtype": torch.float64, "device": targets.device}
    total = torch.full(shape, -torch.inf, **options)  # log Σ exp, of the blocks so far
    gap = torch.zeros(shape, **options)  # Σ p (a − b) with p of the blocks so far
    at_target = torch.zeros(shape, **options)
    for start, stop in _blocks(unembedding, finals[0], most_logits):
        clean = unembedding.logits(finals[0], start, stop)
        p, size, block_total = _exponentials(clean)  # p: times `size`
        before, total[0] = total[0].clone(), total[0].logaddexp(block_total)
        kept, added = (before - total[0]).exp(), (block_total - total[0]).exp()
        place = (targets - start).clamp(0, stop - start - 1).unsqueeze(1)
        inside = (targets >= start) & (targets < stop)
        for i, final in enumerate(finals):
            logits = clean if i == 0 else unembedding.logits(final, start, stop)
            here = logits.gather(1, place).squeeze(1).double()
            at_target[i] = torch.where(inside, here, at_target[i])
            if i > 0:
                total[i] = total[i].logaddexp(_exponentials(logits)[2])
                block_gap = torch.sub(clean, logits).mul_(p).sum(1).double() / size
                gap[i] = gap[i] * kept + block_gap * added
    return NextTokenLosses(total - at_target, gap - total[0] + total)


@torch.no_grad()
def largest_difference(
    unembedding: Unembedding, one: Tensor, other: Tensor, *, most_logits: int | None = None
) -> float:
    """Largest difference between the logits of two passes, `one` and `other` `[n, D]`."""
    largest = []
    for rows in _rows(len(one)):
        for start, stop in _blocks(unembedding, one[rows], most_logits):
            a, b = (unembedding.logits(final[rows], start, stop) for final in (one, other))
            largest.append((a - b).abs_().max())
    return float(torch.stack(largest).max())


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of `[n, width]`, each row less its largest entry, and their sum `[n]`; and the
    log of the sum of exponentials of the row itself `[n]`, in float64 as the sum.

    On a CPU a quarter of the time of `torch.logsumexp`; and large logits do not take the digits of
    a distribution that is divided by `size` at the end."""
    largest = logits.amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    exponentials = (logits - largest).exp_()
    size = exponentials.sum(1).double()
    return exponentials, size, size.log() + largest.squeeze(1).double()


def _rows(n: int) -> list[slice]:
    return [slice(i, min(n, i + MOST_ROWS)) for i in range(0, max(n, 1), MOST_ROWS)]


def _blocks(
    unembedding: Unembedding, final: Tensor, most_logits: int | None
) -> Generator[tuple[int, int]]:
    """Bounds of the blocks of the vocabulary."""
    if most_logits is None:
        most_logits = MOST_LOGITS.get(final.device.type, MOST_LOGITS_ELSEWHERE)
    width = max(1, most_logits // max(1, len(final)))
    for start in range(0, unembedding.vocabulary, width):
        yield start, min(unembedding.vocabulary, start + width)
