"""Registration of the ops `resae::…`, and the choice of what runs them."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from resae_kernels.triton import runtime

LIBRARY = torch.library.Library("resae", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `resae::<schema>` with one implementation for every device and its fake function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resae::{name}", fake, lib=LIBRARY)


def implementation_for(op: str, tensor: Tensor, implementation: str | None) -> str:
    """`torch` or `triton`: as asked, or by the device of the input (CUDA: triton)."""
    if implementation is None:
        return "triton" if tensor.is_cuda else "torch"
    if implementation not in ("torch", "triton"):
        raise ValueError(
            f"{op}: implementation={implementation!r}, expected 'torch', 'triton' or None "
            f"(by device)"
        )
    if implementation == "triton" and not find_spec("triton"):  # it has wheels for Linux only
        raise ValueError(
            f"{op}: implementation='triton', but Triton is not installed; pip install it"
        )
    if implementation == "triton" and tensor.device.type == "cpu" and not runtime.is_interpreted():
        raise ValueError(
            f"{op}: implementation='triton' needs a CUDA device, the input is on cpu; move it, or "
            f"pass 'torch'"
        )
    return implementation
