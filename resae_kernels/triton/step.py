# pyright: basic
"""Online step in Triton: at most four launches; the residual has its own from three tokens on.

A gather over the earlier codes (where there are any); scores and group maxima; then, per token and
slice of D, select and decode at once. There every program makes the whole selection for itself: it
costs less than a launch between the two.

That of the first slice is the result. A program reads its code, just written, once more: 10·k bytes
from its cache, for k = 64 an eighth of what its selection reads (group maxima and members, 8 KB in
16 bit) and a tenth of the rows that it gathers. To keep them in registers would save a barrier, but
the selection scatters them to their places, which Triton does through global memory alone (Gluon
has a scatter to shared memory in version 3.9, but not in 3.6). One program per token would select
once, but gather alone what D/64 programs share: 256 KB at D = 2048, some 2.4 µs at 64 bytes
a cycle, where 32 programs take 8 KB each. (Counted, not measured.)
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels.triton import encode_few, runtime
from resae_kernels.triton.decode import launch_decode, sum_entries
from resae_kernels.triton.keys import KEYS
from resae_kernels.triton.runtime import tl, triton
from resae_kernels.triton.selection import (
    GROUP_SIZES,
    SelectionLayout,
    select_row,
    select_warps,
    selection_layout,
)

# As narrow as the decode of few tokens: chosen from ahead-of-time compilation, NOT yet measured.
SLICE_BYTES = 128
"""Part of a row of `W_dec` that one program decodes."""

REGISTERS = 168
"""Registers of a thread: without a bound the assembler takes fewer of itself, and may spill. Few
programs run at a time, so that registers limit nothing."""

ROWS = 64
"""Rows of `W_dec` that a program loads at a time, up to k."""


class StepWorkspace(NamedTuple):
    """Memory of an online step: its results, and what passes between its launches."""

    x_hat: Tensor
    """`[N, D]`, a result."""
    acts: Tensor
    """`[slices of D, N, k]`: the code as the programs of each slice select it; the first is the
    result."""
    indices: Tensor
    """`[slices of D, N, k]` int64, so too."""
    prediction: Tensor
    """`[N, D]`: what the earlier codes predict. Written where they are given with `transported`."""
    scores: Tensor
    """`[N, M]`, each row padded, the bits of scores as integers; in use by "triton" alone, as what
    follows."""
    best: Tensor
    """`[N, groups at most]`: the largest score of each group of latents, so too."""

    @property
    def code(self) -> tuple[Tensor, Tensor]:
        """Acts and indices `[N, k]` of the result."""
        return self.acts[0], self.indices[0]

    @classmethod
    def allocate(
        cls,
        N: int,
        M: int,
        k: int,
        D: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "StepWorkspace":
        """For `online_step` of N tokens through one layer, call after call.

        Layers of one size can share it where each result is used up before the next step; in
        closed loop, where later layers read the codes of earlier ones, each has its own.
        """
        return cls(
            *(
                torch.empty(shape, dtype=dtype, device=device)
                for shape, dtype in workspace_layout(N, M, k, D, dtype)
            )
        )


def workspace_layout(
    N: int, M: int, k: int, D: int, dtype: torch.dtype
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each field of the workspace."""

    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    slices = cdiv(D, SLICE_BYTES // dtype.itemsize)
    bits = KEYS[dtype].dtype if dtype in KEYS else dtype  # fp64 is for "torch" alone
    return (
        ((N, D), dtype),
        ((slices, N, k), dtype),
        ((slices, N, k), torch.int64),
        ((N, D), dtype),
        ((N, cdiv(M, 64) * 64), bits),  # every row starts at a multiple of 16 bytes
        ((N, cdiv(M, min(GROUP_SIZES))), bits),
    )


def launch_step(
    x,
    weight,
    bias,
    W_dec,
    b_dec,
    prediction,
    acts,
    indices,
    dictionaries,
    constant,
    to: StepWorkspace,
) -> None:
    """Write code and x̂ of N rows into `to`. With dictionaries prediction is what the codes `acts`,
    `indices` and `constant` predict."""
    N, (M, D), (slices, _, k) = x.shape[0], weight.shape, to.acts.shape
    layout = selection_layout(M, k) if x.dtype in KEYS else None
    if layout is None:
        raise ValueError(
            f"online_step: 'triton' does not select k={k} of M={M} in {x.dtype} (fp32, bf16 or "
            f"fp16, k ≤ 1024, M ≤ 2¹⁹, next_power_of_2(k) · M ≤ 2²⁶); pass implementation='torch'"
        )
    if N == 0:
        return
    x, weight, W_dec = x.contiguous(), encode_few.readable(weight), W_dec.contiguous()
    bias, b_dec, prediction = (
        None if t is None else t.contiguous() for t in (bias, b_dec, prediction)
    )
    with torch.cuda.device_of(x):
        if dictionaries:
            prediction, _ = launch_decode(
                acts, indices, dictionaries, constant, None, to.prediction
            )
        scores, best = to.scores, to.best
        tile = encode_few.small_gemm_tile(N, weight)
        # x̂ is written last: until then its memory holds the residual.
        encode_few.small_gemm(
            x, weight, bias, b_dec, prediction, scores, best, layout.group, tile, rest=to.x_hat
        )
        select_decode_kernel[(N, slices)](
            to.x_hat,
            to.acts,
            to.acts.view(KEYS[x.dtype].dtype),
            to.indices,
            scores,
            best,
            W_dec,
            b_dec,
            prediction,
            M,
            layout.groups,
            scores.shape[1],
            k,
            **select_decode_settings(layout, D, x.dtype),
        )


@cache
def select_decode_settings(layout: SelectionLayout, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants and options of the selection and decode in one launch."""
    constants = select_decode_constants(layout, D, dtype)
    return constants | runtime.launch_options(select_warps(layout), 1, REGISTERS)


def select_decode_constants(layout: SelectionLayout, D: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "GROUP": layout.group,
        "GROUPS": runtime.next_power_of_2(layout.groups),
        "SLOTS": layout.slots,
        "INF": KEYS[dtype].inf,
        "TOP": KEYS[dtype].top,
        "D": D,
        "BE": min(ROWS, layout.slots),
        "BD": min(SLICE_BYTES // dtype.itemsize, runtime.next_power_of_2(D)),
    }


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def select_decode_kernel(
    x_hat,  # [N, D]
    acts,  # [slices, N, k]
    keys,  # the same memory, as integers
    indices,  # [slices, N, k]
    scores,  # [N, M], rows s_scores apart, as integers
    best,  # [N, groups]
    W_dec,  # [M, D]
    b_dec,  # [D] or None
    prediction,  # [N, D] or None
    M,
    groups,
    s_scores,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # A row of its own: the programs of a token pass through the selection at different times.
    o_row = (i_s * tl.num_programs(0) + tl.program_id(0)) * k
    p_keys, p_indices = keys + o_row, indices + o_row
    p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
    select_row(
        p_scores, None, p_best, p_keys, p_indices, M, groups, k, GROUP, GROUPS, SLOTS, INF, TOP
    )
    tl.debug_barrier()  # the row is read by other threads than those that wrote it
    o_d = i_s * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_sum = sum_entries(acts + o_row, p_indices, W_dec, 0, k, o_d, D, tl.float32, BE, BD)
    if b_dec is not None:
        b_sum += tl.load(b_dec + o_d, mask=m_d, other=0.0).to(tl.float32)
    if prediction is not None:
        b_sum += tl.load(prediction + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(x_hat + i_n * D + o_d, b_sum.to(x_hat.dtype.element_ty), mask=m_d)
