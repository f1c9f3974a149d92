"""Autoencoder with a threshold per latent in place of TopK, for inference:

    s = (x − b_dec) W_enc + b_enc      z = s where s > max(θ, 0), else 0      x̂ = z W_dec + b_dec

JumpReLU (arXiv 2407.14435) has a learned θ per latent, BatchTopK (arXiv 2412.06410) one θ for all
when it is used, and θ = 0 is ReLU. The number of active latents differs from token to token.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resae.choices import Overflow
from resae.sae.base import Autoencoder, SAEConfig, describe_sizes, require_prediction
from resae.sae.files import load_config, load_state, sae_config
from resae.sae.losses import Reduce, no_reduce
from resae.sae.record import SAERecord
from resae.storage import save_json, save_tensors
from resae_kernels import ScreenedEncoder, SparseCode, sparse_decode, threshold_encode

if TYPE_CHECKING:
    pass

DEFAULT_MAX_ACTIVE = 512
"""Slots of a code where the mean number of active latents is not known."""
SLOTS_PER_ACTIVE = 8
"""Slots of a code for each latent that is active on average."""


class ThresholdSAE(Autoencoder):
    """An autoencoder whose latents are active above a threshold. It cannot be trained.

    A code has `max_active` slots (`config.k`). Where more latents are active, `encode` raises; with
    `on_overflow = "count"` the strongest are kept instead, and `overflowed_tokens` and
    `dropped_latents` count the rest. In compiled code it always counts.

    Args:
        record: its tensors and its input; `threshold` is required.
        max_active: 1 to M; default: 8 times the record's k, at least 64; 512 if k is not known.

    Raises:
        ValueError: `max_active` out of these bounds.
    """

    kind = "threshold"

    def __init__(self, record: SAERecord, *, max_active: int | None = None):
        super().__init__()
        assert record.threshold is not None
        M, D = record.weight.shape
        if max_active is None:
            slots = max(64, SLOTS_PER_ACTIVE * record.k) if record.k else DEFAULT_MAX_ACTIVE
            max_active = min(M, slots)
        if type(max_active) is not int or not 1 <= max_active <= M:
            raise ValueError(
                f"threshold autoencoder: max_active={max_active!r}, expected a whole number from 1 "
                f"to {M}, the number of latents"
            )
        self.config = SAEConfig(D, M, max_active, input_kind=record.input_kind)
        for name, tensor in record.tensors().items():
            frozen = nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            self.register_parameter(name, frozen)
        self._screened: ScreenedEncoder | None = None
        self.mean_active = record.k
        self.apply_b_dec_to_input = record.apply_b_dec_to_input
        self.on_overflow = "raise"
        for name in ("overflowed_tokens", "dropped_latents"):
            zero = torch.zeros((), dtype=torch.int64, device=record.weight.device)
            self.register_buffer(name, zero, persistent=False)

    weight: Tensor
    """`[M, D]`, the encoder's."""
    bias: Tensor
    """`[M]`, of the encoder."""
    threshold: Tensor
    """`[M]`, as in the file: below 0 it acts as 0."""
    mean_active: int | None
    """Mean number of active latents per token, where the file tells it."""
    overflowed_tokens: Tensor
    """int64 scalar: tokens with more than `max_active` active latents so far."""
    dropped_latents: Tensor
    """int64 scalar: active latents that found no slot so far."""

    @property
    def on_overflow(self) -> str:
        """`raise` or `count`; may be set, and is saved."""
        return self._on_overflow

    @on_overflow.setter
    def on_overflow(self, on_overflow: Overflow | str) -> None:
        Overflow.check(on_overflow, "threshold autoencoder: on_overflow")
        self._on_overflow = str(on_overflow)

    @property
    def max_active(self) -> int:
        """Number of slots of a code; may be set."""
        return self.config.k

    @max_active.setter
    def max_active(self, max_active: int) -> None:
        self.config = replace(self.config, k=max_active)

    def encode(
        self, x: Tensor, *, prediction: Tensor | None = None, sorted: bool = True
    ) -> SparseCode:
        """Code of `x − prediction`, `[..., D]` → acts and indices `[..., max_active]`.

        Raises:
            ValueError: an autoencoder of residuals without `prediction`, or a token with more
                active latents than a code has slots.
        """
        require_prediction(self, prediction)
        offsets: dict[str, Any] = {
            "pre_bias": self.b_dec if self.apply_b_dec_to_input else None,
            "prediction": prediction,
        }
        threshold, slots = self.threshold, self.max_active
        screened = self.screened if self.screens(x) else None
        if screened is not None:
            code = screened.threshold_encode(x, threshold, slots, sorted=sorted, **offsets)
        else:
            code = threshold_encode(
                x, self.weight, self.bias, threshold, slots, sorted=sorted, **offsets
            )
        self._count_overflow(code.n_active)
        return SparseCode(code.acts, code.indices)

    @property
    def screened(self) -> ScreenedEncoder | None:
        """Encoder of what is screened, by its `threshold_encode`."""
        margin = self.config.screening
        if margin is not None:
            self._screened = self.encoder_of(self.weight, self.bias, self._screened, str(margin))
        return None if margin is None else self._screened

    @torch.no_grad()
    def _count_overflow(self, n_active: Tensor) -> None:
        dropped = (n_active - self.max_active).clamp_min(0)
        self.overflowed_tokens += (dropped > 0).sum()
        self.dropped_latents += dropped.sum()
        if (
            self.on_overflow == "raise"
            and not torch.compiler.is_compiling()
            and bool(dropped.any())
        ):
            raise ValueError(
                f"threshold autoencoder: a token has {int(n_active.max())} active latents, codes "
                f"have {self.max_active} slots; set max_active to at least that, or "
                f'on_overflow="count" to keep the strongest'
            )

    def decode(self, acts: Tensor, indices: Tensor, *, prediction: Tensor | None = None) -> Tensor:
        """As `TopKSAE.decode`."""
        return sparse_decode(acts, indices, self.W_dec, bias=self.b_dec, prediction=prediction)

    def extra_repr(self) -> str:
        low, high = (float(t) for t in self.threshold.aminmax())
        return f"{describe_sizes(self.config)}, threshold={low:g} to {high:g}"

    def at_k(self, k: int) -> "ThresholdSAE":
        """An autoencoder of the same parameters that keeps the k strongest active latents."""
        if not 1 <= k <= self.max_active:
            raise ValueError(f"at_k: k={k}, expected 1 to {self.max_active}, its max_active")
        shared = {id(part): part for part in (*self.parameters(), self._screened)}
        twin = copy.deepcopy(self, shared)
        twin.max_active, twin.on_overflow = k, "count"
        return twin

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """As `TopKSAE.rescale_`; thresholds grow with the scores."""
        for name in ("bias", "b_dec", "threshold"):
            scaled = nn.Parameter(getattr(self, name) * factor, requires_grad=False)
            self.register_parameter(name, scaled)

    # -- training: there is none -------------------------------------------------------------------

    @property
    def trainable(self) -> Autoencoder:
        raise ValueError(
            "threshold autoencoder: it is for inference and cannot be trained; train a TopK one, "
            "or boost a frozen one"
        )

    def dead_latent_loss(
        self,
        x: Tensor,
        error: Tensor,
        dead: Tensor,
        *,
        prediction: Tensor | None = None,
        reduce: Reduce = no_reduce,
    ) -> Tensor:
        """Raise: see `trainable`."""
        return self.trainable.dead_latent_loss(x, error, dead, prediction=prediction, reduce=reduce)

    # -- disk --------------------------------------------------------------------------------------

    def record(self) -> SAERecord:
        return SAERecord(
            self.weight,
            self.bias,
            self.W_dec,
            self.b_dec,
            k=self.mean_active,
            threshold=self.threshold,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            input_kind=self.config.input_kind,
        )

    @classmethod
    def from_record(cls, record: SAERecord, *, max_active: int | None = None) -> "ThresholdSAE":
        """The autoencoder of a record with a threshold; `max_active` as of the class."""
        return cls(record, max_active=max_active).eval()

    def save(self, folder: Path, **metadata: Any) -> None:
        """Write `sae.safetensors` and then `cfg.json`."""
        save_tensors(folder / "sae.safetensors", self.state_dict())
        save_json(
            folder / "cfg.json",
            {
                "activation": "threshold",
                "num_latents": self.config.d_sae,
                "k": self.max_active,
                "d_in": self.config.d_in,
                "metadata": {
                    "kind": self.kind,
                    **metadata,
                    "mean_active": self.mean_active,
                    "apply_b_dec_to_input": self.apply_b_dec_to_input,
                    "on_overflow": self.on_overflow,
                    "input_kind": self.config.input_kind,
                    "screening": self.config.screening,
                },
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "ThresholdSAE":
        """Read a folder that `save` wrote, for use.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        folder = Path(folder)
        cfg = load_config(folder)
        config, metadata = sae_config(folder, cfg), cfg["metadata"]
        M, D = config.d_sae, config.d_in
        shapes = {"weight": [M, D], "bias": [M], "W_dec": [M, D], "b_dec": [D], "threshold": [M]}
        applied, mean_active = metadata.get("apply_b_dec_to_input"), metadata.get("mean_active")
        if not isinstance(applied, bool) or type(mean_active) not in (int, type(None)):
            raise ValueError(
                f"SAE {folder}: apply_b_dec_to_input = {applied!r}, mean_active = {mean_active!r} "
                f"in the metadata; expected true or false, and a whole number or null"
            )
        on_overflow = metadata.get("on_overflow", "raise")  # earlier versions did not save it
        Overflow.check(on_overflow, f"SAE {folder}: on_overflow in the metadata")
        tensors = load_state(folder, shapes)
        record = SAERecord(
            *(tensors[name] for name in ("weight", "bias", "W_dec", "b_dec")),
            threshold=tensors["threshold"],
            k=mean_active,
            apply_b_dec_to_input=applied,
            input_kind=config.input_kind,
        ).check(folder)
        sae = cls.from_record(record, max_active=config.k)
        sae.config = config
        sae.on_overflow = on_overflow
        return sae
