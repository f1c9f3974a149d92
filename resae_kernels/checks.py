"""Checks of the arguments of public functions, in one wording, and the casts of autocast.

Every message says what, got, expected, and what to do, in the names of the public arguments.
"""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected one of float32, float64, bfloat16, "
            f"float16; convert it first"
        )


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Require the dtype and device of `like`."""
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
    """Require that `acts` and `indices` are the two halves of one code."""
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
    """True if autocast is on for this device type (some, such as meta, have none)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors (but float64) to the autocast dtype of the first one's device."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors)
