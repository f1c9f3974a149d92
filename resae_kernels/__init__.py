"""TopK encode, sparse decode and chained affine back-projection for sparse autoencoders.

Three functions, each a `torch.library` custom op in the namespace `resae` with a fake function and
autograd; `online_step` joins them for one layer of a running model (inference only), and
`ScreenedEncoder` holds what makes the encode fast on a CPU. `reference` says in plain PyTorch what
they compute.
"""

from resae_kernels import reference
from resae_kernels.affine_chain import affine_chain, transport
from resae_kernels.online_step import StepWorkspace, online_step
from resae_kernels.reference import OnlineStep, TopK, Transported
from resae_kernels.screened_encode import ScreenedEncoder, Screening
from resae_kernels.sparse_decode import sparse_decode
from resae_kernels.topk_encode import topk_encode

__all__ = [
    "OnlineStep",
    "ScreenedEncoder",
    "Screening",
    "StepWorkspace",
    "TopK",
    "Transported",
    "affine_chain",
    "online_step",
    "reference",
    "sparse_decode",
    "topk_encode",
    "transport",
]
