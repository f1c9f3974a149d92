"""Registration of the ops `resae::…`, and the choice of their implementation."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from resae_kernels.cpu.private_torch import is_eager, is_profiled
from resae_kernels.triton import runtime

LIBRARY = torch.library.Library("resae", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `resae::<schema>` with one implementation for every device and its fake function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resae::{name}", fake, lib=LIBRARY)


PLAIN = (Tensor, torch.nn.Parameter)
_has_triton = cache(lambda: find_spec("triton") is not None)  # it has wheels for Linux only


def triton_signature(
    implementation: str | None, first: Tensor, *others: Tensor | None
) -> tuple[Any, ...] | None:
    """Shapes, dtypes and devices of the arguments of an eager call that runs by Triton; None where
    the call has to go through the dispatcher, or is not for Triton.

    Calls with plain tensors that need no gradient skip the dispatcher where nothing traces,
    transforms, casts or profiles them: it takes longer than the preparation of a launch. An op that
    has accepted arguments of one signature need not check them again.
    """
    if not (implementation == "triton" or (implementation is None and first.is_cuda)):
        return None
    if not is_eager() or is_profiled():
        return None
    wants_gradient = torch.is_grad_enabled()
    found: list[Any] = []
    for t in (first, *others):
        if t is None:
            found.append(None)
        elif type(t) not in PLAIN or t.is_neg() or (wants_gradient and t.requires_grad):
            return None
        else:
            found.append((t.shape, t.dtype, t.device))
    return tuple(found)


def check_once(passed: set[Any], key: tuple[Any, ...], check: Callable[[], object]) -> None:
    """Run the checks of an op unless arguments with this key have passed them before."""
    if key in passed:
        return
    check()
    if len(passed) >= MOST_SIGNATURES:
        passed.clear()
    passed.add(key)


MOST_SIGNATURES = 4096
"""Signatures kept for each op, of a few hundred bytes each."""


def implementation_for(op: str, tensor: Tensor, implementation: str | None) -> str:
    """`torch` or `triton`: as requested, or by the device of the input (CUDA: triton)."""
    if implementation is None:
        return "triton" if tensor.is_cuda else "torch"
    if implementation not in ("torch", "triton"):
        raise ValueError(
            f"{op}: implementation={implementation!r}, expected 'torch', 'triton' or None "
            f"(by device)"
        )
    if implementation == "triton" and not _has_triton():
        raise ValueError(
            f"{op}: implementation='triton', but Triton is not installed; pip install it"
        )
    if implementation == "triton" and tensor.device.type == "cpu" and not runtime.is_interpreted():
        raise ValueError(
            f"{op}: implementation='triton' needs a CUDA device, the input is on cpu; move it, or "
            f"pass 'torch'"
        )
    return implementation
