"""TopK encode, sparse decode and chained affine back-projection for sparse autoencoders.

Each is a `torch.library` custom op in the namespace `resae` with a fake function and autograd, and
so is `reconstruction_error`, a decode and its squared error in one. `autoencode` and
`autoencoder_error` are encode and decode with one backward, for training. `online_step` joins both
for one layer of a running model (inference only); `ScreenedEncoder` makes the encode fast on a CPU.
`reference` specifies all of them in plain PyTorch.
"""

from resae_kernels import reference
from resae_kernels.autoencode import autoencode, autoencoder_error
from resae_kernels.chain import affine_chain, transport
from resae_kernels.decode import reconstruction_error, sparse_decode
from resae_kernels.dropin import accelerate
from resae_kernels.encode import topk_encode
from resae_kernels.screened import EncodeInfo, ScreenedEncoder
from resae_kernels.step import StepWorkspace, online_step
from resae_kernels.threshold import threshold_encode
from resae_kernels.types import (
    Autoencoding,
    OnlineStep,
    ReconstructionError,
    SparseCode,
    ThresholdCode,
    Transported,
)

__version__ = "0.1.0"
"""Version of this package and of `resae`: both are built with it."""

__all__ = [
    "Autoencoding",
    "EncodeInfo",
    "OnlineStep",
    "ReconstructionError",
    "ScreenedEncoder",
    "SparseCode",
    "StepWorkspace",
    "ThresholdCode",
    "Transported",
    "accelerate",
    "affine_chain",
    "autoencode",
    "autoencoder_error",
    "online_step",
    "reconstruction_error",
    "reference",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
    "transport",
]
