"""Screening by the compiled library (`native.c`): a whole encode is one call.

The mathematics is in `screened.py`. Besides float32, weights and activations may be bfloat16
or float16: scores are summed in float32 and rounded to their dtype before they are compared, so the
bounds are widened by that rounding.
"""

import math
from collections.abc import Sequence
from ctypes import c_float, c_uint8
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resae_kernels.cpu import native
from resae_kernels.screening_bounds import (
    ROUNDING,
    SAMPLES,
    STEPS,
    ScreenedRows,
    StaleCopyError,
    certain_bounds,
    draw_dither,
    statistical_bounds,
)

OUTLIER = 8.0
"""Multiple of its row's root mean square from which on an entry of the residual would stretch the
row's step: its dimension becomes a column of the copy, which is multiplied in float32."""


class _Quantised(NamedTuple):
    """A weight `[M, D]` as 8-bit levels, with padded latents and dimensions, and what its bounds
    are made of: one entry per latent, dithers one per dimension."""

    packed: Tensor
    start: Tensor
    steps: Tensor
    shift: Tensor
    size: Tensor
    error: Tensor
    """Zero unless the bounds are certain, as `norm`."""
    norm: Tensor
    dither: Tensor
    weight_dither: Tensor


def _quantised(weight: Tensor, seed: int, certain: bool) -> _Quantised:
    (M, D), multiple = weight.shape, native.LATENTS
    latents, depth = -(-M // multiple) * multiple, -(-D // native.DEPTH) * native.DEPTH
    dither, weight_dither = torch.zeros(2, depth, dtype=torch.float32)
    dither[:D], weight_dither[:D] = draw_dither(seed, D)
    packed = torch.empty(latents, depth, dtype=torch.int8)
    start = torch.zeros(latents, dtype=torch.int32)
    steps, shift, size, error, norm = torch.zeros(5, latents, dtype=torch.float32)
    native.quantise(
        weight, STEPS, dither, weight_dither, packed, start, steps, shift, size,
        *((error, norm) if certain else (None, None)),
    )  # fmt: skip
    return _Quantised(packed, start, steps, shift, size, error, norm, dither, weight_dither)


class NativeCopy:
    """The 8-bit copy of a weight `[M, D]` as the library reads it, M·D bytes.

    Outlier dimensions are the model's own, call after call: those met so far have a column each,
    up to `native.MOST_COLUMNS`, and `dimensions` hands them on to the next copy.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        margin: str,
        seed: int,
        dimensions: Sequence[int] = (),
    ):
        given, weight = weight, native.rows(weight)
        live_bias = None if bias is None else native.packed(bias)
        (M, D), certain = weight.shape, margin == "certain"
        levels = _quantised(weight, seed, certain)
        self._packed, latents = levels.packed, len(levels.packed)
        all_bias = torch.full((latents,), -math.inf, dtype=torch.float32)
        all_bias[:M] = 0.0 if live_bias is None else live_bias
        largest_bias = 0.0 if bias is None else float(all_bias[:M].abs().max())
        self.finite = math.isfinite(largest_bias) and bool(levels.size.isfinite().all())
        if not self.finite:
            return
        bounds = (
            certain_bounds(levels.error, levels.norm, D)
            if certain
            else statistical_bounds(levels.steps, levels.size, M, D)
        )
        terms = bounds.terms.contiguous()
        self._weight = weight
        every = max(1, M // SAMPLES)
        samples = weight[::every, D // 2].clone()
        self.is_live = weight is given and live_bias is bias
        """True if the library reads the weight and bias themselves, not contiguous copies."""
        self._tensors = samples, live_bias, levels, all_bias, terms
        self._struct = native.Copy(
            M=M,
            D=D,
            weight=weight.data_ptr(),
            weight_stride=weight.stride(0),
            weight_dtype=native.DTYPES[weight.dtype],
            live_bias=None if live_bias is None else live_bias.data_ptr(),
            packed=levels.packed.data_ptr(),
            start=levels.start.data_ptr(),
            steps=levels.steps.data_ptr(),
            shift=levels.shift.data_ptr(),
            bias=all_bias.data_ptr(),
            bounds=terms[0].data_ptr(),
            norm_bounds=terms[1].data_ptr() if certain else None,
            dither=levels.dither.data_ptr(),
            weight_dither=levels.weight_dither.data_ptr(),
            samples=samples.data_ptr(),
            sample_step=every,
            ratio=bounds.ratio,
            largest_bias=largest_bias,
            largest_bound=float(terms[-1].max()),
            outlier=OUTLIER,
            rounding=ROUNDING,
        )
        self.held = self._columns(dimensions)
        """The library's copy, its outlier dimensions, and the tensors that own its addresses."""

    @property
    def dimensions(self) -> tuple[int, ...]:
        return self.held[1]

    def _columns(
        self, dimensions: Sequence[int]
    ) -> tuple[native.Copy, tuple[int, ...], tuple[Tensor, ...]]:
        """The copy with these dimensions as columns, and what its addresses need to be kept. It is
        replaced as a whole: another thread may be screening with the one before."""
        struct = native.Copy.from_buffer_copy(self._struct)
        (M, _), latents = self._weight.shape, len(self._packed)
        columns = torch.zeros(len(dimensions), latents, dtype=torch.float32)
        if dimensions:
            columns[:, :M] = self._weight[:, list(dimensions)].T
        which = torch.tensor(dimensions, dtype=torch.int32)
        struct.columns, struct.column_dimensions = columns.data_ptr(), which.data_ptr()
        struct.n_columns = len(dimensions)
        return struct, tuple(dimensions), (columns, which)

    def encode(
        self,
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        threshold: Tensor | None = None,
        *,
        amx: bool | None = None,
    ) -> ScreenedRows:
        """Codes, as `ScreeningCopy.encode`; x, pre_bias, prediction and threshold in the weight's
        dtype. `amx` False uses VNNI instructions where AMX could multiply."""
        N, D = x.shape
        acts, indices = native.new_code(x, (N, k))
        n_active = None if threshold is None else indices.new_empty(N, dtype=torch.int32)
        left, relative = (c_uint8 * N)(), (c_float * D)()
        accept_outliers = False
        while True:
            struct, dimensions, kept = self.held
            status, candidates, rows_left = native.screened_encode(
                struct,
                x,
                prediction,
                pre_bias,
                k,
                sorted,
                native.has_amx() if amx is None else amx,
                accept_outliers or len(dimensions) == native.MOST_COLUMNS,
                acts,
                indices,
                left,
                relative,
                threshold,
                n_active,
            )
            del kept
            if status != native.NEW_COLUMNS:
                break
            wanted = _with_largest(dimensions, np.array(relative))
            # None more: the library and this comparison may round an entry at the limit apart.
            accept_outliers = len(wanted) == len(dimensions)
            if not accept_outliers:
                self.held = self._columns(wanted)
            relative = (c_float * D)()
        if status == native.STALE_COPY:
            raise StaleCopyError
        exact = torch.from_numpy(np.array(left).nonzero()[0]) if rows_left else None
        return ScreenedRows(acts, indices, exact, candidates, n_active)


def _with_largest(dimensions: Sequence[int], relative: np.ndarray) -> tuple[int, ...]:
    """These dimensions and those of the largest outliers, as many as there is room for."""
    relative[list(dimensions)] = 0.0
    room = native.MOST_COLUMNS - len(dimensions)
    largest = np.argsort(-relative, kind="stable")[:room]
    return (*dimensions, *(int(d) for d in largest if relative[d] > OUTLIER))
