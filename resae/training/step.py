"""One optimiser step on one batch, of one process or of several."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from resae.data.batches import Position
from resae.sae.losses import Reduce, no_reduce
from resae.stack.stack import ReSAE
from resae.training.config import TrainConfig
from resae.training.distributed import SINGLE_PROCESS, Ranks
from resae.training.loss import Measured, StackLoss, stack_loss


@dataclass
class TrainState:
    """Everything that a step changes."""

    stack: ReSAE
    """In units of each layer's RMS."""
    optimizer: torch.optim.Optimizer
    tokens_since_fired: list[Tensor]
    """`[M]` int64 of each of `stack.saes`: in tokens, each of which is seen at all layers."""
    step: int = 0
    position: Position = field(default_factory=Position)
    """In the data; of several ranks each has its own."""


def train_step(
    state: TrainState, config: TrainConfig, xs: Sequence[Tensor], ranks: Ranks = SINGLE_PROCESS
) -> tuple[Tensor, list[Measured]]:
    """One optimiser step on a batch of L activations `[N, D]`, already divided by their RMS.

    Args:
        ranks: of several processes; each gives its share of the batch, or the layers that it holds.

    Returns:
        The loss, and per layer `(fvu, l0, dead fraction, auxk)` as scalars still on the device; of
        several ranks this one's part.
    """
    stack, tokens = state.stack, len(xs[0])
    dead = [idle_tokens >= config.dead_tokens for idle_tokens in state.tokens_since_fired]
    pieces = list(zip(*(x.tensor_split(config.accumulation_steps) for x in xs), strict=True))
    autocast = torch.autocast(xs[0].device.type, torch.bfloat16, enabled=config.autocast)
    state.optimizer.zero_grad(set_to_none=True)
    for idle_tokens in state.tokens_since_fired:
        idle_tokens += tokens * (ranks.size if ranks.by_data else 1)
    reduces = _batch_reduces(state, config, pieces, dead, autocast, ranks)
    parts = []
    for piece in pieces:
        with autocast:
            part = stack_loss(stack, config, piece, dead, reduce=next(reduces))
        for idle_tokens, latents in zip(state.tokens_since_fired, part.fired, strict=True):
            idle_tokens[latents] = 0
        if len(parts) + 1 < len(pieces):
            part.loss.backward()
        else:
            with ranks.summed_gradients(stack.parameters()):
                part.loss.backward()
        parts.append((len(piece[0]) / tokens, part._replace(loss=part.loss.detach())))
    ranks.all_reduce_min_(state.tokens_since_fired)
    for sae in stack.unique_saes():
        sae.remove_parallel_gradient()
    if config.clip_norm is not None:
        clip_gradients(stack.parameters(), config.clip_norm, ranks.reduce_over_layers)
    for layer, group in enumerate(state.optimizer.param_groups):
        group["lr"] = config.lr_at(state.step, layer)
    state.optimizer.step()
    for sae in stack.unique_saes():
        sae.normalize_decoder()
    for i, sae in enumerate(stack.unique_saes()):
        if sae.follows_acts:
            sae.follow(ranks.all_gather_cat(torch.cat([part.acts[i] for _, part in parts])))
    state.step += 1
    return _sum_of_parts(parts)


def _batch_reduces(
    state: TrainState,
    config: TrainConfig,
    pieces: Sequence[Sequence[Tensor]],
    dead: Sequence[Tensor],
    autocast: torch.autocast,
    ranks: Ranks,
) -> Iterator[Reduce]:
    """Per piece what makes its sums those of the batch: of several pieces, from a first pass."""
    if len(pieces) == 1:
        return iter([ranks.reduce_over_batch])
    sums: list[Tensor] = []
    for piece in pieces:
        place = count()

        def add(part: Tensor, place: Iterator[int] = place) -> Tensor:
            i = next(place)
            sums[i : i + 1] = [sums[i] + part if i < len(sums) else part]
            return part

        with torch.no_grad(), autocast:
            stack_loss(state.stack, config, piece, dead, reduce=add)
    sums = [ranks.reduce_over_batch(part) for part in sums]
    return (_in_turn(sums) for _ in pieces)


def _in_turn(sums: Sequence[Tensor]) -> Reduce:
    known = iter(sums)
    return lambda _: next(known)


def _sum_of_parts(parts: Sequence[tuple[float, StackLoss]]) -> tuple[Tensor, list[Measured]]:
    """Loss and measures of a batch from those of its pieces, each with its share of the tokens."""
    if len(parts) == 1:
        return parts[0][1].loss, parts[0][1].measured
    shares = torch.tensor([share for share, _ in parts], device=parts[0][1].loss.device)
    measured = []
    for of_layer in zip(*(part.measured for _, part in parts), strict=True):
        fvu, l0, dead, auxk = (torch.stack(values) for values in zip(*of_layer, strict=True))
        measured.append((fvu.sum(), (shares * l0).sum(), dead[0], auxk.sum()))
    return torch.stack([part.loss for _, part in parts]).sum(), measured


def clip_gradients(
    parameters: Iterable[nn.Parameter], norm: float, reduce: Reduce = no_reduce
) -> None:
    """Scale the gradients of `parameters` together down to `norm`, where it is larger.

    Args:
        reduce: adds the squares of parameters that other ranks hold.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([torch.linalg.vector_norm(g).square() for g in gradients]).sum()
    factor = (norm / reduce(squares).sqrt().clamp_min(1e-30)).clamp_max(1.0)
    for gradient in gradients:
        gradient *= factor
