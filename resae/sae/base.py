"""The protocol of autoencoders of one activation, and their sizes.

A kind of autoencoder is one file with a class that derives from `Autoencoder`, and one entry in
`resae.sae.registry`. Nothing else asks which kind it has before it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from resae.choices import InputKind, Screening
from resae.sae.losses import Reduce, no_reduce
from resae.sae.record import SAERecord
from resae_kernels import ScreenedEncoder, SparseCode
from resae_kernels.types import Margin, ScreeningImplementation


@dataclass(frozen=True)
class SAEConfig:
    """Sizes of one autoencoder, and what it encodes."""

    d_in: int
    """D, width of the activation."""
    d_sae: int
    """M, number of latents."""
    k: int
    """Active latents per token."""
    prefix_gain: float = 0.0
    """Exponent of the scale of activations when only the j strongest latents are decoded:
    (k / j) ** prefix_gain. It makes up for a part of what the other latents would have added."""
    input_kind: InputKind | str = "activation"
    """`activation`: x itself; `affine_residual`: x minus a prediction, which `encode` then needs. A
    `ReSAE` sets it."""
    screening: Screening | str | None = "statistical"
    """Method that rules latents out by an 8-bit product when encoding on a CPU, before the rest are
    scored in float32. `statistical`: a latent of the TopK is missed with probability below 1e-12
    per row (proof: `resae_kernels.screened`); `certain`: never, at more candidates; None: no
    screening, the whole float32 product."""

    def __post_init__(self) -> None:
        if self.screening is not None:
            Screening.check(self.screening, "SAEConfig: screening", "None")
        InputKind.check(self.input_kind, "SAEConfig: input_kind")
        if not 0 <= self.prefix_gain <= 1:
            raise ValueError(f"SAEConfig: prefix_gain={self.prefix_gain}, expected 0 to 1")
        for name in ("d_in", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"SAEConfig: {name}={getattr(self, name)}, expected at least 1")
        if self.k > self.d_sae:
            raise ValueError(
                f"SAEConfig: k={self.k} exceeds the number of latents d_sae={self.d_sae}; lower k "
                f"or raise d_sae"
            )


class SAEOutput(NamedTuple):
    """Output of one autoencoder for N tokens."""

    x_hat: Tensor
    """`[..., D]`, reconstruction, `prediction` included."""
    code: SparseCode
    """Acts and indices `[..., k]`."""


class StepWeights(NamedTuple):
    """Weights of an autoencoder that is one TopK and one gather."""

    weight: Tensor
    """`[M, D]`."""
    bias: Tensor
    """`[M]`."""
    k: int
    W_dec: Tensor
    """`[M, D]`."""


class Autoencoder(nn.Module, ABC):
    """An autoencoder of one activation `x [..., D]`: x → code → x̂.

    `prediction` is everywhere a prediction of x, `[..., D]`: it is subtracted before encoding and
    added after decoding, so that the code is of the residual.
    """

    kind: ClassVar[str]
    """Name in the registry and on disk."""
    dictionaries: ClassVar[int] = 1
    """Number of dictionaries that a decode gathers from; of several, `W_dec` is a copy."""
    follows_acts: ClassVar[bool] = False
    """True if training calls `follow` with the acts of every batch."""
    config: SAEConfig
    W_dec: Tensor
    """Dictionary `[M, D]`, one direction per row."""
    b_dec: Tensor
    """Decoder bias `[D]`."""
    screening_implementation: ScreeningImplementation | None = None
    """Implementation of `ScreenedEncoder`; may be set. "triton": at most 16 tokens are screened on
    a GPU, in calls that are not compiled. None: screened on a CPU alone."""

    # -- use ---------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, x: Tensor, *, prediction: Tensor | None = None, sorted: bool = True
    ) -> SparseCode:
        """Code of `x − prediction`, `[..., D]` → acts and indices `[..., k]`."""

    @abstractmethod
    def decode(self, acts: Tensor, indices: Tensor, *, prediction: Tensor | None = None) -> Tensor:
        """`acts, indices [..., k]` → x̂ `[..., D]`, plus `prediction`."""

    def forward(self, x: Tensor, *, prediction: Tensor | None = None) -> SAEOutput:
        code = self.encode(x, prediction=prediction)
        return SAEOutput(self.decode(*code, prediction=prediction), code)

    @abstractmethod
    def at_k(self, k: int) -> "Autoencoder":
        """An autoencoder of the same parameters with fewer active latents."""

    @property
    def step_weights(self) -> StepWeights | None:
        """Arguments of `resae_kernels.online_step`, if encode and decode are one TopK and one
        gather; otherwise None."""
        return None

    @property
    def screened(self) -> ScreenedEncoder | None:
        """Encoder used in place of `resae_kernels.topk_encode` for what is screened, or None."""
        return None

    def screens(self, x: Tensor) -> bool:
        """True if a call with x is to be screened: on a CPU, on a GPU on request."""
        wanted = x.is_cpu or self.screening_implementation == "triton"
        return wanted and not torch.compiler.is_compiling()

    def encoder_of(
        self, weight: Tensor, bias: Tensor, held: ScreenedEncoder | None, margin: str
    ) -> ScreenedEncoder:
        """`held` if it is the screening encoder of this weight, bias and margin, else a new one."""
        asked = self.screening_implementation
        if (
            held is not None
            and held.weight is weight
            and held.bias is bias
            and held.margin == margin
            and held.requested == asked
        ):
            return held
        return ScreenedEncoder(weight, bias, margin=cast("Margin", margin), implementation=asked)

    def require_finite(self, where: object) -> None:
        """Raise ValueError for weights that are NaN or infinite; `where` begins the message."""
        if bad := [name for name, t in self.state_dict().items() if not bool(t.isfinite().all())]:
            raise ValueError(f"{where}: NaN or infinite entries in {', '.join(bad)}")

    def set_input_kind(self, kind: InputKind | str) -> None:
        """Set what it encodes: `ReSAE` does, for layers that are predicted."""
        self.config = replace(self.config, input_kind=kind)

    @abstractmethod
    def rescale_(self, factor: float) -> None:
        """Become the autoencoder of `factor · x`: its code is `factor` times this one's."""

    def share_dictionary(self, other: "Autoencoder") -> bool:  # noqa: ARG002
        """Hold the encoder weight and dictionary of `other` in place of equal ones; returns whether
        they are equal."""
        return False

    # -- disk --------------------------------------------------------------------------------------

    @abstractmethod
    def save(self, folder: Path, **metadata: Any) -> None:
        """Write the autoencoder and `metadata` (JSON), its `kind` among it, into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path) -> "Autoencoder":
        """Read a folder that `save` wrote, for use: in eval mode."""

    def parts(self) -> "dict[str, Autoencoder]":
        """The autoencoders that it is made of, by name; none for one that is not composed."""
        return {}

    def record(self) -> SAERecord:
        """The autoencoder in the form that other libraries' formats have in common.

        Raises:
            ValueError: it has no such form.
        """
        raise ValueError(
            f"{self.kind}: other libraries have no form for such an autoencoder; only resae's own "
            f"folders hold it"
        )

    @classmethod
    def from_record(cls, record: SAERecord) -> "Autoencoder":
        """The autoencoder of a record, in eval mode."""
        raise NotImplementedError(f"{cls.kind}: no form that other libraries have")

    # -- training ----------------------------------------------------------------------------------

    @property
    def is_frozen(self) -> bool:
        """True if training changes nothing of it: no parameter wants a gradient."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def trainable(self) -> "Autoencoder":
        """The part that training changes: all of it."""
        return self

    def trainable_code(self, code: SparseCode) -> SparseCode:
        """The part of a code that belongs to `trainable`, by its own indices: all of it."""
        return code

    def reconstructions(
        self, x: Tensor, *, prediction: Tensor | None = None
    ) -> tuple[list[Tensor], SparseCode]:
        """Reconstructions `[..., D]` whose mean error is the loss, of which the last one is x̂; and
        the code."""
        x_hat, code = self(x, prediction=prediction)
        return [x_hat], code

    @abstractmethod
    def dead_latent_loss(
        self,
        x: Tensor,
        error: Tensor,
        dead: Tensor,
        *,
        prediction: Tensor | None = None,
        reduce: Reduce = no_reduce,
    ) -> Tensor:
        """Scalar loss that revives latents of `trainable`.

        Args:
            x, error: `[N, D]`, the activation and `x − x̂`.
            dead: `[M]` bool, of `trainable`.
            reduce: reduction of the loss's normaliser, called at most once: from the sum over
                these tokens to the sum over the batch that they are a piece of.
        """

    def follow(self, acts: Tensor) -> None:
        """Take account of the acts `[N, k]` of `trainable` on a whole batch."""
        raise NotImplementedError(f"{self.kind}: nothing follows the acts")

    def normalize_decoder(self) -> None:
        """Scale every row of the dictionary of `trainable` to norm 1."""

    def remove_parallel_gradient(self) -> None:
        """Drop from the gradient what would only change the norm of a row."""


def describe_sizes(config: SAEConfig) -> str:
    return (
        f"d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}, input_kind={config.input_kind!r}"
    )


def require_prediction(sae: Autoencoder, prediction: Tensor | None) -> None:
    """Raise ValueError for an autoencoder of residuals that is given none to subtract."""
    if prediction is None and sae.config.input_kind != "activation":
        raise ValueError(
            f"{type(sae).__name__}: this autoencoder encodes the residual of an activation, and "
            f"got no prediction; pass it as prediction=, let ReSAE.encode predict, or, if x is the "
            f"residual, pass zeros"
        )
