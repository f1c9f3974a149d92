"""Results of the ops, and the dtype in which an op accumulates."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Implementation = Literal["torch", "triton"]
DecodeAlgorithm = Literal["gather", "dense"]
ChainAlgorithm = Literal["sequential", "transported"]
Margin = Literal["statistical", "certain"]
ScreeningImplementation = Literal["native", "torch", "triton"]


class SparseCode(NamedTuple):
    """The code of each token: its k largest positive pre-activations."""

    acts: Tensor
    """`[..., k]`, in the input's dtype; ≥ 0 (or NaN where the score is NaN)."""
    indices: Tensor
    """`[..., k]` int64, the latent of each act. Padding slots hold act 0 and index 0."""

    def _repr_html_(self) -> str:
        from resae_kernels.notebook import code_html

        return code_html(self.acts, self.indices)


class ThresholdCode(NamedTuple):
    """The code of each token: its largest pre-activations above their latents' thresholds."""

    acts: Tensor
    """`[..., max_active]`, in the input's dtype; ≥ 0 (or NaN where the score is NaN)."""
    indices: Tensor
    """`[..., max_active]` int64, the latent of each act. Padding slots hold act 0 and index 0."""
    n_active: Tensor
    """`[...]` int32: latents above their thresholds. More than max_active: the smallest are not in
    the code."""

    def _repr_html_(self) -> str:
        from resae_kernels.notebook import code_html

        return code_html(self.acts, self.indices)


class ReconstructionError(NamedTuple):
    """Error of a reconstruction."""

    error: Tensor
    """`[..., D]`, x̂ − target."""
    squared: Tensor
    """`[...]`, the squares of the error summed over D, in the accumulation dtype."""


class Transported(NamedTuple):
    """Dictionaries transported through the affine maps to every later layer."""

    dictionaries: list[list[Tensor]]
    """`dictionaries[m][l]`, l ≤ m: `D_{m←l} = W_dec_l A_{l+1} … A_m`, `[M_l, D]`."""
    constants: list[Tensor]
    """`constants[m]`, `[D]`: reconstruction of layer m when no latent is active."""


class OnlineStep(NamedTuple):
    """Code and reconstruction of one layer of the running model."""

    x_hat: Tensor
    """`[..., D]`, the reconstruction that takes the activation's place."""
    code: SparseCode
    """`[..., k]`, in order of index."""


class Autoencoding(NamedTuple):
    """Reconstruction and code of an autoencoder."""

    x_hat: Tensor
    """`[..., D]`, prediction included."""
    code: SparseCode
    """`[..., k]`."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of an op's sums: float32 for the 16-bit types, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
