"""The compiled CPU library (`native.c`): loading it, and its functions on tensors.

Every function takes CPU tensors of one dtype (float32, bfloat16 or float16), in any layout: this
is the one place that makes them what C reads, with unit stride along a row. None has a gradient.
Built when the package is installed (`build_native.py`); runs where the processor has AVX-512 with
VNNI, and multiplies by AMX where there is that too. Threads are torch's.
"""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LATENTS, DEPTH = 32, 64
"""Latents and entries of a row are padded to multiples of these in the 8-bit copy."""
MOST_COLUMNS = 16
"""Outlier dimensions that a copy can hold."""
_OK, _NO_MEMORY, _BAD_INDEX, STALE_COPY, NEW_COLUMNS = range(5)


class Copy(ctypes.Structure):
    """The 8-bit copy of a weight, as `native.c` reads it."""

    _fields_ = [
        *((name, c_int64) for name in ("M", "D")),
        ("weight", c_void_p),
        *((name, c_int64) for name in ("weight_stride", "weight_dtype")),
        ("live_bias", c_void_p),
        *(
            (name, c_void_p)
            for name in (
                *("packed", "start", "steps", "shift", "bias", "bounds", "norm_bounds"),
                *("dither", "weight_dither", "columns", "column_dimensions"),
            )
        ),
        ("n_columns", c_int64),
        *(
            (name, c_float)
            for name in ("ratio", "largest_bias", "largest_bound", "outlier", "rounding")
        ),
    ]


_Counts = c_int64 * 2


class _Code(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("acts", "indices", "W")),
        *((name, c_int64) for name in ("k", "M", "stride")),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "resae_select": [
        *(c_void_p, c_int64, c_int, c_int64, c_int64, c_int64, c_int, c_int),
        *(c_void_p, c_void_p),
    ],
    "resae_quantise": [
        *(c_void_p, c_int64, c_int, c_int64, c_int64, c_float, c_void_p, c_void_p, c_int),
        *(c_void_p,) * 7,
    ],
    "resae_screened_encode": [
        *(POINTER(Copy), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64),
        *(c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ],
    "resae_decode": [
        *(c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int64, c_int),
        c_void_p,
    ],
}


@cache
def _load() -> tuple[Any, str | None]:
    """The library, or why there is none."""
    from resae_kernels.build_native import LIBRARY, SOURCE, source_version

    if not LIBRARY.exists():
        return None, (
            "the package was installed without its compiled CPU library; install a C compiler, "
            "then `pip install` it again"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:  # of another platform, or a torch without OpenMP
        return None, f"the compiled CPU library cannot be loaded: {error}"
    library.resae_source_version.restype = ctypes.c_uint32
    if SOURCE.exists() and library.resae_source_version() != source_version():
        return None, f"{LIBRARY} was built from another native.c; `pip install` the package again"
    if not library.resae_features():
        return None, "this processor has no AVX-512 with 8-bit dot products (VNNI)"
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library, None


def unavailable() -> str | None:
    """Why the compiled path cannot run here; None if it can."""
    return _load()[1]


@cache
def has_amx() -> bool:
    """Whether products are made by AMX."""
    library, _ = _load()
    return library is not None and bool(library.resae_features() & 2)


def takes(*tensors: Tensor | None) -> bool:
    """Can the library work on these tensors: is it there, and are they CPU tensors of one dtype?"""
    given = [t for t in tensors if t is not None]
    return (
        given[0].dtype in DTYPES
        and all(t.device.type == "cpu" and t.dtype == given[0].dtype for t in given)
        and _load()[1] is None
    )


def rows(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last dimension: itself, if it has."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def packed(tensor: Tensor) -> Tensor:
    """The tensor with all its entries side by side."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require_memory(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("resae_kernels: out of memory on the CPU")


def select(scores: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Exact TopK of relu(scores), `[N, M]` → `[N, k]`: ties to the lower index, NaN first, padding
    last."""
    scores = rows(scores)
    (N, M), (library, _) = scores.shape, _load()
    acts, indices = scores.new_empty(N, k), torch.empty(N, k, dtype=torch.int64)
    status = library.resae_select(
        scores.data_ptr(),
        scores.stride(0),
        DTYPES[scores.dtype],
        N,
        M,
        k,
        sorted,
        torch.get_num_threads(),
        acts.data_ptr(),
        indices.data_ptr(),
    )
    _require_memory(status)
    return acts, indices


def decode(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """`Σ acts · W_dec + base + bias`, `[N, D]`, summed in float32 and rounded once; acts of 0 are
    left out.

    Raises:
        RuntimeError: an index outside its dictionary.
    """
    library, _ = _load()
    N, D = acts[0].shape[0], W_dec[0].shape[1]
    kept, codes = [], (_Code * len(acts))()
    for code, a, i, W in zip(codes, acts, indices, W_dec, strict=True):
        a, i, W = packed(a), packed(i), rows(W)
        kept += [a, i, W]
        code.acts, code.indices, code.W = a.data_ptr(), i.data_ptr(), W.data_ptr()
        code.k, code.M, code.stride = a.shape[1], W.shape[0], W.stride(0)
    bias = None if bias is None else packed(bias)
    base = None if base is None else rows(base)
    out = W_dec[0].new_empty(N, D)
    status = library.resae_decode(
        codes,
        len(acts),
        N,
        D,
        DTYPES[out.dtype],
        _address(bias),
        _address(base),
        0 if base is None else base.stride(0),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    if status == _BAD_INDEX:
        for i, W in zip(indices, W_dec, strict=True):
            if i.numel() and not 0 <= int(i.min()) <= int(i.max()) < W.shape[0]:
                raise RuntimeError(
                    f"sparse_decode: indices from {int(i.min())} to {int(i.max())}, expected 0 to "
                    f"{W.shape[0] - 1} (W_dec is {list(W.shape)})"
                )
    return out


def quantise(
    weight: Tensor,
    levels: int,
    dither: Tensor,
    weight_dither: Tensor,
    packed: Tensor,
    start: Tensor,
    steps: Tensor,
    shift: Tensor,
    size: Tensor,
    error: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Fill the 8-bit copy of `weight [M, D]`, with unit stride along a row, and what belongs to it
    (`native.c`, `copy`)."""
    library, _ = _load()
    status = library.resae_quantise(
        weight.data_ptr(),
        weight.stride(0),
        DTYPES[weight.dtype],
        *weight.shape,
        levels,
        dither.data_ptr(),
        weight_dither.data_ptr(),
        torch.get_num_threads(),
        packed.data_ptr(),
        start.data_ptr(),
        steps.data_ptr(),
        shift.data_ptr(),
        size.data_ptr(),
        _address(error),
        _address(norm),
    )
    _require_memory(status)


def screened_encode(
    copy: Copy,
    x: Tensor,
    base: Tensor | None,
    pre_bias: Tensor | None,
    k: int,
    sorted: bool,
    amx: bool,
    accept_outliers: bool,
    acts: Tensor,
    indices: Tensor,
    left: np.ndarray,
    relative: np.ndarray,
) -> tuple[int, int, int]:
    """Write the codes of `x − base − pre_bias` `[N, D]` into acts and indices `[N, k]`: the status,
    the number of exact scores, and of rows left to the exact path, which are 1 in `left [N]`."""
    library, _ = _load()
    x = rows(x)
    base = None if base is None else rows(base)
    pre_bias = None if pre_bias is None else packed(pre_bias)
    counts = _Counts()
    status = library.resae_screened_encode(
        copy,
        x.data_ptr(),
        x.stride(0),
        _address(base),
        0 if base is None else base.stride(0),
        _address(pre_bias),
        DTYPES[x.dtype],
        x.shape[0],
        k,
        sorted,
        amx,
        accept_outliers,
        torch.get_num_threads(),
        acts.data_ptr(),
        indices.data_ptr(),
        left.ctypes.data,
        relative.ctypes.data,
        counts,
    )
    _require_memory(status)
    return status, counts[0], counts[1]
