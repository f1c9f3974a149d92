"""What the ops share before any work is launched: Triton where there is one, the choice of
implementation, argument checks in one wording, op registration.

Every message says what, got, expected, and what to do, in the names of the public arguments.
"""

from collections.abc import Callable, Container, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

triton: Any  # its decorator's type knows no launch options, nor that constexprs are given as ints
try:
    import triton.language as tl

    triton = import_module("triton")
except ModuleNotFoundError:  # Triton has wheels for Linux only; elsewhere kernels stay undecorated
    triton = SimpleNamespace(jit=lambda function: function)
    tl: Any = SimpleNamespace(constexpr=None)

LIBRARY = torch.library.Library("resae", "DEF")
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    if implementation == "triton" and not hasattr(triton, "cdiv"):
        raise ValueError(
            f"{op}: implementation='triton', but Triton is not installed; pip install it"
        )
    if implementation == "triton" and tensor.device.type == "cpu" and not _interpreted():
        raise ValueError(
            f"{op}: implementation='triton' needs a CUDA device, the input is on cpu; move it, or "
            f"pass 'torch'"
        )
    return implementation


def _interpreted() -> bool:
    """Do kernels run in Triton's interpreter, on CPU tensors? (Tests do.)"""
    return triton.knobs.runtime.interpret


def device_class(device: torch.device, known: Container[str]) -> str:
    """`sm_90` and the like where a table of tiles knows it, else `other`."""
    if device.type != "cuda" or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in known else "other"


def launch_options(num_warps: int, num_stages: int = 3) -> dict[str, Any]:
    """Of every launch. Fusion is named since Triton's default changes with its versions."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


class AotCase(NamedTuple):
    """A kernel as it is launched, to be compiled ahead of time (`tests/static_gate.py`)."""

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    """Type of each argument that is no constexpr: `*bf16:16`, `i32`, or a tuple of such. `:16` says
    that the launcher finds it divisible by 16: a pointer's address, a size."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    expect: Mapping[str, int | bool]
    """What the machine code must show, in the words of `tests/static_gate.py`."""
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected one of float32, float64, bfloat16, "
            f"float16; convert it first"
        )


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must have the dtype and device of `like`."""
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, {like_name} has {like.dtype}; "
            f"convert one so that both agree"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {like_name} on {like.device}; "
            f"move one so that both agree"
        )


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)} ({why})"
        )


def check_codes(op: str, acts: Tensor, indices: Tensor, at: str = "") -> None:
    """`acts` and `indices` must be the two halves of one code."""
    check_floating(op, f"acts{at}", acts)
    if acts.ndim == 0:
        raise ValueError(f"{op}: acts{at} has shape [], expected [..., k]")
    if indices.dtype != torch.int64:
        raise TypeError(
            f"{op}: indices{at} has dtype {indices.dtype}, expected int64; use indices.long()"
        )
    check_shape(op, f"indices{at}", indices, tuple(acts.shape), f"the shape of acts{at}")
    if indices.device != acts.device:
        raise ValueError(
            f"{op}: indices{at} is on {indices.device}, acts{at} on {acts.device}; "
            f"move one so that both agree"
        )


def autocasts(device: str) -> bool:
    """Is autocast on for this device type? Some, as meta, know no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors (but float64) to the autocast dtype of the first one's device."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors)
