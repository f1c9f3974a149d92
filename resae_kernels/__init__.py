"""TopK encode, sparse decode and chained affine back-projection for sparse autoencoders.

Each is a `torch.library` custom op in the namespace `resae` with a fake function and autograd, and
so is `reconstruction_error`, a decode and its squared error in one. `online_step` joins encode and
decode for one layer of a running model (inference only); `ScreenedEncoder` holds what makes the
encode fast on a CPU. `reference` says in plain PyTorch what they compute.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from resae_kernels import reference
from resae_kernels.chain import affine_chain, transport
from resae_kernels.decode import reconstruction_error, sparse_decode
from resae_kernels.dropin import accelerate
from resae_kernels.encode import topk_encode
from resae_kernels.screened import ScreenedEncoder, Screening
from resae_kernels.step import StepWorkspace, online_step
from resae_kernels.types import OnlineStep, ReconstructionError, SparseCode, Transported

__all__ = [
    "OnlineStep",
    "ReconstructionError",
    "ScreenedEncoder",
    "Screening",
    "SparseCode",
    "StepWorkspace",
    "Transported",
    "accelerate",
    "affine_chain",
    "online_step",
    "reconstruction_error",
    "reference",
    "sparse_decode",
    "topk_encode",
    "transport",
]

if TYPE_CHECKING:  # a `__getattr__` would have every mistyped name accepted
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`, read when it is asked for: a checkout that is not installed has none."""
        if name == "__version__":
            return version("resae")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
