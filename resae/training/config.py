"""Settings of a training run, their defaults and their limits.

`RunConfig` holds what a user asks for; `TrainConfig` what the training loop gets once the model is
known. Nothing here imports torch.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from resae.arguments import (
    compared,
    filled,
    numbers,
    one_k,
    real,
    whole,
    writable,
)
from resae.arguments import device as device_name
from resae.arguments import seed as seed_number
from resae.choices import (
    DTYPES,
    Loop,
    MapType,
    Objective,
    Parallelism,
    PredictorKind,
    check_map_type,
)
from resae.data.config import Machine, Source
from resae.settings import Shown, make, read_file

WARMUP = 0.05
"""Share of the steps over which the learning rate rises from 0, where no number is given."""
DECAY = 0.2
"""Share of the steps, at the end, over which it falls back to 0."""
IDLE_FIRINGS = 64
"""Mean distances between two firings after which an idle latent counts as dead. On a layer of
Gemma-3-270M, reviving that early costs nothing in FVU and leaves far fewer latents silent than
waiting for an eighth of the training (`bench/results/real/dead.md`)."""

NO_GAIN = {"hook_attn_out": (0.95, 1.37, 2.22), "hook_mlp_out": (1.00, 1.33, 1.53)}
"""Hook points where predicting a layer from others gained nothing: online Δ CE of ReSAE over that
of raw SAEs of the same k and of raw SAEs with as many active latents in total, and that of identity
residuals over the first, in the demo (embedded model, blocks 1, 3 and 5, k = 8, seed 0)."""


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """Optimiser."""

    batch_tokens: Annotated[int, whole(1)] = 1_024
    """Tokens per step; `resae finetune`: a multiple of the run's context."""
    warmup_steps: Annotated[float | None, real(least=0)] = None
    """Steps over which the learning rate rises from 0; None: a twentieth of all."""
    auxk_coefficient: Annotated[float, real(least=0)] = 1 / 32
    """Weight of the loss that revives dead latents."""
    clip_norm: Annotated[float | None, real(above=0)] = None
    """The gradient of all layers together is scaled down to this norm; None: never."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(OptimiserSettings):
    """Training."""

    loop: Annotated[str, Loop] = "open"
    """Residuals are taken against predictions from true activations (open) or from reconstructions
    (closed)."""
    shared: bool = False
    """One dictionary for all layers (MLSAE, arXiv 2409.04185); needs predictor none and equal k. A
    latent that fires on a token in any layer is alive."""
    prefixes: Annotated[tuple[int, ...] | None, compared] = None
    """The error is the mean over the reconstructions of the j strongest latents for each of these
    numbers j, rising and ending with k, for example 1,2,4,8 (HierarchicalTopK, arXiv 2505.24473);
    None: that of all k. Each adds a gradient [M, D]: powers of two cost less than every j."""
    prefix_gain: Annotated[float, real(least=0, most=1)] = 1 / 8
    """With prefixes: when only the j strongest latents are decoded, their acts are scaled by
    (k/j)^this; 0: not at all, as in the paper."""
    boost: Annotated[str | None, filled, Shown("RUN")] = None
    """Folder of a trained stack, which stays as it is: beside each of its autoencoders a second one
    is trained on the error of the first on this data (SAE Boost, arXiv 2507.12990). Layers and maps
    are the stack's; k and d_sae are of the second autoencoders."""
    boost_keep: Annotated[float, real(above=0, most=1)] = 0.1
    """With boost: share of the second autoencoders' acts in training that their threshold lets
    through in use."""
    first_sae: Annotated[str | None, filled, Shown("FOLDER")] = None
    """Folder of an autoencoder of activations that the first layer keeps, untrained: of a saved
    stack, or written by `resae convert --to resae`. k and d_sae of the first layer have to be its
    own (k: the slots of a code of one with thresholds)."""
    train_tokens: Annotated[int, whole(1)] = 1_000_000
    """Tokens to train on; the data starts over if it is shorter. A run can be resumed with more."""
    buffer_tokens: Annotated[int, whole(1)] = 65_536
    """Tokens whose activations are shuffled together."""
    buffer_dtype: Annotated[str, DTYPES] = "bfloat16"
    """Data type of the activations in that buffer; bfloat16 rounds each entry to 8 bits, a relative
    error of at most 1/512, in half the memory of float32."""
    lr: Annotated[float | None, real(above=0)] = None
    """Peak learning rate of Adam; None: 8e-3 · sqrt(512 / d_sae), in each layer by its own
    d_sae."""
    dead_after_tokens: Annotated[int | None, whole(1)] = None
    """Tokens without firing after which a latent counts as dead and is revived; None: 64 times the
    mean distance between two firings, d_sae / k, and at most an eighth of train_tokens."""
    accumulation_steps: Annotated[int, whole(1)] = 1
    """Pieces that a batch is cut into, one after the other: less memory, the same weights. More
    than one costs a second encode, for the sums over the whole batch that the loss divides by."""
    autocast: bool = False
    """Products in bfloat16; weights, their optimiser and the sums of the loss stay float32."""


@dataclass(frozen=True)
class TrainConfig(TrainingSettings):
    """Settings of the training loop. Defaults were chosen by measurements on the embedded model."""

    layers: tuple[str, ...]
    """Hook points, in the order of the forward pass; at those in `NO_GAIN` raw SAEs (predictor
    `none`) do better."""
    k: tuple[int, ...]
    """Active latents per token, one per layer."""
    d_sae: int | tuple[int, ...]
    """M, latents: one number for every layer, or one per layer."""
    predictor: str = "previous"
    """`none`, `identity`, `previous` or `all_previous`."""
    map_type: str = "full"
    """Map type for predictors `previous` and `all_previous`: `full`, `scalar`, `diagonal` or
    `low_rank`."""
    rank: int | None = None
    """Rank of maps of type `low_rank`."""
    calibration_tokens: int = 100_000
    """Tokens that the affine maps are fitted on; without maps, scales and means are measured on a
    buffer at most."""
    ridge: float = 1e-4
    """Ridge of the affine fit, relative to the mean eigenvalue of the sources' covariance."""
    sink_factor: float = 10.0
    """Norm, in units of a layer's median, above which a token is left alone as an attention sink
    (`resae.models.sinks`); 0: none is."""
    seed: int = 0
    """Fixes initial directions and the order of the data."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_method()
        self._check_numbers()

    def _check_sizes(self) -> None:
        """Raise ValueError for k and d_sae that are not those of the layers."""
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

    def _check_method(self) -> None:
        """Raise ValueError for an unknown method, or parts of one that exclude each other."""
        PredictorKind.check(self.predictor, "TrainConfig: predictor")
        check_map_type(self.predictor, self.map_type, self.rank, "TrainConfig")
        Loop.check(self.loop, "TrainConfig: loop")
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
        if self.first_sae is not None and (self.shared or js is not None or self.boost is not None):
            raise ValueError("TrainConfig: first_sae with shared, prefixes or boost; leave one out")
        if self.first_sae is not None and len(self.layers) < 2:
            raise ValueError("TrainConfig: first_sae and one layer, so that nothing is trained")
        if self.boost is not None and (self.shared or js is not None):
            raise ValueError("TrainConfig: boost with shared or prefixes; train the base with them")
        if not 0 < self.boost_keep <= 1:
            raise ValueError(
                f"TrainConfig: boost_keep={self.boost_keep}, expected above 0, up to 1"
            )

    def _check_numbers(self) -> None:
        """Raise ValueError for tokens, rates and bounds out of their range."""
        for name in ("train_tokens", "calibration_tokens", "batch_tokens", "dead_after_tokens"):
            value = getattr(self, name)
            # A batch of one token has no variance to be explained.
            least = 2 if name == "batch_tokens" else 1
            if value is not None and value < least:
                raise ValueError(f"TrainConfig: {name}={value}, expected at least {least}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"TrainConfig: lr={self.lr}, expected above 0, or None")
        for name in ("auxk_coefficient", "ridge", "sink_factor", "seed"):
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
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        distance = max(M / k for M, k in zip(self.d_saes, self.k, strict=True))
        return max(1, min(self.train_tokens // 8, math.ceil(IDLE_FIRINGS * distance)))

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


@dataclass(frozen=True, kw_only=True)
class MapSettings:
    """Affine maps."""

    predictor: Annotated[str | None, PredictorKind] = None
    """Predictor of a layer from others; None: previous."""
    map_type: Annotated[str | None, MapType] = None
    """Map type of the predictors previous and all_previous; None: full."""
    rank: Annotated[int | None, whole(1)] = None
    """Rank of maps of type low_rank."""
    calibration_tokens: Annotated[int | None, whole(2)] = None
    """Tokens that the maps are fitted on; without maps, scales and means are measured on a buffer
    at most; None: 100000."""
    ridge: Annotated[float | None, real(least=0)] = None
    """Ridge of the fit, relative to the mean eigenvalue of the sources' covariance; None: 1e-4."""
    sink_factor: Annotated[float | None, real(least=0)] = None
    """Tokens whose norm at a selected layer exceeds this many times the layer's median are
    attention sinks, left alone like special tokens in maps, training and replacement; 0: none;
    None: 10."""

    @property
    def chosen_maps(self) -> dict[str, Any]:
        """The settings of the maps that are not left open."""
        chosen = {f.name: getattr(self, f.name) for f in fields(MapSettings)}
        return {name: value for name, value in chosen.items() if value is not None}


FITTED = tuple(f.name for f in fields(MapSettings))
"""Settings of the affine maps, which a folder of maps records and `RunConfig.maps` takes from
it."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(Source, MapSettings, Machine):
    """Files."""

    on_reconstructions: Annotated[str | None, filled, Shown("STACK")] = None
    """Fit maps that predict each layer from the reconstructions by this stack (a folder: of
    `save_pretrained`, or a run) in place of the activations; its layers are taken. Train from such
    maps with loop closed, which applies them to reconstructions."""
    out: Annotated[str, writable]
    """Folder to write the maps into."""

    def for_layers(self, layers: tuple[str, ...]) -> TrainConfig:
        """The settings of the fit, for hook points of these names."""
        k = (1,) * len(layers)
        return TrainConfig(layers, k, 1, seed=self.seed, **self.chosen_maps)


@dataclass(frozen=True, kw_only=True)
class Dictionaries:
    """Autoencoders."""

    k: Annotated[int | None, one_k] = None
    """Active latents in every layer; or give k_per_layer."""
    k_per_layer: Annotated[tuple[int, ...] | None, numbers, Shown("K,K,…")] = None
    """Active latents of each layer, in the order of the layers."""
    d_sae: Annotated[int | tuple[int, ...] | None, numbers] = None
    """Latents: one number for every layer, or one per layer, for example 512,1024,1536; None:
    expansion × width."""
    expansion: Annotated[int, whole(1)] = 4
    """Latents per dimension of the model."""
    maps: Annotated[str | None, filled, Shown("DIR")] = None
    """Take the affine maps of this folder, written by `resae fit` or by a run on the same model and
    layers, and fit none; their settings are taken too."""


@dataclass(frozen=True, kw_only=True)
class Placement(Machine):
    """Machine."""

    model_device: Annotated[str | None, device_name] = None
    """Device of the language model, if not that of the autoencoders: cpu, cuda:1, or auto: spread
    over all devices (accelerate)."""
    parallel: Annotated[str, Parallelism] = "data"
    """Work of each process, where torchrun starts several: all autoencoders on a share of every
    batch (data), or the autoencoders of some layers (layers; open loop only)."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files and logs."""

    out: Annotated[str, writable]
    """The run directory."""
    resume: bool = False
    """Go on from the newest checkpoint; with more train_tokens, from one before the learning rate
    fell, as a run of that length would have but for its warm-up."""
    checkpoint_steps: Annotated[int, whole(1)] = 1_000
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, whole(1)] = 2
    """Number of checkpoints to keep: the newest, and of two or more one from before the learning
    rate falls, from which the run can be resumed with more tokens."""
    log_steps: Annotated[int, whole(1)] = 50
    """Steps between lines of the log."""
    eval_steps: Annotated[int | None, whole(1)] = None
    """Steps between measurements of the cost of replacing all layers on the held-out rows, online
    and teacher-forced; None: never."""
    tensorboard: bool = False
    """Log to OUT/tensorboard too."""
    wandb: Annotated[str | None, filled, Shown("PROJECT")] = None
    """Log to this project of Weights & Biases too."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Activation cache."""

    cache: Annotated[str | None, writable, Shown("DIR")] = None
    """Keep the activations of the language model there, and read them where they are there
    already."""
    cache_dtype: Annotated[str | None, DTYPES] = None
    """Data type of the activations kept; bfloat16 halves the disk of a float32 model and rounds
    every number to 8 bits, a relative error of 1/512; None: as the model computes them."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Source, Dictionaries, MapSettings, TrainingSettings, Files, Cache, Placement):
    """A training run: what `resae.training.run` does, and `resae train`.

    Exactly one of `k` and `k_per_layer` is given. `layers` may be left out with `maps` or `boost`,
    whose layers are taken.
    """

    def __post_init__(self) -> None:
        if (self.k is None) == (self.k_per_layer is None):
            problem = "are both missing" if self.k is None else "are not allowed with each other"
            raise ValueError(
                f"--k and --k-per-layer {problem}; give one k for every layer, or one per layer"
            )
        if self.maps is not None and self.boost is not None:
            raise ValueError("--maps with --boost, which keeps the maps of its run; leave one out")
        if self.model_device == "auto" and self.eval_steps:
            raise ValueError(
                "--model-device auto, where all devices hold one model, with --eval-steps; leave "
                "one out, and use `resae eval` on the run"
            )
        if self.cache_dtype is not None and self.cache is None:
            raise ValueError("--cache-dtype without --cache; name the folder of the cache too")
        if self.eval_steps and not self.held_out_rows:
            raise ValueError("--eval-steps with --held-out-rows 0; hold rows out to measure on")

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> "RunConfig":
        """The settings of a TOML or JSON file, or of the `run.json` of a run, with changes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a setting that there is not, or a value that it does not take.
        """
        return make(cls, read_file(Path(path), cls) | changes)

    def for_model(self, layers: tuple[str, ...], d_in: int) -> TrainConfig:
        """Settings of the training loop, for hook points of these names and of width `d_in`.

        Raises:
            ValueError: settings that do not fit together.
        """
        d_sae = self.expansion * d_in if self.d_sae is None else self.d_sae
        if isinstance(d_sae, tuple) and len(d_sae) == 1:
            (d_sae,) = d_sae
        common = {f.name: getattr(self, f.name) for f in fields(TrainingSettings)}
        k = self.k_per_layer or (self.k or 1,) * len(layers)
        return TrainConfig(layers, k, d_sae, seed=self.seed, **self.chosen_maps, **common)


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Objective."""

    objective: Annotated[str, Objective] = "kl"
    """Loss of the replaced model, in nats per token: kl, from the plain model's next-token
    distributions, or ce, of the text; mse: none, as a control of as many steps of `resae train`."""
    mse_weight: Annotated[float, real(least=0)] = 3.0
    """Weight of the loss of `resae train` on the plain model's activations beside it: the FVU of
    each layer, and AuxK. 0: FVU rises, by a quarter on the embedded model."""
    plain_probability: Annotated[float, real(least=0, most=1)] = 0.0
    """Probability that the plain stream goes on at a layer and row, in place of the reconstruction:
    student forcing."""
    train_maps: bool = False
    """Train the affine maps too."""
    in_turn: bool = False
    """Change one layer in each step, the layers taking turns, instead of all jointly, which lowered
    Δ CE further in as many steps on the embedded model."""
    update_rank: Annotated[int | None, whole(1)] = None
    """Change matrices (encoders, dictionaries, maps) by a product of this rank: Adam then keeps
    factors in place of two numbers per weight; gradients stay whole. None: change them freely,
    which lowered Δ CE further in as many steps on the embedded model."""
    gradient_checkpointing: bool = False
    """Recompute the model's blocks in the backward instead of keeping their activations: less
    memory, more time. For hook points resid_pre and resid_post."""


@dataclass(frozen=True)
class OnlineConfig(OnlineSettings, TrainConfig):
    """Settings of online training: those of `TrainConfig` and how the model takes part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Objective.check(self.objective, "OnlineConfig: objective")
        if not 0 <= self.plain_probability <= 1:
            raise ValueError(
                f"OnlineConfig: plain_probability={self.plain_probability}, expected 0 to 1"
            )
        if not 0 <= self.mse_weight < math.inf:
            raise ValueError(f"OnlineConfig: mse_weight={self.mse_weight}, expected from 0 on")
        if self.objective == "mse" and not self.mse_weight:
            raise ValueError("OnlineConfig: objective='mse' with mse_weight=0; give it a weight")
        if self.update_rank is not None and self.update_rank < 1:
            raise ValueError(f"OnlineConfig: update_rank={self.update_rank}, expected at least 1")
        inside = [n for n in self.layers if not n.endswith(("resid_post", "resid_pre"))]
        if self.gradient_checkpointing and inside:
            raise ValueError(
                f"OnlineConfig: gradient_checkpointing with {', '.join(inside)}, inside blocks, "
                f"which the backward would run anew; leave it out"
            )

    @property
    def peak_lrs(self) -> tuple[float, ...]:
        """Peak learning rate of each layer: a quarter of that of `TrainConfig`, where None is
        given."""
        rates = super().peak_lrs
        return rates if self.lr is not None else tuple(rate / 4 for rate in rates)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(OnlineSettings, OptimiserSettings, Files, Machine):
    """Online training.

    Of a finished run, with all its layers replaced: what `resae.training.finetune` does, and `resae
    finetune`.
    """

    run: Annotated[str, filled, Shown("RUN", positional=True)]
    """Run directory or stack to begin with, which stays as it is."""
    data: Annotated[str | None, filled] = None
    """Text to train on; None: that of the run."""
    text_column: Annotated[str, filled] = "text"
    """Column of `data` that holds the text."""
    loop: Annotated[str, Loop] = "closed"
    """Residuals are taken against predictions from what the stream was before replacement (open) or
    from the reconstructions put in (closed)."""
    train_tokens: Annotated[int, whole(1)] = 204_800
    """Tokens to train on; the data starts over if it is shorter."""
    lr: Annotated[float | None, real(above=0)] = None
    """Peak learning rate of Adam; None: 2e-3 · sqrt(512 / d_sae), in each layer by its own d_sae, a
    quarter of that of `resae train`."""
    accumulation_steps: Annotated[int, whole(1)] = 1
    """Pieces of rows that a batch is cut into, one after the other: less memory, the same weights.
    More than one costs a second plain pass and encode."""
    seed: Annotated[int, seed_number] = 0
    """Fixes the rows and layers at which the plain stream goes on, and the order of the data."""

    def for_stack(self, stack: Any, context_tokens: int) -> OnlineConfig:
        """Settings of the training loop for a `ReSAE`.

        Raises:
            ValueError: settings that do not fit together.
        """
        if self.batch_tokens % context_tokens:
            raise ValueError(
                f"finetune: batch_tokens={self.batch_tokens}, expected a multiple of the run's "
                f"context of {context_tokens} tokens"
            )
        rows = self.batch_tokens // context_tokens
        if self.accumulation_steps > rows:
            raise ValueError(
                f"finetune: accumulation_steps={self.accumulation_steps} for {rows} rows per step; "
                f"expected at most as many"
            )
        own = {f.name for f in fields(FinetuneConfig)} & {f.name for f in fields(OnlineConfig)}
        configs = [stack.sae(layer).config for layer in range(stack.n_layers)]
        return OnlineConfig(
            layers=tuple(stack.hook_points),
            k=tuple(config.k for config in configs),
            d_sae=tuple(config.d_sae for config in configs),
            predictor=stack.predictor.kind,
            map_type=stack.predictor.map_type,
            rank=stack.predictor.rank if stack.predictor.n_maps else None,
            shared=stack.shared,
            buffer_tokens=self.batch_tokens,
            **{name: getattr(self, name) for name in own},
        )
