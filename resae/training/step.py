"""One optimiser step on one batch, of one process or of several."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from resae.data.batches import Position
from resae.sae.losses import Reduce, no_reduce
from resae.stack.stack import ReSAE
from resae.training.config import TrainConfig
from resae.training.distributed import SINGLE_PROCESS, Ranks
from resae.training.loss import LayerMetrics, NormaliserReduce, StackLoss, stack_loss


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


def trained_tensors(stack: ReSAE) -> dict[str, Tensor]:
    """Trainable tensors by name, each once: all but maps without gradient, which belong to the
    calibration."""
    named = chain(stack.named_parameters(), stack.named_buffers())
    return {n: t for n, t in named if t.requires_grad or not n.startswith("predictor.")}


def train_step(
    state: TrainState, config: TrainConfig, xs: Sequence[Tensor], ranks: Ranks = SINGLE_PROCESS
) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
    """One optimiser step on a batch of L activations `[N, D]`, already divided by their RMS.

    Args:
        ranks: this process among several; each gives its share of the batch, or the layers that it
            holds.

    Returns:
        The loss, and the metrics of each layer, as scalars still on the device; with several ranks
        this one's part.
    """
    pieces = list(zip(*(x.tensor_split(config.accumulation_steps) for x in xs), strict=True))
    return update(state, config, pieces, ranks)


def update(
    state: TrainState,
    config: TrainConfig,
    pieces: Sequence[Sequence[Tensor]],
    ranks: Ranks = SINGLE_PROCESS,
    *,
    weight: float = 1.0,
    added: Callable[[int], Tensor] | None = None,
    only: int | None = None,
) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
    """`train_step` on a batch that is cut into pieces of L activations `[n, D]`.

    Args:
        weight: factor of the stack's own loss.
        added: further loss of a piece, given its number; over the pieces it adds up.
        only: the layer that the step changes; None: all.
    """
    stack, tokens = state.stack, sum(len(piece[0]) for piece in pieces)
    dead = [idle_tokens >= config.dead_tokens for idle_tokens in state.tokens_since_fired]
    device = pieces[0][0].device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.autocast)
    state.optimizer.zero_grad(set_to_none=True)
    for idle_tokens in state.tokens_since_fired:
        idle_tokens += tokens * (ranks.size if ranks.by_data else 1)
    normaliser = _normalisers(state, config, pieces, dead, autocast, ranks)
    parts = []
    for piece in pieces:
        with autocast, torch.set_grad_enabled(weight > 0):
            part = stack_loss(stack, config, piece, dead, normaliser=normaliser)
        if weight != 1:
            part = part._replace(loss=weight * part.loss)
        if added is not None:
            part = part._replace(loss=part.loss + added(len(parts)))
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
        clip_gradients(trained_tensors(stack).values(), config.clip_norm, ranks.reduce_over_layers)
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_factor"] * config.lr_at(state.step, group["layer"])
        if only not in (None, group["layer"]):
            for parameter in group["params"]:
                parameter.grad = None
    state.optimizer.step()
    for sae in stack.unique_saes():
        sae.normalize_decoder()
    for i, sae in enumerate(stack.unique_saes()):
        if sae.follows_acts:
            sae.follow(ranks.all_gather_cat(torch.cat([part.acts[i] for _, part in parts])))
    state.step += 1
    return _sum_of_pieces(parts)


def _normalisers(
    state: TrainState,
    config: TrainConfig,
    pieces: Sequence[Sequence[Tensor]],
    dead: Sequence[Tensor],
    autocast: torch.autocast,
    ranks: Ranks,
) -> NormaliserReduce:
    """Reductions of the loss's normalisers to the sums over the batch, for every piece.

    Two passes for gradient accumulation: the first piece's backward needs normalisers of the whole
    batch, so a pass without gradient over all pieces adds them up first.
    """
    if len(pieces) == 1:
        return lambda _: ranks.reduce_over_batch
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        of_piece: dict[str, Tensor] = {}
        with torch.no_grad(), autocast:
            stack_loss(state.stack, config, piece, dead, normaliser=partial(_record, of_piece))
        for name, part in of_piece.items():
            sums[name] = sums[name] + part if name in sums else part
    of_batch = {name: ranks.reduce_over_batch(part) for name, part in sums.items()}
    return lambda name: lambda _: of_batch[name]


def _record(sums: dict[str, Tensor], name: str) -> Reduce:
    """A reduction that returns its sum as it is and stores it under `name`."""

    def reduce(part: Tensor) -> Tensor:
        if name in sums:
            raise ValueError(f"training: the normaliser {name} was reduced twice; reduce it once")
        sums[name] = part
        return part

    return reduce


def _sum_of_pieces(
    parts: Sequence[tuple[float, StackLoss]],
) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
    """Loss and metrics of a batch from those of its pieces, each with its share of the tokens."""
    if len(parts) == 1:
        return parts[0][1].loss, parts[0][1].metrics
    shares = torch.tensor([share for share, _ in parts], device=parts[0][1].loss.device)
    metrics = []
    for of_layer in zip(*(part.metrics for _, part in parts), strict=True):
        pieces = LayerMetrics(*(torch.stack(values) for values in zip(*of_layer, strict=True)))
        metrics.append(
            LayerMetrics(
                fvu=pieces.fvu.sum(),
                l0=(shares * pieces.l0).sum(),
                dead_fraction=pieces.dead_fraction[0],
                auxk=pieces.auxk.sum(),
            )
        )
    return torch.stack([part.loss for _, part in parts]).sum(), metrics


def clip_gradients(parameters: Iterable[Tensor], norm: float, reduce: Reduce = no_reduce) -> None:
    """Scale the gradients of `parameters` together down to `norm`, where it is larger.

    Args:
        reduce: adds the squares of parameters that other ranks hold.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([torch.linalg.vector_norm(g).square() for g in gradients]).sum()
    factor = (norm / reduce(squares).sqrt().clamp_min(1e-30)).clamp_max(1.0)
    for gradient in gradients:
        gradient *= factor
