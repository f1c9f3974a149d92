"""Settings of a training, their defaults and their limits."""

import math
from dataclasses import dataclass, replace

from resae.choices import DTYPES, KINDS, check_form

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
