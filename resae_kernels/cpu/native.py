"""The compiled CPU library (`native.c`): loading it, and its functions on tensors.

Every function takes CPU tensors of one dtype (float32, bfloat16 or float16), in any layout: this
is the one place that makes them what C reads, with unit stride along a row. None has a gradient.
Built when the package is installed (`build_native.py`); runs where the processor has AVX-512 with
VNNI, and multiplies by AMX where there is that too. Threads are torch's.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_uint8, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from resae_kernels.cpu.private_torch import is_eager, is_profiled

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXACT_ROWS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""Rows up to which `exact_encode` is faster than torch's GEMM and `select`, by dtype: measured
on one core of an Intel Xeon with AMX at 1 to 16 rows, D from 128 to 768, M from 512 to 24,576."""
LATENTS, DEPTH = 32, 64
"""Latents and entries of a row are padded to multiples of these in the 8-bit copy."""
MOST_COLUMNS = 16
"""Outlier dimensions that a copy can hold."""
_PLAIN = (Tensor, torch.nn.Parameter)
_INTEGERS = torch.empty(0, dtype=torch.int64)
"""Prototype of indices: naming the dtype takes torch a microsecond longer."""
_OK, _NO_MEMORY, _BAD_INDEX, STALE_COPY, NEW_COLUMNS, ROWS_LEFT = range(6)


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
        ("samples", c_void_p),
        ("sample_step", c_int64),
        *(
            (name, c_float)
            for name in ("ratio", "largest_bias", "largest_bound", "outlier", "rounding")
        ),
    ]


class Layer(ctypes.Structure):
    """Arguments that the online steps of one layer share, as `native.c` reads them."""

    _fields_ = [
        *((name, c_void_p) for name in ("A", "c", "b_dec", "W_dec")),
        *((name, c_int64) for name in ("k", "dtype", "sorted", "use_amx")),
    ]


_Counts = c_int64 * 2


class _Code(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("acts", "indices", "W")),
        *((name, c_int64) for name in ("k", "M", "stride")),
    ]


class _Sum(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weights", "rows")),
        ("stride", c_int64),
        ("out", c_void_p),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "resae_select": [
        *(c_void_p, c_int64, c_int, c_int64, c_int64, c_int64, c_int, c_int),
        *(c_void_p,) * 4,
    ],
    "resae_quantise": [
        *(c_void_p, c_int64, c_int, c_int64, c_int64, c_float, c_void_p, c_void_p, c_int),
        *(c_void_p,) * 7,
    ],
    "resae_screened_encode": [
        *(POINTER(Copy), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64),
        *(c_int, c_int, c_int, c_int, *(c_void_p,) * 7),
    ],
    "resae_decode": [
        *(c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int),
        c_void_p,
    ],
    "resae_sddmm": [
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int64, c_int64, c_int64, c_int64),
        *(c_int, c_void_p),
    ],
    "resae_scatter_outer": [
        *(c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64, c_int),
    ],
    "resae_scatter_sum": [c_void_p, c_void_p, c_int64, c_int64, c_void_p],
    "resae_online_step": [
        *(POINTER(Copy), POINTER(Layer), c_void_p, c_void_p, c_int64, c_int),
        *(c_void_p, c_void_p, c_void_p),
    ],
    "resae_exact_encode": [
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int),
        *(c_int64, c_int64, c_int64, c_int64, c_int, c_int, *(c_void_p,) * 4),
    ],
}


@cache
def _load() -> tuple[Any, str | None]:
    """The library, or why there is none."""
    from resae_kernels.cpu.build_native import LIBRARY, SOURCE, source_version

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
    """True if the library multiplies by AMX."""
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


def direct(first: Tensor, *others: Tensor | None) -> bool:
    """May the library be called with these tensors at once, past the dispatcher?

    That is: plain CPU tensors of one dtype, no gradient wanted, eager. For few tokens the
    dispatcher takes longer than the work. Under torch's profiler, which sees what is dispatched,
    calls take the long way.
    """
    if not is_eager() or _load()[1] is not None or is_profiled():
        return False
    wants_gradient, dtype = torch.is_grad_enabled(), getattr(first, "dtype", None)
    if dtype not in DTYPES:
        return False
    for t in (first, *others):
        if t is not None and (
            type(t) not in _PLAIN
            or t.dtype is not dtype
            or not t.is_cpu
            or t.is_neg()
            or (wants_gradient and t.requires_grad)
        ):
            return False
    return True


def rows(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last dimension: itself, if it has."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def packed(tensor: Tensor) -> Tensor:
    """The tensor with all its entries side by side."""
    return (
        tensor
        if tensor.is_contiguous() and not tensor.is_neg()
        else tensor.resolve_neg().contiguous()
    )


def new_code(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Acts in x's dtype and indices of this shape, `[..., k]`, not yet written."""
    return x.new_empty(shape), _INTEGERS.new_empty(shape)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require_memory(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("resae_kernels: out of memory on the CPU")


def select(
    scores: Tensor,
    k: int,
    sorted: bool,
    threshold: Tensor | None = None,
    n_active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact TopK of relu(scores), `[N, M]` → `[N, k]`: ties to the lower index, NaN first, padding
    last. With `threshold [M]` of the scores above it, which are counted into `n_active [N]`,
    int32 and contiguous."""
    scores, threshold = rows(scores), None if threshold is None else packed(threshold)
    (N, M), (library, _) = scores.shape, _load()
    acts, indices = new_code(scores, (N, k))
    status = library.resae_select(
        scores.data_ptr(),
        scores.stride(0),
        DTYPES[scores.dtype],
        N,
        M,
        k,
        sorted,
        torch.get_num_threads(),
        _address(threshold),
        acts.data_ptr(),
        indices.data_ptr(),
        _address(n_active),
    )
    _require_memory(status)
    return acts, indices


def decode(
    acts: Sequence[Tensor],
    indices: Sequence[Tensor],
    W_dec: Sequence[Tensor],
    bias: Tensor | None,
    prediction: Tensor | None,
) -> Tensor:
    """`Σ acts · W_dec + prediction + bias`: codes `[..., k]` to `[..., D]`, summed in float32 and
    rounded once; acts of 0 are left out.

    Raises:
        RuntimeError: an index outside its dictionary.
    """
    library = _load()[0]
    leading, D = acts[0].shape[:-1], W_dec[0].shape[1]
    kept, codes = [], (_Code * len(acts))()
    for code, a, i, W in zip(codes, acts, indices, W_dec, strict=True):
        a, i, W = packed(a), packed(i), rows(W)
        kept.append((a, i, W))
        code.acts, code.indices, code.W = a.data_ptr(), i.data_ptr(), W.data_ptr()
        code.k, (code.M, _), code.stride = a.shape[-1], W.shape, W.stride(0)
    bias = None if bias is None else packed(bias)
    prediction = None if prediction is None else packed(prediction)
    out = W_dec[0].new_empty(*leading, D)
    status = library.resae_decode(
        codes,
        len(acts),
        leading.numel(),
        D,
        DTYPES[out.dtype],
        _address(bias),
        _address(prediction),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    if status == _BAD_INDEX:
        for i, W in zip(indices, W_dec, strict=True):
            _require_within("sparse_decode", i, W.shape[0])
    return out


def _require_within(op: str, indices: Tensor, M: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < M:
        raise RuntimeError(
            f"{op}: indices from {int(indices.min())} to {int(indices.max())}, expected 0 to "
            f"{M - 1}, one for each of the {M} latents"
        )


def sddmm(x: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """`out[n,j] = ⟨x[n], W[indices[n,j]]⟩`: `x [N, D]`, `indices [N, k]`, `W [M, D]` to `[N, k]`,
    summed in float32 and rounded once.

    Raises:
        RuntimeError: an index outside W.
    """
    x, indices, W = packed(x), packed(indices), rows(W)
    out = x.new_empty(indices.shape)
    status = _load()[0].resae_sddmm(
        x.data_ptr(),
        indices.data_ptr(),
        W.data_ptr(),
        W.stride(0),
        DTYPES[x.dtype],
        *indices.shape,
        *W.shape,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    if status == _BAD_INDEX:
        _require_within("sddmm", indices, W.shape[0])
    return out


def scatter_outer(
    weights: Sequence[Tensor], indices: Tensor, tokens: Sequence[Tensor], M: int
) -> list[Tensor]:
    """`out[s][m] = Σ weights[s][n,j] · tokens[s][n]` over the entries with `indices[n,j] = m` whose
    `weights[0]` is not 0: weights `[N, k]` and `tokens [N, D]`, S of each, to S × `[M, D]`, summed
    in float32 in order of n and rounded once. The code is sorted once for all.

    Raises:
        RuntimeError: an index outside 0 to M − 1.
        MemoryError: no memory for the sorted code.
    """
    weights, indices = [packed(w) for w in weights], packed(indices)
    tokens = [rows(t) for t in tokens]
    D, dtype = tokens[0].shape[1], DTYPES[tokens[0].dtype]
    out = [t.new_empty(M, D) for t in tokens]
    summed = (_Sum * len(out))()
    for one, w, t, o in zip(summed, weights, tokens, out, strict=True):
        one.weights, one.rows, one.stride, one.out = (
            *(w.data_ptr(), t.data_ptr()),
            *(t.stride(0), o.data_ptr()),
        )
    status = _load()[0].resae_scatter_outer(
        summed, len(out), indices.data_ptr(), dtype, *indices.shape, M, D, torch.get_num_threads()
    )
    _require_memory(status)
    if status == _BAD_INDEX:
        _require_within("scatter_outer", indices, M)
    return out


def scatter_sum(acts: Tensor, indices: Tensor, M: int) -> Tensor:
    """`out[m] = Σ acts[n,j]` over the entries with `indices[n,j] = m`: float32 codes `[N, k]` to
    `[M]`.

    Raises:
        RuntimeError: an index outside 0 to M − 1.
    """
    acts, indices = packed(acts), packed(indices)
    out = acts.new_empty(M)
    status = _load()[0].resae_scatter_sum(
        acts.data_ptr(), indices.data_ptr(), indices.numel(), M, out.data_ptr()
    )
    if status == _BAD_INDEX:
        _require_within("scatter_sum", indices, M)
    return out


def exact_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    threshold: Tensor | None = None,
    n_active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """TopK of relu((x − prediction − pre_bias) weightᵀ + bias), `[N, D]` → acts and indices
    `[N, k]`: all N·M scores are summed in float32, held at once and rounded to the dtype of
    everything given. `threshold` and `n_active` as of `select`."""
    library = _load()[0]
    x, weight = packed(x), rows(weight)
    threshold = None if threshold is None else packed(threshold)
    bias = None if bias is None else packed(bias)
    pre_bias = None if pre_bias is None else packed(pre_bias)
    prediction = None if prediction is None else packed(prediction)
    (N, D), M = x.shape, weight.shape[0]
    acts, indices = new_code(x, (N, k))
    status = library.resae_exact_encode(
        x.data_ptr(),
        _address(prediction),
        _address(pre_bias),
        weight.data_ptr(),
        weight.stride(0),
        _address(bias),
        DTYPES[x.dtype],
        N,
        M,
        D,
        k,
        sorted,
        torch.get_num_threads(),
        _address(threshold),
        acts.data_ptr(),
        indices.data_ptr(),
        _address(n_active),
    )
    _require_memory(status)
    return acts, indices


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
    prediction: Tensor | None,
    pre_bias: Tensor | None,
    k: int,
    sorted: bool,
    amx: bool,
    accept_outliers: bool,
    acts: Tensor,
    indices: Tensor,
    left: ctypes.Array[c_uint8],
    relative: ctypes.Array[c_float],
    threshold: Tensor | None = None,
    n_active: Tensor | None = None,
) -> tuple[int, int, int]:
    """Write the codes of `x − prediction − pre_bias` `[N, D]` into acts and indices `[N, k]`: the
    status, the number of exact scores, and of rows left to the exact path, which are 1 in `left
    [N]`. `threshold` and `n_active` as of `select`."""
    library, _ = _load()
    x, threshold = rows(x), None if threshold is None else packed(threshold)
    prediction = None if prediction is None else rows(prediction)
    pre_bias = None if pre_bias is None else packed(pre_bias)
    counts = _Counts()
    status = library.resae_screened_encode(
        copy,
        x.data_ptr(),
        x.stride(0),
        _address(prediction),
        0 if prediction is None else prediction.stride(0),
        _address(pre_bias),
        DTYPES[x.dtype],
        x.shape[0],
        k,
        sorted,
        amx,
        accept_outliers,
        torch.get_num_threads(),
        _address(threshold),
        acts.data_ptr(),
        indices.data_ptr(),
        _address(n_active),
        left,
        relative,
        counts,
    )
    _require_memory(status)
    return status, counts[0], counts[1]


def layer(
    W_dec: Tensor,
    b_dec: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    k: int,
    sorted: bool,
) -> Layer:
    """For `online_step`: addresses of contiguous tensors of one dtype, which the caller keeps."""
    A, c = affine or (None, None)
    addresses = map(_address, (A, c, b_dec, W_dec))
    return Layer(*addresses, k, DTYPES[W_dec.dtype], sorted, has_amx())


def online_step(
    copy: Copy, layer: Layer, x: Tensor, prediction: Tensor | None, code: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x̂ like x `[..., D]`, acts and indices like those of `code`, of contiguous tensors:
    `prediction` is the prediction, or the source of one where the layer has a map. None where one
    call does not do: rows left to the exact path, new outlier dimensions, or a weight that has
        changed."""
    x_hat = torch.empty_like(x)
    acts, indices = torch.empty_like(code[0]), torch.empty_like(code[1])
    status = _load()[0].resae_online_step(
        copy,
        layer,
        x.data_ptr(),
        None if prediction is None else prediction.data_ptr(),
        indices.numel() // layer.k,
        torch.get_num_threads(),
        acts.data_ptr(),
        indices.data_ptr(),
        x_hat.data_ptr(),
    )
    if status == _OK:
        return x_hat, acts, indices
    _require_memory(status)
    return None
