"""Online training: the autoencoders of a stack learn with all layers replaced in the running model.

    loss = KL(plain model ‖ replaced model)  +  mse_weight · (Σ_l fvu_l + auxk_coefficient · auxk_l)

or cross-entropy in place of KL, or, as a control, neither; both in nats per token, over positions
whose input token is not special, as `evaluate` counts them. The second term is the loss of `resae
train` on the plain model's activations of the same tokens: without it FVU rises. The model's
weights stay as they are.

KL through a replaced model: end-to-end SAEs (arXiv 2405.12241), here for several layers at once;
KL and MSE as a fine-tuning of trained SAEs (arXiv 2503.17272).
"""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from resae.data.activations import capture_tokens
from resae.evaluation.metrics import cross_entropy, kl_divergence
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.replacements.context import replacement
from resae.stack.affine import AffinePredictor
from resae.stack.stack import ReSAE
from resae.training.config import OnlineConfig
from resae.training.loop import Batches, LoopOptions, run_loop
from resae.training.loss import LayerMetrics
from resae.training.low_rank import LowRankAdam
from resae.training.start import idle_tokens
from resae.training.step import TrainState, update


def train_online(
    config: OnlineConfig,
    source: Batches,
    lm: HookedLM,
    stack: ReSAE,
    scale: Sequence[float],
    out: Path,
    **options: Unpack[LoopOptions],
) -> ReSAE | None:
    """Train a copy of `stack` online, log and checkpoint into `out`; save the finished stack there
    and return it. While it runs, the model is in eval mode and without gradients of its weights.

    Args:
        config: for this stack (`FinetuneConfig.for_stack`).
        source: batches of token ids `[[B, T]]`, as of `RowBatches`.
        lm: the model that the stack was trained on.
        stack: of TopK autoencoders, for raw activations, on the model's device.
        scale: RMS of each layer (`layer_scales`): biases and maps learn in proportion.
        options: as of `resae.train`.

    Returns:
        The trained stack; None if it was stopped.

    Raises:
        TypeError, ValueError, OSError: as of `resae.train` and `replacement`; a stack whose
            autoencoders are not plain TopK ones.
    """
    require_topk(stack)
    with _frozen(lm):
        return run_loop(
            config,
            source,
            lambda resumed: _Online(resumed, lm, stack, scale),
            out,
            device=str(lm.device),
            **options,
        )


def require_topk(stack: ReSAE) -> None:
    """Raise ValueError for autoencoders that online training does not know."""
    for name, layer in zip(stack.hook_points, range(stack.n_layers), strict=True):
        sae = stack.sae(layer)
        if sae.step_weights is None:
            raise ValueError(
                f"finetune: the autoencoder of {name} is of kind {sae.kind!r}, expected plain "
                f"TopK; train a stack with `resae train`"
            )


def layer_scales(lm: HookedLM, stack: ReSAE, ids: Tensor) -> list[float]:
    """RMS of the activations of rows `[B, T]` at each layer of a stack."""
    xs = capture_tokens(lm, ids, lm.hook_points(stack.hook_points), sinks=stack.sinks)
    return [float(x.double().square().mean().sqrt()) for x in xs]


@contextmanager
def _frozen(lm: HookedLM) -> Generator[None]:
    """While inside, the model is in eval mode and its weights have no gradient."""
    wanted = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    training = [module for module in lm.model.modules() if module.training]
    lm.model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
        for module in training:
            module.training = True


class _Plain(NamedTuple):
    """The plain model's pass over some rows."""

    xs: list[Tensor]
    """L activations `[N, D]` of the tokens that are neither special nor sinks."""
    logits: Tensor
    """`[B, T, V]`"""


class _Online:
    """`train_online`'s task."""

    inputs: Sequence[str] = ("input_ids",)

    def __init__(self, config: OnlineConfig, lm: HookedLM, stack: ReSAE, scale: Sequence[float]):
        self.config = config
        self.lm = lm
        self.points = lm.hook_points(stack.hook_points)
        tuned = copy.deepcopy(stack)
        for buffer in tuned.predictor.buffers():
            buffer.requires_grad_(config.train_maps)
        self.state = TrainState(tuned, _optimizer(tuned, scale, config), idle_tokens(tuned))

    def step(self, batch: list[Tensor]) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
        ids = batch[0].to(self.lm.device)
        pieces = ids.tensor_split(self.config.accumulation_steps)
        through_model = self.config.objective != "mse"
        plain = self._plain(pieces[0]) if through_model and len(pieces) == 1 else None
        xs = [plain.xs] if plain else [self._captured(piece) for piece in pieces]
        counted = int(self._counted(ids).sum())
        kept = [layer.split([len(p) for p in pieces]) for layer in self._kept_plain(len(ids))]

        def added(number: int) -> Tensor:
            piece = pieces[number]
            logits = (plain or self._plain(piece)).logits
            return self._distance(piece, logits, [k[number] for k in kept]) / counted

        with ExitStack() as stack:
            if self.config.gradient_checkpointing:
                stack.enter_context(self.lm.recomputed())
            return update(
                self.state,
                self.config,
                xs,
                weight=self.config.mse_weight,
                added=added if through_model else None,
                only=self.state.step % len(self.points) if self.config.in_turn else None,
            )

    @torch.no_grad()
    def whole(self) -> ReSAE:
        self.state.optimizer.zero_grad(set_to_none=True)  # makes room for the copy
        stack = copy.deepcopy(self.state.stack)
        stack.predictor.requires_grad_(False)
        for buffer in stack.predictor.buffers():
            buffer.requires_grad_(False)
        return stack

    def _captured(self, ids: Tensor) -> list[Tensor]:
        return capture_tokens(self.lm, ids, self.points, sinks=self.state.stack.sinks)

    @torch.no_grad()
    def _plain(self, ids: Tensor) -> _Plain:
        streams: dict[HookPoint, Tensor] = {}
        with self.lm.hooked({p: partial(streams.__setitem__, p) for p in self.points}):
            logits = self._logits(ids)
        keep = ~self.lm.is_special(ids)
        if (sinks := self.state.stack.sinks) is not None:
            keep &= ~sinks.anywhere([streams[p] for p in self.points]).to(keep.device)
        return _Plain([streams[p][keep.to(streams[p].device)].float() for p in self.points], logits)

    def _logits(self, ids: Tensor) -> Tensor:
        return self.lm.model(input_ids=ids, use_cache=False).logits

    def _counted(self, ids: Tensor) -> Tensor:
        """`[B, T − 1]` bool, the positions that the loss is a mean over."""
        return ~self.lm.is_special(ids)[:, :-1]

    def _kept_plain(self, rows: int) -> list[Tensor]:
        """Per layer `[rows]` bool: where the plain stream goes on in this step. The same for
        however many pieces."""
        if not self.config.plain_probability:
            return [torch.zeros(rows, dtype=torch.bool)] * len(self.points)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.state.step)
        drawn = torch.rand(len(self.points), rows, generator=generator)
        return list(drawn < self.config.plain_probability)

    def _distance(self, ids: Tensor, plain: Tensor, kept_plain: Sequence[Tensor]) -> Tensor:
        """Sum of KL or cross-entropy over the counted positions of rows `[B, T]`."""
        streams: dict[HookPoint, Tensor] = {}

        def mixed(point: HookPoint, keep: Tensor, new: Tensor) -> Tensor:
            return torch.where(keep.to(new.device)[:, None, None], streams.pop(point), new)

        drawn = {p: k for p, k in zip(self.points, kept_plain, strict=True) if bool(k.any())}
        with (
            self.lm.hooked({p: partial(streams.__setitem__, p) for p in drawn}),
            replacement(self.lm, self.state.stack, loop=self.config.loop, gradient=True),
            self.lm.hooked({p: partial(mixed, p, keep) for p, keep in drawn.items()}),
        ):
            logits = self._logits(ids)
        if self.config.objective == "kl":
            nats = kl_divergence(plain, logits)
        else:
            nats = cross_entropy(logits, ids)
        return nats[self._counted(ids)].sum()


def _optimizer(stack: ReSAE, scale: Sequence[float], config: OnlineConfig) -> torch.optim.Optimizer:
    """Adam, its groups with their share of the layer's learning rate: what is added to activations
    learns in proportion to their RMS, a map in proportion to the RMS of its target over that of its
    source, as if every layer were divided by its RMS."""
    groups = []
    for layer, sae in enumerate(stack.unique_saes()):
        own = [p for p in sae.parameters() if p.requires_grad]
        groups.append(_group([p for p in own if p.ndim > 1], layer, 1.0))
        groups.append(_group([p for p in own if p.ndim <= 1], layer, scale[layer]))
    for name, tensor in _trained_maps(stack.predictor).items():
        part, _, number = name.rpartition("_")
        layer = int(number)
        ratio = scale[layer] / scale[layer - 1]
        factor = {"c": scale[layer], "U": ratio**0.5, "V": ratio**0.5}.get(part, ratio)
        groups.append(_group([tensor], layer, factor))
    groups = [group for group in groups if group["params"]]
    if config.update_rank is not None:
        return LowRankAdam(groups, rank=config.update_rank, seed=config.seed)
    return torch.optim.Adam(groups, fused=True)


def _trained_maps(predictor: AffinePredictor) -> Mapping[str, Tensor]:
    return {name: buffer for name, buffer in predictor.named_buffers() if buffer.requires_grad}


def _group(parameters: Iterable[Tensor], layer: int, lr_factor: float) -> dict[str, object]:
    return {"params": list(parameters), "layer": layer, "lr_factor": lr_factor}
