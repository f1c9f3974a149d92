"""One autoencoder as tensors and facts: the common ground of the file formats of all libraries."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from resae.choices import InputKind

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SAERecord:
    """An autoencoder `z = act(x W_enc + b_enc)`, `x̂ = z W_dec + b_dec`.

    `act` is TopK of ReLU, or, where there is a `threshold`, `s` where `s > max(threshold, 0)` and
    0 elsewhere.
    """

    weight: Tensor
    """`[M, D]`, the encoder's: one latent per row."""
    bias: Tensor
    """`[M]`, of the encoder."""
    W_dec: Tensor
    """`[M, D]`."""
    b_dec: Tensor
    """`[D]`."""
    k: int | None = None
    """Active latents per token: exact for TopK, the mean (if known) with a threshold."""
    threshold: Tensor | None = None
    """`[M]`; None: TopK."""
    apply_b_dec_to_input: bool = True
    """True: b_dec is subtracted from x before encoding."""
    input_kind: InputKind | str = InputKind.ACTIVATION
    hook_point: str | None = None
    """Such as `blocks.6.hook_resid_post`; a name of another kind is kept as it is."""
    model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further facts from the file, as JSON."""
    folded: tuple[str, ...] = ()
    """Settings of the file that its reader folded into the weights."""

    def check(self, where: object) -> "SAERecord":
        """This record, if its parts fit together.

        Raises:
            ValueError: shapes or dtypes that do not fit, or a wrong k.
        """
        weight = self.weight
        if weight.ndim != 2 or not weight.numel():
            raise ValueError(f"SAE {where}: encoder {list(weight.shape)}, expected [M, D]")
        M, D = weight.shape
        shapes = {"weight": [M, D], "bias": [M], "W_dec": [M, D], "b_dec": [D], "threshold": [M]}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"SAE {where}: {name} is {list(tensor.shape)}, expected {shape} of M={M} "
                    f"latents and D={D}"
                )
            if tensor.dtype not in DTYPES or tensor.dtype != weight.dtype:
                raise ValueError(
                    f"SAE {where}: {name} is {tensor.dtype}, expected one floating dtype for all "
                    f"tensors, as of the encoder's ({weight.dtype})"
                )
        if self.threshold is None and self.k is None:
            raise ValueError(f"SAE {where}: no k and no threshold; expected one of them")
        if self.k is not None and not 1 <= self.k <= M:
            raise ValueError(f"SAE {where}: k={self.k}, expected 1 to {M}, the number of latents")
        InputKind.check(self.input_kind, f"SAE {where}: input_kind")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; `threshold` only where there is one."""
        names = ("weight", "bias", "W_dec", "b_dec", "threshold")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def non_finite(self) -> list[str]:
        """Names of the tensors with NaN or infinite entries."""
        return [name for name, t in self.tensors().items() if not bool(t.isfinite().all())]

    def with_b_dec_subtracted(self) -> "SAERecord":
        """The same function with `apply_b_dec_to_input`: `x W + b = (x − b_dec) W + (b + b_dec W)`,
        the new bias summed in float64."""
        if self.apply_b_dec_to_input:
            return self
        shift = torch.mv(self.weight.double(), self.b_dec.double())
        bias = (self.bias.double() + shift).to(self.bias.dtype)
        return replace(
            self,
            bias=bias,
            apply_b_dec_to_input=True,
            folded=(*self.folded, "apply_b_dec_to_input=false into the encoder bias"),
        )
