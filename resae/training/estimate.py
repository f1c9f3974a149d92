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
from resae.training.config import TrainConfig
from resae.training.distributed import Ranks
from resae_kernels.memory import WORKSPACE_BYTES

STREAMS = 6
"""Tensors `[N, D]` in float32 that a layer holds until the backward: the raw and the scaled
activation, the prediction, the reconstruction, the error and its gradient."""


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
    L, D, N = len(config.layers), model.d_model, config.batch_tokens
    R, k = ranks.size, max(config.k)
    # d_sae of each layer on the fullest rank: layers are dealt out one by one.
    shares = [config.d_saes[rank::R] for rank in range(R)] if ranks.by_layers else [config.d_saes]
    Ms = max(shares, key=lambda share: (len(share), sum(share)))
    held = len(Ms)
    tokens_here = N if ranks.by_layers else N // R  # of a step, per autoencoder
    half = model_dtype.itemsize == 2
    products = device.half if half else device.single
    sae_products = device.half if config.autocast else device.single
    parameters = sum(_parameters(M, D) for M in (Ms[:1] if config.shared else Ms))

    def seconds(flops: float, moved: float, rate: float) -> float:
        return max(flops / rate, moved / device.bandwidth) / device.utilisation

    # Per token of the whole run, spread over the ranks where each has its share.
    lm_bytes = model.weights_read * model_dtype.itemsize / (model_rows * context_tokens)
    lm = seconds(model.flops_per_token, lm_bytes, products) / R

    moments = Moments(L, 1, config.predictor)
    fit_flops = 2.0 * len(moments.blocks) * D * D
    fit_bytes = 8.0 * L * D
    fit = seconds(fit_flops, fit_bytes, device.double) / R

    encodes = 2 if config.accumulation_steps > 1 else 1
    maps = 0 if config.predictor in ("none", "identity") else 2.0 * D * D

    def flops_of(d_saes: Sequence[int]) -> float:
        return sum(2.0 * D * M * encodes + 8.0 * k * D + maps for M in d_saes)

    step_flops = flops_of(config.d_saes)
    update = 4.0 * parameters * (3 + 6 + 4)  # gradient, Adam's six passes, the decoder's norms
    gathers = 4.0 * k * D * 4 + STREAMS * D * 4 * 2
    read = encodes * sum(Ms) * D * (2 if config.autocast else 4)
    step_bytes = L * gathers + (read + update) / tokens_here
    share = tokens_here / N  # of the tokens, on this rank
    compute = seconds(flops_of(Ms) * share, held * share * gathers, sae_products)
    compute += (read + update) / N / device.bandwidth / device.utilisation
    moved = 0.0
    if ranks.by_data:
        moved = 2.0 * parameters * 4 * (R - 1) / R / N
    elif ranks.by_layers:
        moved = L * D * 4 * (R - 1) / R / R
    exchange = moved / device.link / device.utilisation

    buffer_bytes = 2.0 * L * D * (model_dtype.itemsize + 4)
    buffer = seconds(0, buffer_bytes, products) / R

    T = config.train_tokens
    phases = [
        Phase(
            "calibration",
            config.calibration_tokens,
            model.flops_per_token + fit_flops,
            lm_bytes + fit_bytes,
            lm + fit,
        ),
        Phase("language model", T, model.flops_per_token, lm_bytes, lm),
        Phase("buffer", T, 0.0, buffer_bytes, buffer),
        Phase("SAE step", T, step_flops, step_bytes, compute),
    ]
    if R > 1:
        phases.append(Phase("exchange", T, 0.0, moved, exchange))
    training = sum(phase.seconds for phase in phases[1:])

    buffer_dtype: torch.dtype = getattr(torch, config.buffer_dtype)
    buffered = L * D * buffer_dtype.itemsize * (config.buffer_tokens // N) * (N // R)
    checkpoint = checkpoint_bytes(config, D)
    own = 4 * parameters
    code = held * tokens_here * k * (4 + 8)
    device_memory = {
        "language model": model.parameters * model_dtype.itemsize,
        "autoencoders": own,
        "gradients": own,
        "Adam": 2 * own,
        "maps": 4 * sum(_map_sizes(config, D)),
        "buffer": buffered,
        "step": held * tokens_here // config.accumulation_steps * D * 4 * STREAMS + code,
        "encode": WORKSPACE_BYTES["cuda"],
    }
    host = {
        "language model while loading": model.parameters * model_dtype.itemsize,
        "moments": 8 * (len(moments.blocks) * D * D + L * (D + 1)),
        "checkpoint": checkpoint,
    }
    disk = {
        f"checkpoints, {keep_checkpoints} and one being written": checkpoint
        * (keep_checkpoints + 1),
        "stack": 4 * sum(_parameters(M, D) for M in config.d_saes),
    }
    if cache_dtype is not None:
        disk["activation cache"] = T * L * D * cache_dtype.itemsize
    settings = {
        "model": model.name,
        "layers": [name.removesuffix(".hook_resid_post") for name in config.layers],
        "d_sae": config.d_sae,
        "k": k,
        "train_tokens": T,
        "batch_tokens": N,
        "checkpoints": ceil(config.steps / checkpoint_steps),
        "ranks": R,
        "parallelism": ranks.parallelism,
        "device": device.name,
        "utilisation": device.utilisation,
    }
    hours = (training * T + phases[0].seconds * config.calibration_tokens) / 3600
    return RunEstimate(phases, 1 / training, hours, device_memory, host, disk, settings)


def checkpoint_bytes(config: TrainConfig, d_in: int) -> int:
    """Tensors of one checkpoint: weights, two moments and a step count for each of four parameters,
    and a counter per latent."""
    Ms = config.d_saes[:1] if config.shared else config.d_saes
    return sum(3 * 4 * _parameters(M, d_in) + 4 * 4 + 8 * M for M in Ms)


def _parameters(M: int, d_in: int) -> int:
    """Numbers in one autoencoder."""
    return 2 * M * d_in + M + d_in


def _map_sizes(config: TrainConfig, d_in: int) -> list[int]:
    """Numbers in each map and its offset, in a full map."""
    if config.predictor == "none":
        return []
    every = config.predictor == "all_previous"
    sources = [layer if every else 1 for layer in range(1, len(config.layers))]
    return [n * d_in * d_in + d_in for n in sources]
