"""Train the autoencoders of all selected layers from one stream of activations.

    loss = Σ_l  ‖r_l − r̂_l‖² / ‖r_l − mean‖²  +  auxk_coefficient · auxk_l

with r_l what the affine maps leave of x_l, and every layer divided by its RMS, so that one learning
rate suits all. Adam, decoder rows kept at norm 1 with the gradient along them removed. What
training needs before the first step (maps, scales, means) is a `Calibration`.

A run directory: `run.json` (configuration), `calibration.safetensors`, `log.jsonl`, `checkpoints/`,
and at the end the stack itself (`ReSAE.from_pretrained(run)`). Checkpoints are one safetensors file
each: weights, optimiser, counters, positions in the data; schedule and shuffles follow from the
step, the seed and these. On a CPU a resumed run ends in the bits of an uninterrupted one. With more
tokens than it began with it goes on from before its learning rate fell (`resumed_config`).
"""

import copy
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from resae.choices import DTYPES, KINDS
from resae.data.batches import ActivationSource, Position
from resae.models.identity import ModelIdentity
from resae.sae.losses import Total, auxk_loss, in_one_piece
from resae.sae.topk import BoostedSAE, SAEConfig, TopKSAE
from resae.stack.affine import AffinePredictor, Moments, check_form, fit_predictor
from resae.stack.stack import ReSAE, new_stack
from resae.storage import load_tensors, remove_partial, save_tensors, write_atomically
from resae.training.distributed import ALONE, Ranks

log = logging.getLogger(__name__)

WARMUP = 0.05
"""Share of the steps over which the learning rate rises from 0, where no number is given."""
DECAY = 0.2
"""Share of the steps, at the end, over which it falls back to 0."""


NO_GAIN = {"hook_attn_out": (0.95, 1.37, 2.22), "hook_mlp_out": (1.00, 1.33, 1.53)}
"""Hook points where predicting a layer from others gained nothing: online Δ CE of ReSAE over that
of raw SAEs of the same k and of raw SAEs with as many active latents in total, and that of identity
residuals over the first, in the demo (embedded model, blocks 1, 3 and 5, k = 8, seed 0)."""


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how. Defaults are those measured on the embedded model."""

    layers: tuple[str, ...]
    """Hook points, in the order of the forward pass; at those in `NO_GAIN` raw SAEs (predictor
    `none`) do better."""
    k: tuple[int, ...]
    """Active latents per token, one per layer."""
    d_sae: int | tuple[int, ...]
    """M, latents: one number for every layer, or one per layer."""
    predictor: str = "previous"
    """`none`, `identity`, `previous` or `all_previous`."""
    form: str = "full"
    """Of the maps of the last two: `full`, `scalar`, `diagonal` or `low_rank`."""
    rank: int | None = None
    """Of the form `low_rank`."""
    loop: str = "open"
    """Residuals against predictions from true activations (`open`) or reconstructions
    (`closed`)."""
    shared: bool = False
    """One dictionary for all layers (MLSAE, arXiv 2409.04185); predictor `none` and equal k. A
    latent that fires on a token in any layer is alive."""
    prefixes: tuple[int, ...] | None = None
    """The error is the mean over the reconstructions of the j strongest latents for these j, rising
    and ending with k (HierarchicalTopK, arXiv 2505.24473); None: that of all k. Each adds a
    gradient `[M, D]`: powers of two cost less than every j."""
    prefix_gain: float = 1 / 8
    """The acts of the j strongest alone count (k / j) ** prefix_gain times; 0: once, as in the
    paper."""
    boost: str | None = None
    """Folder of a trained stack, which stays as it is, its maps too: beside each of its
    autoencoders a second one is trained on what it leaves of this data (SAE Boost, arXiv
    2507.12990); k and d_sae are of the second ones."""
    boost_keep: float = 0.1
    """Share of the second ones' acts in training that their threshold in use lets through."""
    train_tokens: int = 1_000_000
    """Tokens to train on; the data starts over if it is shorter. A run can be resumed with more:
    see `resumed_config`."""
    calibration_tokens: int = 100_000
    """Tokens that the affine maps are fitted on; without maps, scales and means are measured on a
    buffer at most."""
    batch_tokens: int = 1_024
    """Tokens per step."""
    buffer_tokens: int = 65_536
    """Tokens whose activations are shuffled together."""
    buffer_dtype: str = "bfloat16"
    """In which they wait there: `bfloat16`, `float16` or `float32`."""
    lr: float | None = None
    """Peak learning rate of Adam; None: 8e-3 · sqrt(512 / d_sae), in each layer by its own
    d_sae."""
    warmup_steps: float | None = None
    """Steps over which the learning rate rises from 0; None: a twentieth of all."""
    auxk_coefficient: float = 1 / 32
    """Weight of the loss that revives dead latents."""
    dead_after_tokens: int | None = None
    """A latent that has not fired for so many tokens is dead; None: an eighth of train_tokens."""
    ridge: float = 1e-4
    """Of the affine fit, relative to the mean eigenvalue of the sources' covariance."""
    seed: int = 0
    """Fixes initial directions and the order of the data."""
    clip_norm: float | None = None
    """The gradient of all layers together is scaled down to this norm; None: never."""
    accumulation_steps: int = 1
    """Pieces that a batch is cut into, one after the other: less memory, the same weights. More
    than one costs a second encode, for the sums over the whole batch that the loss divides by."""
    autocast: bool = False
    """Products in bfloat16; weights, their optimiser and the sums of the loss stay float32."""

    def __post_init__(self) -> None:
        if len(self.k) != len(self.layers):
            raise ValueError(f"TrainConfig: {len(self.k)} k for {len(self.layers)} layers")
        if len(self.d_saes) != len(self.layers):
            raise ValueError(
                f"TrainConfig: {len(self.d_saes)} d_sae for {len(self.layers)} layers; give one "
                f"number, or one per layer"
            )
        for k, d_sae in zip(self.k, self.d_saes, strict=True):
            if not 1 <= k <= d_sae:
                raise ValueError(
                    f"TrainConfig: k={k} for d_sae={d_sae} latents; expected 1 ≤ k ≤ d_sae"
                )
        if self.predictor not in KINDS:
            raise ValueError(
                f"TrainConfig: unknown predictor {self.predictor!r}; choose {', '.join(KINDS)}"
            )
        check_form(self.predictor, self.form, self.rank, "TrainConfig")
        if self.loop not in ("open", "closed"):
            raise ValueError(f"TrainConfig: loop={self.loop!r}, expected 'open' or 'closed'")
        equal_k = len(set(self.k)) == 1
        equal_d_sae = len(set(self.d_saes)) == 1
        if self.shared and (self.predictor != "none" or not equal_k or not equal_d_sae):
            raise ValueError(
                f"TrainConfig: shared with predictor={self.predictor!r}, k={self.k}, "
                f"d_sae={self.d_sae}; a dictionary of all layers needs predictor 'none' and one k "
                f"and d_sae"
            )
        js = self.prefixes
        rising = js is None or (js == tuple(sorted(set(js))) and js[:1] > (0,) and equal_k)
        if not rising or (js is not None and js[-1] != self.k[0]):
            raise ValueError(
                f"TrainConfig: prefixes={js}, k={self.k}; expected one k, and rising numbers from "
                f"1 on that end with it, for example 1,2,4,8 for k = 8"
            )
        if not 0 <= self.prefix_gain <= 1:
            raise ValueError(f"TrainConfig: prefix_gain={self.prefix_gain}, expected 0 to 1")
        if self.boost is not None and (self.shared or js is not None):
            raise ValueError("TrainConfig: boost with shared or prefixes; train the base with them")
        if not 0 < self.boost_keep <= 1:
            raise ValueError(
                f"TrainConfig: boost_keep={self.boost_keep}, expected above 0, up to 1"
            )
        for name in ("train_tokens", "calibration_tokens", "batch_tokens", "dead_after_tokens"):
            value = getattr(self, name)
            # A batch of one token has no variance to be explained.
            least = 2 if name == "batch_tokens" else 1
            if value is not None and value < least:
                raise ValueError(f"TrainConfig: {name}={value}, expected at least {least}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"TrainConfig: lr={self.lr}, expected above 0, or None")
        for name in ("auxk_coefficient", "ridge", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig: {name}={getattr(self, name)}, expected from 0 on")
        if self.buffer_tokens < self.batch_tokens:
            raise ValueError(
                f"TrainConfig: buffer_tokens={self.buffer_tokens} is below "
                f"batch_tokens={self.batch_tokens}; raise it"
            )
        if self.warmup_steps is not None and not self.warmup_steps >= 0:
            raise ValueError(
                f"TrainConfig: warmup_steps={self.warmup_steps}, expected at least 0 or None"
            )
        if self.buffer_dtype not in DTYPES:
            raise ValueError(
                f"TrainConfig: buffer_dtype={self.buffer_dtype!r}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"TrainConfig: clip_norm={self.clip_norm}, expected above 0 or None")
        if not 1 <= self.accumulation_steps <= self.batch_tokens:
            raise ValueError(
                f"TrainConfig: accumulation_steps={self.accumulation_steps}, expected 1 to "
                f"batch_tokens={self.batch_tokens}"
            )

    @property
    def steps(self) -> int:
        return math.ceil(self.train_tokens / self.batch_tokens)

    @property
    def moment_tokens(self) -> int:
        """Tokens that maps, scales and means are measured on: without maps a buffer is enough, and
        no more than are trained on."""
        if self.predictor == "none":
            return min(self.calibration_tokens, self.buffer_tokens, self.train_tokens)
        return self.calibration_tokens

    @property
    def d_saes(self) -> tuple[int, ...]:
        """`d_sae` of each layer."""
        if isinstance(self.d_sae, int):
            return (self.d_sae,) * len(self.layers)
        return self.d_sae

    @property
    def peak_lrs(self) -> tuple[float, ...]:
        """Peak learning rate of each layer."""
        if self.lr is not None:
            return (self.lr,) * len(self.layers)
        return tuple(8e-3 * math.sqrt(512 / d_sae) for d_sae in self.d_saes)

    @property
    def peak_lr(self) -> float:
        """Highest of `peak_lrs`."""
        return max(self.peak_lrs)

    @property
    def dead_tokens(self) -> int:
        return self.dead_after_tokens or max(1, self.train_tokens // 8)

    @property
    def rising_steps(self) -> float:
        return WARMUP * self.steps if self.warmup_steps is None else self.warmup_steps

    @property
    def falling_steps(self) -> float:
        return max(1.0, DECAY * self.steps)

    @property
    def common_steps(self) -> int:
        """First steps that a run of more tokens, else the same, takes alike: those before the
        learning rate falls, on buffers of full size (the last one is smaller)."""
        per_buffer = self.buffer_tokens // self.batch_tokens
        before_the_fall = math.floor(self.steps - self.falling_steps) + 1
        return min(before_the_fall, self.steps // per_buffer * per_buffer)

    def resolved(self) -> "TrainConfig":
        """The same with the values that None stands for, for a record of what was trained."""
        alike = len(set(self.peak_lrs)) == 1  # else `peak_lrs` is recorded beside it
        return replace(
            self,
            lr=self.peak_lr if alike else None,
            warmup_steps=self.rising_steps,
            dead_after_tokens=self.dead_tokens,
        )

    @property
    def warning(self) -> str | None:
        """One line if predictions gained nothing at these hook points where it was measured."""
        if self.predictor == "none":
            return None
        for site, (raw, equal_total, identity) in NO_GAIN.items():
            if any(name.endswith(f".{site}") for name in self.layers):
                return (
                    f"warning: at {site} predicting a layer from others gained nothing in the demo "
                    f"(its embedded model, k = 8): ReSAE loses {raw:.2f} times what raw SAEs lose "
                    f"online, {equal_total:.2f} times at equal total latents, predictor identity "
                    f"{identity:.2f} times; compare with predictor none, or take hook_resid_post"
                )
        return None

    def lr_at(self, step: int, layer: int = 0) -> float:
        """Learning rate of step 0, 1, … in selected layer `layer`: linear up, flat, linear down."""
        rise = (step + 1) / max(1.0, self.rising_steps)
        fall = (self.steps - step) / self.falling_steps
        return self.peak_lrs[layer] * min(1.0, rise, fall)


# -- before the first step -------------------------------------------------------------------------


class Calibration(NamedTuple):
    """What is fixed before training, in raw units of the activations."""

    predictor: AffinePredictor
    scale: list[float]
    """RMS of each layer."""
    mean: list[Tensor]
    """L × `[D]`."""

    def save(self, path: Path) -> None:
        scale = torch.tensor(self.scale, dtype=torch.float64)
        fixed = {"scale": scale, "mean": torch.stack(self.mean)}
        save_tensors(path, self.predictor.tensors() | fixed)

    @classmethod
    def load(cls, path: Path, kind: str) -> "Calibration":
        tensors = load_tensors(path, "calibration")
        return cls(
            AffinePredictor.load(path, kind), tensors["scale"].tolist(), list(tensors["mean"])
        )


def calibrate(
    kind: str, moments: Moments, *, ridge: float, form: str = "full", rank: int | None = None
) -> Calibration:
    """Maps, scales and means from the moments of the calibration tokens."""
    return Calibration(
        fit_predictor(kind, moments, ridge=ridge, form=form, rank=rank),
        moments.scale(),
        [moments.mean(layer).float() for layer in range(len(moments.sums))],
    )


def boost_calibration(base: ReSAE, moments: Moments) -> Calibration:
    """What boosting a stack needs: its own maps, and scales rounded to powers of two, which bring
    its weights into units of training and back without changing a bit."""
    return Calibration(
        base.predictor,
        [2.0 ** round(math.log2(s)) for s in moments.scale()],
        [moments.mean(layer).float() for layer in range(len(moments.sums))],
    )


def sum_moments(
    kind: str, batches: Iterable[Sequence[Tensor]], *, tokens: int, d_in: int, n_layers: int
) -> Moments:
    """Moments of the first `tokens` tokens of `batches` of L activations `[N, D]`."""
    moments = Moments(n_layers, d_in, kind)
    for xs in batches:
        left = tokens - moments.count
        moments.add([x[:left] for x in xs])
        if moments.count >= tokens:
            break
    return moments


# -- the step --------------------------------------------------------------------------------------


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


class LayerMetrics(NamedTuple):
    """Of one layer and one batch, on the residual target."""

    fvu: float
    l0: float
    dead_fraction: float
    auxk: float


Measured = tuple[Tensor, Tensor, Tensor, Tensor]


class StackLoss(NamedTuple):
    """What one batch says of all layers; scalars are still on the device."""

    loss: Tensor
    measured: list[Measured]
    """Per layer `(fvu, l0, dead fraction, auxk)`, detached."""
    fired: list[Tensor]
    """Of each of `stack.saes` the latents that fired, in any order, repeated as often as they
    did."""
    acts: list[Tensor]
    """Of each of `stack.saes` what its trained part made of the tokens, `[N, k]`, detached."""


def stack_loss(
    stack: ReSAE,
    config: TrainConfig,
    xs: Sequence[Tensor],
    dead: Sequence[Tensor],
    *,
    total: Total = in_one_piece,
) -> StackLoss:
    """The loss of L activations `[N, D]`, already divided by their RMS.

    Args:
        dead: for each of `stack.saes` which latents AuxK shall revive, `[M]` bool.
        total: makes a sum over these tokens the sum over the batch that they are a piece of; the
            losses of all pieces then add up to the loss of the batch. Whatever a loss divides by
            goes through it, always in the same order, and no argument depends on what an earlier
            call returned.
    """
    loss = xs[0].new_zeros(())
    x_hats: list[Tensor] = []
    measured: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    fired: list[list[Tensor]] = [[] for _ in stack.saes]
    all_acts: list[list[Tensor]] = [[] for _ in stack.saes]
    for layer, x in enumerate(xs):
        sae = stack.sae(layer)
        base = stack.predictor(layer, x_hats if config.loop == "closed" else xs)
        its_dead = dead[stack.position(layer)]
        code = sae.encode(x, base=base)
        partial: list[Tensor] = []
        if config.prefixes is None:
            x_hat = sae.decode(*code, base=base)
        else:
            *partial, x_hat = sae.trained.decode_prefixes(code, config.prefixes, base=base)
        x_hats.append(x_hat.detach())
        target = x if base is None else x - base
        variance = centred_energy(target, total).to(x.dtype)
        fvu = F.mse_loss(x_hat, x, reduction="sum") / variance
        errors = [F.mse_loss(y, x, reduction="sum") / variance for y in partial]
        error = sum(errors, fvu) / (1 + len(errors))
        k_aux = max(1, x.shape[1] // 2)
        aux = auxk_loss(sae.trained, x, x - x_hats[-1], its_dead, k_aux, base=base, total=total)
        loss = loss + error + config.auxk_coefficient * aux
        acts, indices = sae.trained_code(code)
        active = acts > 0
        fired[stack.position(layer)].append(indices[active])
        all_acts[stack.position(layer)].append(acts.detach())
        l0 = active.sum(-1).double().mean()
        measured.append((fvu.detach(), l0, its_dead.double().mean(), aux.detach()))
    joined = ([torch.cat(of_layers) for of_layers in of_saes] for of_saes in (fired, all_acts))
    return StackLoss(loss, measured, *joined)


def centred_energy(x: Tensor, total: Total = in_one_piece) -> Tensor:
    """Σ‖x − mean‖² over the batch that `x [N, D]` is a piece of; of pieces from sums in float64."""
    x = x.detach()
    if total is in_one_piece:
        return (x - x.mean(0)).square().sum()
    energy = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    tokens = energy.new_tensor(float(len(x)))
    sums = total(torch.cat([x.sum(0, dtype=torch.float64), torch.stack([energy, tokens])]))
    return sums[-2] - sums[:-2].square().sum() / sums[-1]


def train_step(
    state: TrainState, config: TrainConfig, xs: Sequence[Tensor], ranks: Ranks = ALONE
) -> tuple[Tensor, list[Measured]]:
    """One optimiser step on a batch of L activations `[N, D]`, already divided by their RMS.

    Args:
        ranks: of several processes; each gives its share of the batch, or the layers that it holds.

    Returns:
        The loss, and per layer `(fvu, l0, dead fraction, auxk)` as scalars still on the device; of
        several ranks this one's part.
    """
    stack, tokens = state.stack, len(xs[0])
    dead = [since >= config.dead_tokens for since in state.tokens_since_fired]
    pieces = list(zip(*(x.tensor_split(config.accumulation_steps) for x in xs), strict=True))
    autocast = torch.autocast(xs[0].device.type, torch.bfloat16, enabled=config.autocast)
    state.optimizer.zero_grad(set_to_none=True)
    for since in state.tokens_since_fired:
        since += tokens * (ranks.size if ranks.by_data else 1)
    totals = _batch_totals(state, config, pieces, dead, autocast, ranks)
    parts = []
    for piece in pieces:
        with autocast:
            part = stack_loss(stack, config, piece, dead, total=next(totals))
        for since, latents in zip(state.tokens_since_fired, part.fired, strict=True):
            since[latents] = 0
        if len(parts) + 1 < len(pieces):
            part.loss.backward()
        else:
            with ranks.summed_gradients(stack.parameters()):
                part.loss.backward()
        parts.append((len(piece[0]) / tokens, part._replace(loss=part.loss.detach())))
    ranks.least_(state.tokens_since_fired)
    for sae in stack.distinct():
        sae.remove_parallel_gradient()
    if config.clip_norm is not None:
        clip_gradients(stack.parameters(), config.clip_norm, ranks.layers_total)
    for layer, group in enumerate(state.optimizer.param_groups):
        group["lr"] = config.lr_at(state.step, layer)
    state.optimizer.step()
    for sae in stack.distinct():
        sae.normalize_decoder()
    for i, sae in enumerate(stack.distinct()):
        if isinstance(sae, BoostedSAE):
            sae.follow(ranks.whole(torch.cat([part.acts[i] for _, part in parts])))
    state.step += 1
    return _sum_of_parts(parts)


def _batch_totals(
    state: TrainState,
    config: TrainConfig,
    pieces: Sequence[Sequence[Tensor]],
    dead: Sequence[Tensor],
    autocast: torch.autocast,
    ranks: Ranks,
) -> Iterator[Total]:
    """Per piece what makes its sums those of the batch: of several pieces, from a first pass."""
    if len(pieces) == 1:
        return iter([ranks.batch_total])
    sums: list[Tensor] = []
    for piece in pieces:
        place = count()

        def add(part: Tensor, place: Iterator[int] = place) -> Tensor:
            i = next(place)
            sums[i : i + 1] = [sums[i] + part if i < len(sums) else part]
            return part

        with torch.no_grad(), autocast:
            stack_loss(state.stack, config, piece, dead, total=add)
    sums = [ranks.batch_total(part) for part in sums]
    return (_in_turn(sums) for _ in pieces)


def _in_turn(sums: Sequence[Tensor]) -> Total:
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
    parameters: Iterable[nn.Parameter], norm: float, total: Total = in_one_piece
) -> None:
    """Scale the gradients of `parameters` together down to `norm`, where it is larger.

    Args:
        total: adds the squares of parameters that other ranks hold.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([torch.linalg.vector_norm(g).square() for g in gradients]).sum()
    factor = (norm / total(squares).sqrt().clamp_min(1e-30)).clamp_max(1.0)
    for gradient in gradients:
        gradient *= factor


def initial_state(
    config: TrainConfig, calibration: Calibration, identity: ModelIdentity | None, device: str
) -> TrainState:
    """Step 0: random directions, `b_dec` the mean of what each autoencoder reads.

    Raises:
        FileNotFoundError, ValueError: there is no stack to boost, or not one of this configuration.
    """
    stack = (
        _boosted(config, calibration) if config.boost else _random(config, calibration, identity)
    )
    stack.to(device)
    Ms = [sae.trained.config.d_sae for sae in stack.distinct()]
    since = [torch.zeros(M, dtype=torch.int64, device=device) for M in Ms]
    return TrainState(stack, _optimizer(stack, config), since)


def _optimizer(stack: ReSAE, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with one parameter group per layer, or one for all layers that share a dictionary."""
    groups = [
        {"params": [p for p in sae.parameters() if p.requires_grad], "lr": rate}
        for sae, rate in zip(stack.distinct(), config.peak_lrs, strict=False)
    ]
    return torch.optim.Adam(groups, fused=True)


def _state_of_rank(
    state: TrainState, config: TrainConfig, ranks: Ranks, device: str
) -> tuple[TrainState, TrainConfig]:
    """What one rank trains, and how. By layers: ordinary autoencoders of its layers, whose
    activations will be what the maps leave."""
    ranks.broadcast_(state.stack.state_dict().values())
    own = ranks.own(len(config.layers))
    if not ranks.by_layers:
        return state, config
    saes = []
    for layer in own:
        sae = state.stack.sae(layer)
        tensors = (*sae.parameters(), *sae.buffers())
        sae = copy.deepcopy(sae, {id(tensor): tensor for tensor in tensors})  # of the same tensors
        sae.set_input_kind("activation")
        saes.append(sae)
    names = tuple(config.layers[layer] for layer in own)
    part = ReSAE(names, AffinePredictor("none"), saes).to(device)
    since = [state.tokens_since_fired[layer].to(device) for layer in own]
    sizes = {
        "k": tuple(config.k[layer] for layer in own),
        "d_sae": tuple(config.d_saes[layer] for layer in own),
    }
    alone = {"predictor": "none", "form": "full", "rank": None, "loop": "open"}
    config = replace(config, layers=names, **sizes, **alone)
    return TrainState(part, _optimizer(part, config), since), config


def require_divisible(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError unless so many ranks can share this training in their way."""
    problem = None
    if config.batch_tokens % ranks.size:
        problem = f"batch_tokens={config.batch_tokens}; make it a multiple of the ranks"
    elif ranks.by_layers and config.loop == "closed" and config.predictor != "none":
        problem = "--parallel layers with loop='closed', where a layer waits for the one before; "
        problem += "use --parallel data"
    elif ranks.by_layers and config.shared:
        problem = "--parallel layers with a shared dictionary; use --parallel data"
    elif ranks.by_layers and ranks.size > len(config.layers):
        problem = f"--parallel layers with {len(config.layers)} layers; start at most as many ranks"
    if problem is not None:
        raise ValueError(f"train: {ranks.size} ranks and {problem}")


def _random(config: TrainConfig, calibration: Calibration, identity: ModelIdentity | None) -> ReSAE:
    inverse = [1.0 / s for s in calibration.scale]
    stack = new_stack(
        config.layers,
        calibration.predictor.rescaled(inverse),
        d_in=len(calibration.mean[0]),
        d_sae=config.d_saes,
        k=config.k,
        seed=config.seed,
        shared=config.shared,
        prefix_gain=config.prefix_gain if config.prefixes else 0.0,
        model=identity,
    )
    means = [mean * factor for mean, factor in zip(calibration.mean, inverse, strict=True)]
    if config.shared:
        means = [torch.stack(means).mean(0)] * len(means)
    for layer, mean in enumerate(means):
        if layer == 0 or not stack.chained:  # elsewhere the residual's mean is zero by construction
            stack.sae(layer).b_dec.data.copy_(mean)
    return stack


def _boosted(config: TrainConfig, calibration: Calibration) -> ReSAE:
    base = ReSAE.load(str(config.boost))
    has = (tuple(base.hook_points), base.predictor.kind, base.predictor.form)
    asked = (config.layers, config.predictor, config.form)
    if has != asked or base.boosted:
        boosted = ", boosted already" if base.boosted else ""
        raise ValueError(
            f"boost: {config.boost} has layers, predictor and form {has}{boosted}; expected {asked}"
        )
    if any(math.frexp(s)[0] != 0.5 for s in calibration.scale):
        raise ValueError(
            f"boost: scales {calibration.scale} are no powers of two, so that the base would not "
            f"keep its bits; take them from boost_calibration"
        )
    base.rescale_([1.0 / s for s in calibration.scale])
    saes = []
    for layer, (d_sae, k) in enumerate(zip(config.d_saes, config.k, strict=True)):
        sae = base.sae(layer)
        assert isinstance(sae, TopKSAE)
        # Other directions than the base began with.
        seed = config.seed * 1_000 + 500 + layer
        boost = TopKSAE(SAEConfig(base.d_in, d_sae, k), seed=seed)
        saes.append(BoostedSAE(sae, boost, keep=config.boost_keep))
    return ReSAE(base.hook_points, base.predictor, saes, base.model_identity)


# -- the loop --------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """What the log says of an interval."""

    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    seconds_left: float
    loss: float
    layers: list[LayerMetrics]
    delta_ce: Mapping[str, float] | None = None
    """Nats per held-out token lost by replacing all layers, by way of replacing; at intervals."""

    def line(self) -> str:
        fvu = " ".join(f"{m.fvu:.3f}" for m in self.layers)
        l0 = " ".join(f"{m.l0:.1f}" for m in self.layers)
        dead = " ".join(f"{m.dead_fraction:.1%}" for m in self.layers)
        hours, seconds = divmod(round(self.seconds_left), 3600)
        left = f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}"
        lost = "  ".join(f"ΔCE {way} {nats:.3f}" for way, nats in (self.delta_ce or {}).items())
        return (
            f"step {self.step}/{self.steps}  {self.tokens / 1e6:.2f}M tok  fvu {fvu}  l0 {l0}  "
            f"dead {dead}  {self.tokens_per_second / 1e3:.1f}k tok/s  left {left}"
            + (lost and f"  {lost}")
        )


def train(
    config: TrainConfig,
    source: ActivationSource,
    calibration: Calibration,
    out: Path,
    *,
    identity: ModelIdentity | None = None,
    device: str = "cpu",
    resume: bool = False,
    checkpoint_steps: int = 1_000,
    keep_checkpoints: int = 2,
    log_steps: int = 50,
    eval_steps: int | None = None,
    delta_ce: Callable[[ReSAE], Mapping[str, float]] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_checkpoint: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> ReSAE | None:
    """Train, log and checkpoint into `out`; save the finished stack there and return it.

    Args:
        source: batches of L raw activations `[batch_tokens / ranks, D]`.
        identity: the model, as recorded with the stack.
        resume: go on from the newest readable checkpoint of `out`, a folder that exists (from step
            0 if there is no checkpoint); with more `train_tokens` than before see `resumed_config`.
        checkpoint_steps, log_steps: intervals; a last checkpoint is written at the end.
        keep_checkpoints: so many stay, and one more while it is written: the newest, and of two or
            more one from before the learning rate falls.
        eval_steps: interval at which `delta_ce` measures a copy of the stack, for raw activations,
            on `device` (in the place that gradients take in a step); the run is the same without.
        on_checkpoint: called on every rank before a checkpoint is written: what belongs to it and
            is not of the weights.
        should_stop: asked after every step; if true, a checkpoint is written and None returned.
        ranks: several processes that train together, in a folder that all of them see; rank 0
            writes and reports, and all stop together.

    Raises:
        ValueError: the loss or the weights stopped being finite (no such state is saved; the batch
            is, in `nan_batch.safetensors`), or a checkpoint of another configuration.
        OSError: the disk is full; the checkpoints there are intact.
        FileNotFoundError: `resume`, and no folder `out`.
    """
    intervals = {
        "keep_checkpoints": keep_checkpoints,
        "checkpoint_steps": checkpoint_steps,
        "log_steps": log_steps,
        "eval_steps": eval_steps,
    }
    for name, value in intervals.items():
        if value is not None and value < 1:
            raise ValueError(f"train: {name}={value}, expected at least 1")
    if resume and not out.exists():
        raise FileNotFoundError(f"train: no folder {out} to resume from; look for the right one")
    if resume:
        config = resumed_config(config, out)
    require_divisible(config, ranks)
    begun = initial_state(config, calibration, identity, "cpu" if ranks.by_layers else device)
    state, step_config = _state_of_rank(begun, config, ranks, device)
    maps = begun.stack.predictor.to(device)
    own, first = ranks.own(len(config.layers)), ranks.rank == 0
    checkpoints, logged = out / "checkpoints", out / "log.jsonl"
    if first:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            remove_partial(out)
        else:
            logged.unlink(missing_ok=True)
    ranks.meet()  # nobody reads before
    if resume:
        left_behind = _load_newest(checkpoints, state, config, ranks)
        if first:
            _truncate_log(logged, state.step)
            for path in left_behind:
                path.unlink()
            if state.step < config.steps:  # the stack there is of fewer tokens
                (out / "resae.json").unlink(missing_ok=True)
    inverse = [1.0 / s for s in calibration.scale]
    batches = source.batches(state.position)
    pace = _Pace(config, state.step)
    unchecked: _Batch | None = None
    while state.step < config.steps:
        raw, state.position = next(batches)
        xs = [x.to(device) * factor for x, factor in zip(raw, inverse, strict=True)]
        if ranks.by_layers:
            xs = ranks.to_owners(_residuals(maps, xs))
        loss, measured = train_step(state, step_config, xs, ranks)
        last = state.step == config.steps
        due = last or state.step % checkpoint_steps == 0
        due |= state.step == config.common_steps and keep_checkpoints > 1
        measure = eval_steps is not None and (last or state.step % eval_steps == 0)
        report = measure or last or state.step % log_steps == 0
        # Asking for a loss waits for the device: while it works on this step, the host asks for the
        # one before.
        batch = _Batch(state.step, loss, raw)
        recent = [batch] if unchecked is None else [unchecked, batch]
        asked = recent if due or report else recent[:-1]
        bad = next((b for b in asked if not bool(b.loss.isfinite())), None)
        unchecked = batch
        stop, diverged = ranks.any(not last and should_stop(), bad is not None)
        if (stop or due) and not diverged:
            finite = all(bool(p.isfinite().all()) for p in state.stack.parameters())
            bad = None if finite and bool(loss.isfinite()) else batch
            (diverged,) = ranks.any(bad is not None)
        if diverged:
            raise ValueError(_diverged(recent, bad, out, config, ranks))
        if report:
            progress = pace.progress(state.step, _of_all_ranks(loss, measured, own, config, ranks))
            whole = _in_raw_units(state, begun, calibration, ranks) if measure else None
            if whole is not None and delta_ce is not None:
                progress = progress._replace(delta_ce=delta_ce(whole.to(device).eval()))
                del whole
            if first:
                _append(logged, progress)
                if on_progress is not None:
                    on_progress(progress)
        if stop or due:
            on_checkpoint()
            _save_checkpoint(checkpoints, state, config, keep_checkpoints, ranks)
        if stop:
            return None
    stack = _in_raw_units(state, begun, calibration, ranks)
    if stack is not None:
        stack.to("cpu").save_pretrained(out)
    ranks.meet()  # nobody reads before
    return ReSAE.load(out) if stack is None else stack.eval()


@torch.no_grad()
def _residuals(maps: AffinePredictor, xs: Sequence[Tensor]) -> list[Tensor]:
    """What the maps leave of L activations `[N, D]`."""
    bases = [maps(layer, xs) for layer in range(len(xs))]
    return [x if base is None else x - base for x, base in zip(xs, bases, strict=True)]


def _in_raw_units(
    state: TrainState, begun: TrainState, calibration: Calibration, ranks: Ranks
) -> ReSAE | None:
    """A copy of the whole stack as it is now, for raw activations, on rank 0; None elsewhere."""
    state.optimizer.zero_grad(set_to_none=True)  # makes room for the copy
    if ranks.by_layers:
        held = ranks.collect(_named(_changing(state.stack), ranks))
        for name, tensor in _changing(begun.stack).items() if held else ():
            tensor.data.copy_(held[name])
    if ranks.rank > 0:
        return None
    stack = copy.deepcopy(begun.stack)
    stack.rescale_(calibration.scale)
    return stack


def _of_all_ranks(
    loss: Tensor,
    measured: Sequence[Measured],
    own: Sequence[int],
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[float, list[LayerMetrics]]:
    """The loss and the measures of a batch, from each rank's part."""
    table = torch.zeros(len(config.layers), 4, dtype=torch.float64, device=loss.device)
    table[list(own)] = torch.stack([torch.stack([v.double() for v in row]) for row in measured])
    if ranks.by_data:
        table[:, 1:3] /= ranks.size  # of means over tokens, equally many on each rank
    total, *rows = ranks.sum(torch.cat([loss.double().view(1), table.flatten()])).tolist()
    return total, [LayerMetrics(*rows[i : i + 4]) for i in range(0, len(rows), 4)]


class _Pace:
    """How fast it goes since this process began."""

    def __init__(self, config: TrainConfig, first_step: int):
        self.config = config
        self.first_step = first_step
        self.started = time.perf_counter()

    def progress(self, step: int, of_batch: tuple[float, list[LayerMetrics]]) -> Progress:
        tokens = self.config.batch_tokens
        seconds = max(1e-9, time.perf_counter() - self.started)
        rate = (step - self.first_step) * tokens / seconds
        return Progress(
            step=step,
            steps=self.config.steps,
            tokens=step * tokens,
            tokens_per_second=rate,
            seconds_left=(self.config.steps - step) * tokens / rate,
            loss=of_batch[0],
            layers=of_batch[1],
        )


class _Batch(NamedTuple):
    """What was trained on, until it is known that the loss is finite."""

    step: int
    loss: Tensor
    raw: list[Tensor]


def _diverged(
    recent: Sequence[_Batch], bad: _Batch | None, out: Path, config: TrainConfig, ranks: Ranks
) -> str:
    """Save the batch that it happened on, each rank its share, and say so."""
    step = max(step for (step,) in ranks.every([-1 if bad is None else bad.step]))
    batch = next(b for b in recent if b.step == step)
    path = out / f"nan_batch{f'.rank{ranks.rank}' if ranks.size > 1 else ''}.safetensors"
    tensors = dict(zip(config.layers, batch.raw, strict=True))
    save_tensors(path, {**tensors, "step": torch.tensor(batch.step)})
    if any(ranks.any(not all(bool(x.isfinite().all()) for x in batch.raw))):
        remedy = "hold NaN or inf; look there, or load the model in float32 or bfloat16"
    else:
        remedy = f"are finite: train with a lower lr (now {config.peak_lr:g}) or clip_norm"
    return (
        f"training: loss is {float(batch.loss)} at step {batch.step}, or the weights after it are "
        f"not finite; no such state is saved. The step's raw activations, in {path}, {remedy}, "
        f"into another --out"
    )


def _append(path: Path, progress: Progress) -> None:
    record = progress._asdict()
    record["layers"] = [m._asdict() for m in progress.layers]
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}); checkpoints are intact") from error


def _truncate_log(path: Path, step: int) -> None:
    """Drop lines that steps after the checkpoint had written."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off in the middle by the interruption
        return math.inf


# -- checkpoints -----------------------------------------------------------------------------------


def _save_checkpoint(
    folder: Path, state: TrainState, config: TrainConfig, keep: int, ranks: Ranks
) -> None:
    tensors = ranks.collect(_named(_tensors(state), ranks))
    positions = ranks.every(state.position)
    if ranks.rank > 0:
        return
    metadata = {
        "step": str(state.step),
        "positions": json.dumps(positions),
        "config": json.dumps(asdict(config)),
    }
    path = folder / f"step_{state.step:08d}.safetensors"
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    except OSError as error:
        kept = [path.name for path in _checkpoints(folder)]
        intact = f"{kept[-1]} is intact, go on from it with --resume" if kept else "there is none"
        raise OSError(f"{error}; of the earlier checkpoints {intact}") from error
    there = _checkpoints(folder)
    kept, common = there[-keep:], [p for p in there if _step_in(p) <= config.common_steps]
    if keep > 1 and common:  # from there a run of more tokens can go on
        kept = [common[-1], *kept[1:]] if common[-1] not in kept else kept
    for old in set(there) - set(kept):
        old.unlink()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    tensors = dict(_changing(state.stack))
    for name, parameter in state.stack.named_parameters():
        for entry, t in state.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = t
    for i, since in enumerate(state.tokens_since_fired):
        tensors[f"saes.{i}.tokens_since_fired"] = since
    return tensors


def _named(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The same by the names that they have in the whole stack: `saes.{layer}.…`."""
    if not ranks.by_layers:
        return tensors
    named = {}
    for name, tensor in tensors.items():
        saes, i, rest = name.split(".", 2)
        named[f"{saes}.{ranks.rank + int(i) * ranks.size}.{rest}"] = tensor
    return named


def _changing(stack: ReSAE) -> dict[str, Tensor]:
    """What training may change, by name, each once: all but the maps, which are the
    calibration's."""
    named = chain(stack.named_parameters(), stack.named_buffers())
    return {name: tensor for name, tensor in named if not name.startswith("predictor.")}


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    named = re.compile(r"step_\d{8}\.safetensors")
    return sorted(p for p in folder.glob("step_*") if named.fullmatch(p.name))


def _step_in(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step_"))


def resumed_config(config: TrainConfig, out: Path) -> TrainConfig:
    """`config` as the run in `out` goes on with it.

    With more `train_tokens` the run goes on from its newest checkpoint that the longer run shares:
    from before the learning rate fell. It ends as a run of that length from the start would have,
    with the `warmup_steps` and `dead_after_tokens` of the shorter one.

    Returns:
        `config`, with these two as the run has them where `config` leaves them open.

    Raises:
        ValueError: the run has other settings, or no checkpoint that the longer run shares.
    """
    found = [(path, begun) for path in _checkpoints(out / "checkpoints") if (begun := _begun(path))]
    if not found:
        return config
    path, begun = found[-1]
    longer = config.train_tokens > begun.train_tokens
    warmup = begun.rising_steps if longer else begun.warmup_steps
    dead_after = begun.dead_tokens if longer else begun.dead_after_tokens
    if config.warmup_steps is None:
        config = replace(config, warmup_steps=warmup)
    if config.dead_after_tokens is None:
        config = replace(config, dead_after_tokens=dead_after)
    of_run = replace(begun, warmup_steps=warmup, dead_after_tokens=dead_after)
    if longer:
        of_run = replace(of_run, train_tokens=config.train_tokens)
    changed = [f.name for f in fields(config) if getattr(of_run, f.name) != getattr(config, f.name)]
    if changed:
        raise ValueError(
            f"--resume: {path} was trained with other settings "
            f"({', '.join(f'{name}={getattr(of_run, name)}' for name in sorted(changed))}); use "
            f"the same (train_tokens may rise), or another --out"
        )
    common = begun.common_steps
    if longer and common and not any(_step_in(p) <= begun.common_steps for p, begun in found):
        raise ValueError(
            f"--resume: no checkpoint of {out} is from before step {common}, after which a run of "
            f"more than {begun.train_tokens:,} tokens differs (its learning rate falls later); "
            f"train anew, with --keep-checkpoints 2 or more"
        )
    return config


def _begun(checkpoint: Path) -> TrainConfig | None:
    """The configuration that a checkpoint was trained with; None if it is damaged."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            saved = json.loads(file.metadata()["config"])
    except SafetensorError:
        return None
    settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items()}
    return TrainConfig(**settings)


def _load_newest(folder: Path, state: TrainState, config: TrainConfig, ranks: Ranks) -> list[Path]:
    """Bring `state` to the newest checkpoint that can be read and that `config` shares; a damaged
    one is named and passed over.

    Returns:
        Checkpoints of a shorter run that come after it.
    """
    left_behind = []
    for path in reversed(_checkpoints(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, error)
            continue
        begun = _begun(path)
        assert begun is not None
        if begun.train_tokens < config.train_tokens and _step_in(path) > begun.common_steps:
            left_behind.append(path)
            continue
        positions = json.loads(metadata["positions"])
        if len(positions) != ranks.size:
            raise ValueError(
                f"--resume: {path} is of {len(positions)} ranks, here are {ranks.size}; start as "
                f"many"
            )
        _restore(state, tensors, ranks)
        state.step = int(metadata["step"])
        state.position = Position(*positions[ranks.rank])
        break
    else:
        log.warning("no checkpoint in %s to go on from: training starts from step 0", folder)
    if len({step for (step,) in ranks.every([state.step])}) > 1:
        raise ValueError(f"--resume: ranks see different checkpoints in {folder}; share the folder")
    return left_behind


@torch.no_grad()
def _restore(state: TrainState, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    for name, parameter in state.stack.named_parameters():
        (whole_name,) = _named({name: parameter}, ranks)
        entries = {
            key.removeprefix(f"{whole_name}/"): tensor.to(parameter.device)
            for key, tensor in tensors.items()
            if key.startswith(f"{whole_name}/")
        }
        if entries:
            state.optimizer.state[parameter] = entries
    for name, tensor in _named(_tensors(state), ranks).items():
        tensor.copy_(tensors[name])
