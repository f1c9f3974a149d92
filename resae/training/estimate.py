"""Estimate of time and memory of a training run, from sizes alone, before anything runs.

Memory of weights, gradients, Adam's moments, the buffer and checkpoints is exact; activations of a
step are counted in streams `[N, D]`. Time is a cost model, never a measurement: the larger of FLOPs
over the peak product rate and bytes over the peak bandwidth, both times a `utilisation` that is
assumed. AuxK is left out: it adds an encode of the dead latents alone.

What scales how with R ranks: the language model, calibration and buffer take 1/R of the time; by
data the SAE step computes 1/R, but every rank updates all autoencoders and sums their gradients; by
layers a rank has ⌈L/R⌉ autoencoders, weights and moments are divided, and residuals move.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch

from resae.models.hooked import HookedLM
from resae.stack.fit import Moments
from resae.training.config import OnlineConfig, TrainConfig
from resae.training.distributed import Ranks
from resae_kernels.memory import WORKSPACE_BYTES

STREAMS = 6
"""Tensors `[N, D]` in float32 that a layer holds until the backward: the raw and the scaled
activation, the prediction, the reconstruction, the error and its gradient."""

LOGIT_COPIES = 6
"""Tensors `[N, V]` of an online step: the logits of both passes, their two log-softmax, the
probabilities and the gradient."""


@dataclass(frozen=True)
class Device:
    """Peaks per second, of one device. The defaults are the H200's data sheet, not measured."""

    name: str = "H200 (data sheet)"
    half: float = 989e12
    """FLOPs of dense bfloat16 products."""
    single: float = 67e12
    """FLOPs of float32 products (TF32 off, torch's default)."""
    double: float = 67e12
    """FLOPs of float64 products."""
    bandwidth: float = 4.8e12
    """Bytes of memory traffic."""
    link: float = 450e9
    """Bytes to other devices, one way."""
    utilisation: float = 0.5
    """Share of these peaks that is assumed to be reached."""


class ModelSizes(NamedTuple):
    """Sizes of a language model."""

    name: str
    d_model: int
    parameters: int
    flops_per_token: float
    """FLOPs of a forward pass that stops at the last selected layer."""
    weights_read: int
    """Parameters that such a pass reads."""

    @classmethod
    def of(cls, lm: HookedLM, layers: tuple[str, ...], context_tokens: int) -> "ModelSizes":
        """From the shapes alone: products of the blocks, and attention over the whole row."""
        last = max(lm.hook_points(layers)).layer
        inside = [p for block in list(lm.blocks)[: last + 1] for p in block.parameters()]
        config = lm.config
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        products = 2.0 * sum(p.numel() for p in inside if p.ndim == 2)
        # Weights of experts, [experts, ., .]: a token goes through a few of them.
        chosen = getattr(config, "num_experts_per_tok", None) or 0
        products += 2.0 * sum(p[0].numel() * min(chosen, len(p)) for p in inside if p.ndim == 3)
        attention = 4.0 * context_tokens * width * (last + 1)
        everything = sum(p.numel() for p in lm.model.parameters())
        read = sum(p.numel() for p in inside)
        return cls(lm.name, lm.d_model, everything, products + attention, read)


class Phase(NamedTuple):
    """One part of the work, per rank and second of the device."""

    name: str
    tokens: int
    """Total tokens over all ranks."""
    flops: float
    """Per token."""
    bytes: float
    """Per token, of memory traffic."""
    seconds: float
    """Per token of the whole run."""


class RunEstimate(NamedTuple):
    """The estimate; bytes are per rank unless stated otherwise."""

    phases: list[Phase]
    tokens_per_second: float
    """Training speed over all ranks, without the calibration."""
    hours: float
    device_memory: dict[str, int]
    host_memory: dict[str, int]
    disk: dict[str, int]
    """Bytes of all ranks together."""
    settings: dict[str, Any]

    def table(self) -> str:
        """For people."""
        s = self.settings
        lines = [
            f"estimate (a cost model, nothing was measured): {s['model']}, layers "
            f"{', '.join(s['layers'])}, M = {_join(s['d_sae'])}, k = {s['k']}, "
            f"{s['train_tokens']:,} tokens, {s['batch_tokens']:,} per step",
            f"{s['ranks']} × {s['device']}, by {s['parallelism']}; {s['utilisation']:.0%} of its "
            f"peaks assumed",
            "",
            f"{'phase':<18}{'tokens':>16}{'GFLOP/token':>13}{'MB/token':>11}{'hours':>9}",
        ]
        for phase in self.phases:
            hours = phase.seconds * phase.tokens / 3600
            lines.append(
                f"{phase.name:<18}{phase.tokens:>16,}{phase.flops / 1e9:>13.3f}"
                f"{phase.bytes / 1e6:>11.3f}{hours:>9.2f}"
            )
        lines.append(
            f"{'all':<18}{'':>16}{'':>13}{'':>11}{self.hours:>9.2f}   "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )
        for title, parts in (
            ("device memory per rank", self.device_memory),
            ("host memory per rank", self.host_memory),
            ("disk", self.disk),
        ):
            said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
            lines.append(f"{title}: {sum(parts.values()) / 1e9:.2f} GB ({said})")
        return "\n".join(lines)


def _join(numbers: int | Sequence[int]) -> str:
    several = (numbers,) if isinstance(numbers, int) else numbers
    return " + ".join(f"{number:,}" for number in several)


def estimate_run(
    config: TrainConfig,
    model: ModelSizes,
    *,
    device: Device = Device(),  # noqa: B008
    ranks: Ranks = Ranks(),  # noqa: B008
    model_dtype: torch.dtype = torch.float32,
    context_tokens: int = 128,
    model_rows: int = 16,
    keep_checkpoints: int = 2,
    checkpoint_steps: int = 1_000,
    cache_dtype: torch.dtype | None = None,
) -> RunEstimate:
    """The estimate for one run.

    Args:
        ranks: how many, and by data or by layers; `rank` is of no account.
        model_dtype: of the language model and the buffer; float32 or 16 bit.
        cache_dtype: of an activation cache; None: there is none.
    """
    work = _Work(config, model, device, ranks, model_dtype)
    phases = _phases(work, model_rows * context_tokens)
    training = sum(phase.seconds for phase in phases[1:])
    calibration = phases[0].seconds * config.calibration_tokens
    hours = (training * config.train_tokens + calibration) / 3600
    return RunEstimate(
        phases,
        1 / training,
        hours,
        _device_memory(work),
        _host_memory(work),
        _disk(work, keep_checkpoints, cache_dtype),
        _settings(work, checkpoint_steps),
    )


def estimate_online(
    config: OnlineConfig,
    lm: HookedLM,
    context_tokens: int,
    *,
    device: Device = Device(),  # noqa: B008
    model_dtype: torch.dtype = torch.float32,
    keep_checkpoints: int = 2,
    checkpoint_steps: int = 1_000,
) -> RunEstimate:
    """The estimate for an online training of one process: the plain pass, and forward and backward
    of the replaced one, through the whole model.

    Activations of the model are counted as inputs and outputs of the products of its blocks (with
    gradient checkpointing the streams between blocks, and one block), logits in `LOGIT_COPIES`
    tensors of float32.

    Args:
        lm: the model, or its shapes (`HookedLM.described`).
    """
    V, D = int(lm.config.vocab_size), lm.d_model
    blocks = ModelSizes.of(lm, (f"blocks.{lm.n_layers - 1}.hook_resid_post",), context_tokens)
    model = blocks._replace(
        flops_per_token=blocks.flops_per_token + 2.0 * D * V, weights_read=blocks.parameters
    )
    work = _Work(config, model, device, Ranks(), model_dtype)
    size = model_dtype.itemsize
    moved = model.weights_read * size / config.batch_tokens
    rate = device.half if size == 2 else device.single
    one = work.seconds(model.flops_per_token, moved, rate)
    # The backward has the products of the forward for the stream's gradient, none for weights.
    passes = {
        "plain pass": 2 if config.accumulation_steps > 1 else 1,
        "replaced pass": 1,
        "backward": 2 if config.gradient_checkpointing else 1,
    }
    T, flops = config.train_tokens, model.flops_per_token
    step = _step_phase(work)
    phases = [Phase(name, T, n * flops, n * moved, n * one) for name, n in passes.items()]
    # On the plain activations and in the replaced pass.
    phases.append(
        step._replace(flops=2 * step.flops, bytes=2 * step.bytes, seconds=2 * step.seconds)
    )
    tokens = ceil(config.batch_tokens / config.accumulation_steps)
    kept = _block_activations(lm)
    if config.gradient_checkpointing:
        activations = tokens * size * (lm.n_layers * D + max(kept))
    else:
        activations = tokens * size * sum(kept)
    memory = _device_memory(work)
    del memory["buffer"]
    memory["step"] *= 2
    memory["activations of the model"] = activations
    memory["logits"] = tokens * V * 4 * LOGIT_COPIES
    host = _host_memory(work)
    del host["moments"]
    training = sum(phase.seconds for phase in phases)
    return RunEstimate(
        phases,
        1 / training,
        training * T / 3600,
        memory,
        host,
        _disk(work, keep_checkpoints, None),
        _settings(work, checkpoint_steps),
    )


def _block_activations(lm: HookedLM) -> list[int]:
    """Numbers per token that the backward of each block needs: inputs and outputs of its products,
    and two streams that are normalised."""
    counts = []
    for block in lm.blocks:
        products = [p for p in block.parameters() if p.ndim == 2]
        counts.append(sum(sum(p.shape) for p in products) + 2 * lm.d_model)
    return counts


class _Work(NamedTuple):
    """A run, and the sizes of a step on its fullest rank."""

    config: TrainConfig
    model: ModelSizes
    device: Device
    ranks: Ranks
    model_dtype: torch.dtype

    @property
    def own_d_saes(self) -> tuple[int, ...]:
        """`d_sae` of each layer on the rank with the most: layers are dealt out one by one."""
        d_saes, R = self.config.d_saes, self.ranks.size
        shares = [d_saes[rank::R] for rank in range(R)] if self.ranks.by_layers else [d_saes]
        return max(shares, key=lambda share: (len(share), sum(share)))

    @property
    def parameters(self) -> int:
        """Numbers in the autoencoders of the rank."""
        d_saes = self.own_d_saes[:1] if self.config.shared else self.own_d_saes
        return sum(_parameters(M, self.model.d_model) for M in d_saes)

    @property
    def optimizer_numbers(self) -> int:
        """Numbers that Adam keeps for the autoencoders of the rank."""
        d_saes = self.own_d_saes[:1] if self.config.shared else self.own_d_saes
        return sum(_optimizer_numbers(self.config, M, self.model.d_model) for M in d_saes)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step that an autoencoder sees on one rank."""
        N = self.config.batch_tokens
        return N if self.ranks.by_layers else N // self.ranks.size

    @property
    def k(self) -> int:
        """Largest k of a layer."""
        return max(self.config.k)

    @property
    def moments(self) -> Moments:
        """Moments that the maps are fitted on; of width 1, since only their blocks are counted."""
        return Moments(len(self.config.layers), 1, self.config.predictor)

    def seconds(self, flops: float, moved: float, rate: float) -> float:
        """Time of `flops` at `rate` per second, or of moving so many bytes: the longer."""
        return max(flops / rate, moved / self.device.bandwidth) / self.device.utilisation


def _phases(work: _Work, tokens_per_pass: int) -> list[Phase]:
    """The calibration, then the parts of the training. Seconds are per token of the whole run,
    spread over the ranks where each has its share."""
    config, model, device, R = work.config, work.model, work.device, work.ranks.size
    L, D, T = len(config.layers), model.d_model, config.train_tokens
    products = device.half if work.model_dtype.itemsize == 2 else device.single
    lm_bytes = model.weights_read * work.model_dtype.itemsize / tokens_per_pass
    lm = work.seconds(model.flops_per_token, lm_bytes, products) / R
    fit_flops = 2.0 * len(work.moments.blocks) * D * D
    fit_bytes = 8.0 * L * D
    fit = work.seconds(fit_flops, fit_bytes, device.double) / R
    buffer_bytes = 2.0 * L * D * (work.model_dtype.itemsize + 4)
    buffer = work.seconds(0, buffer_bytes, products) / R
    calibration = Phase(
        "calibration",
        config.calibration_tokens,
        model.flops_per_token + fit_flops,
        lm_bytes + fit_bytes,
        lm + fit,
    )
    return [
        calibration,
        Phase("language model", T, model.flops_per_token, lm_bytes, lm),
        Phase("buffer", T, 0.0, buffer_bytes, buffer),
        _step_phase(work),
        *([_exchange_phase(work)] if R > 1 else []),
    ]


def _step_phase(work: _Work) -> Phase:
    """Forward, backward and update of the autoencoders."""
    config, D, N = work.config, work.model.d_model, work.config.batch_tokens
    encodes = 2 if config.accumulation_steps > 1 else 1
    maps = 0 if config.predictor in ("none", "identity") else 2.0 * D * D
    Ms, tokens_here = work.own_d_saes, work.step_tokens

    def flops_of(d_saes: Sequence[int]) -> float:
        return sum(2.0 * D * M * encodes + 8.0 * work.k * D + maps for M in d_saes)

    # Gradient, Adam's six passes, the decoder's norms.
    update = 4.0 * work.parameters * (3 + 6 + 4)
    gathers = 4.0 * work.k * D * 4 + STREAMS * D * 4 * 2
    read = encodes * sum(Ms) * D * (2 if config.autocast else 4)
    share = tokens_here / N  # of the tokens, on this rank
    rate = work.device.half if config.autocast else work.device.single
    compute = work.seconds(flops_of(Ms) * share, len(Ms) * share * gathers, rate)
    compute += (read + update) / N / work.device.bandwidth / work.device.utilisation
    moved = len(config.layers) * gathers + (read + update) / tokens_here
    return Phase("SAE step", config.train_tokens, flops_of(config.d_saes), moved, compute)


def _exchange_phase(work: _Work) -> Phase:
    """Traffic between ranks: gradients by data, residuals by layers."""
    config, R = work.config, work.ranks.size
    moved = 0.0
    if work.ranks.by_data:
        moved = 2.0 * work.parameters * 4 * (R - 1) / R / config.batch_tokens
    elif work.ranks.by_layers:
        moved = len(config.layers) * work.model.d_model * 4 * (R - 1) / R / R
    seconds = moved / work.device.link / work.device.utilisation
    return Phase("exchange", config.train_tokens, 0.0, moved, seconds)


def _device_memory(work: _Work) -> dict[str, int]:
    config, D, N = work.config, work.model.d_model, work.config.batch_tokens
    held, tokens_here = len(work.own_d_saes), work.step_tokens
    buffer_dtype: torch.dtype = getattr(torch, config.buffer_dtype)
    rows = (config.buffer_tokens // N) * (N // work.ranks.size)
    own = 4 * work.parameters
    code = held * tokens_here * work.k * (4 + 8)
    return {
        "language model": work.model.parameters * work.model_dtype.itemsize,
        "autoencoders": own,
        "gradients": own,
        "Adam": 4 * work.optimizer_numbers,
        "maps": 4 * sum(_map_sizes(config, D)),
        "buffer": len(config.layers) * D * buffer_dtype.itemsize * rows,
        "step": held * tokens_here // config.accumulation_steps * D * 4 * STREAMS + code,
        "encode": WORKSPACE_BYTES["cuda"],
    }


def _host_memory(work: _Work) -> dict[str, int]:
    L, D = len(work.config.layers), work.model.d_model
    return {
        "language model while loading": work.model.parameters * work.model_dtype.itemsize,
        "moments": 8 * (len(work.moments.blocks) * D * D + L * (D + 1)),
        "checkpoint": checkpoint_bytes(work.config, D),
    }


def _disk(work: _Work, keep: int, cache_dtype: torch.dtype | None) -> dict[str, int]:
    config, D = work.config, work.model.d_model
    disk = {
        f"checkpoints, {keep} and one being written": checkpoint_bytes(config, D) * (keep + 1),
        "stack": 4 * sum(_parameters(M, D) for M in config.d_saes),
    }
    if cache_dtype is not None:
        cached = config.train_tokens * len(config.layers) * D * cache_dtype.itemsize
        disk["activation cache"] = cached
    return disk


def _settings(work: _Work, checkpoint_steps: int) -> dict[str, Any]:
    """Settings that the estimate is of, as its table shows them."""
    config = work.config
    return {
        "model": work.model.name,
        "layers": [name.removesuffix(".hook_resid_post") for name in config.layers],
        "d_sae": config.d_sae,
        "k": work.k,
        "train_tokens": config.train_tokens,
        "batch_tokens": config.batch_tokens,
        "checkpoints": ceil(config.steps / checkpoint_steps),
        "ranks": work.ranks.size,
        "parallelism": work.ranks.parallelism,
        "device": work.device.name,
        "utilisation": work.device.utilisation,
    }


def checkpoint_bytes(config: TrainConfig, d_in: int) -> int:
    """Tensors of one checkpoint: weights, two moments and a step count for each of four parameters,
    and a counter per latent."""
    Ms = config.d_saes[:1] if config.shared else config.d_saes
    return sum(
        4 * (_parameters(M, d_in) + _optimizer_numbers(config, M, d_in)) + 4 * 4 + 8 * M for M in Ms
    )


def _parameters(M: int, d_in: int) -> int:
    """Numbers in one autoencoder."""
    return 2 * M * d_in + M + d_in


def _optimizer_numbers(config: TrainConfig, M: int, d_in: int) -> int:
    """Numbers that Adam keeps for one autoencoder: two moments, or, of low rank, of two matrices
    the factors and their moments."""
    rank = config.update_rank if isinstance(config, OnlineConfig) else None
    if rank is None or rank >= min(M, d_in):
        return 2 * _parameters(M, d_in)
    return 2 * 3 * rank * (M + d_in) + 2 * (M + d_in)


def _map_sizes(config: TrainConfig, d_in: int) -> list[int]:
    """Numbers in each map and its offset, in a full map."""
    if config.predictor == "none":
        return []
    every = config.predictor == "all_previous"
    sources = [layer if every else 1 for layer in range(1, len(config.layers))]
    return [n * d_in * d_in + d_in for n in sources]
