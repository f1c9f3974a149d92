# pyright: basic
"""Encoder GEMM with group maxima, as in `gemm.py`, persistent and warp-specialised, in Gluon.

One program per multiprocessor takes tile after tile. One of its warps only loads: it asks the
tensor memory accelerator for the next blocks of x and weight while others multiply. Two barriers
per buffer pass it from one to the other: `ready`, its blocks have come in; `free`, its blocks have
been multiplied. Scores and maxima of a tile are written

- on compute capability 9.0 by the warps that multiply, from their registers;
- on 10.0, where sums are in tensor memory and one warp starts all products, by four other warps,
  while the sums of the next tile grow in other columns: `whole`, the sums of a tile are complete;
  `read`, they have been taken from tensor memory.

No device has run it: Gluon has no interpreter, and what is known is the machine code
(`tests/static_gate.py`) and its source over a model of barriers (`tests/test_gemm_specialised.py`).
It is never chosen by itself: `resae tune` tries it last.
"""

from typing import Any

import torch
from torch import Tensor

from resae_kernels.triton import runtime
from resae_kernels.triton.keys import KEYS
from resae_kernels.triton.runtime import async_load, blackwell, gl, gluon, hopper, tl
from resae_kernels.triton.tiles import SpecialisedGemmTile, device_class, sizes

STRIP = 64
"""Latents of a tile whose scores a thread takes from tensor memory at a time, to as many
registers."""


def launch_specialised_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    best: Tensor,
    group: int,
    tile: SpecialisedGemmTile,
    programs: int,
) -> None:
    """Write what `gemm.launch_gemm` writes, by at most `programs` programs.

    Raises:
        ValueError: a device of another class than the tile's.
    """
    found = device_class(x.device)
    if found != tile.device_class:
        raise ValueError(
            f"gemm_many_tokens_16bit: tile {sizes(tile)} is for GPUs of class {tile.device_class}, "
            f"got {found}; choose another tile"
        )
    (n, D), M = x.shape, weight.shape[0]
    programs = min(programs, runtime.cdiv(n, tile.tokens) * runtime.cdiv(M, tile.latents))
    specialised_kernel(tile)[(programs,)](
        *(
            _descriptor(t, [r, tile.dimensions])
            for t, r in ((x, tile.tokens), (weight, tile.latents))
        ),
        bias,
        scores,
        best,
        n,
        D,
        M,
        best.shape[1],
        scores.stride(0),
        **specialised_constants(tile, M, group, scores.dtype),
        **runtime.launch_options(tile.num_warps),
    )


def specialised_kernel(tile: SpecialisedGemmTile) -> Any:
    """The kernel that a tile is for."""
    return specialised_gemm_kernel if tile.device_class == "sm_90" else tensor_memory_gemm_kernel


def specialised_constants(
    tile: SpecialisedGemmTile, M: int, group: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    """Compile-time constants of the kernel of a tile."""
    strip = {} if tile.device_class == "sm_90" else {"STRIP": STRIP}
    return strip | {
        "GROUP": group,
        "BN": tile.tokens,
        "BL": tile.latents,
        "BK": tile.dimensions,
        "BUFFERS": tile.buffers,
        "WARPS": tile.num_warps,
        "WHOLE_GROUPS": M % group == 0,
        "INF": KEYS[dtype].inf,
        "TOP": KEYS[dtype].top,
    }


def shared_layout():
    """Layout of a block in shared memory, rows of 128 bytes, as matrix instructions read it."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _descriptor(matrix: Tensor, block: list[int]):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block, shared_layout())


# -- kernels ---------------------------------------------------------------------------------------


@gluon.jit
def _load_blocks(
    x,
    weight,
    x_blocks,
    weight_blocks,
    ready,
    free,
    n,
    D,
    M,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """The warp that loads: blocks of all tiles of the program, in the order of `_multiply`."""
    blocks = gl.cdiv(n, BN)
    step = 0
    for i_tile in range(gl.program_id(0), blocks * gl.cdiv(M, BL), gl.num_programs(0)):
        i_n, i_l = (i_tile % blocks) * BN, (i_tile // blocks) * BL
        for i_d in range(0, D, BK):
            i_buffer, turn = step % BUFFERS, step // BUFFERS  # type: ignore[operator]
            # In its first turn a buffer is free: the phase before the first counts as complete.
            hopper.mbarrier.wait(free.index(i_buffer), (turn & 1) ^ 1)
            arrived = ready.index(i_buffer)
            hopper.mbarrier.expect(arrived, (BN + BL) * BK * 2)
            async_load(x, [i_n, i_d], arrived, x_blocks.index(i_buffer))
            async_load(weight, [i_l, i_d], arrived, weight_blocks.index(i_buffer))
            step += 1


@gluon.jit
def _write(
    b_score,  # [BN, COLUMNS], in layout TILE
    bias,
    scores,
    best,
    i_n,
    i_l,
    n,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # layout of the maxima, [BN, COLUMNS / GROUP]
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """Write the scores of tokens i_n … and latents i_l …, and the maxima of their groups."""
    o_n = i_n + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    o_l = i_l + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
    m_score = gl.expand_dims(o_n < n, 1) & gl.expand_dims(o_l < M, 0)
    if bias is not None:
        b_bias = gl.load(bias + o_l, mask=o_l < M, other=0.0).to(gl.float32)
        b_score = b_score + gl.expand_dims(b_bias, 0)
    # The one rounding: what is compared is what is returned.
    o_score = gl.expand_dims(o_n.to(gl.int64) * s_scores, 1) + gl.expand_dims(o_l, 0)
    gl.store(scores + o_score, b_score.to(scores.dtype.element_ty), mask=m_score)
    # Bits of fp32 are ordered as the keys are; rounding the largest gives the largest rounded.
    b_bits = b_score.to(gl.int32, bitcast=True)
    b_bits = gl.where(b_score != b_score, 0x7FFFFFFF, b_bits)
    if not WHOLE_GROUPS:  # where x is infinite, a latent past the last holds 0 · inf
        b_bits = gl.where(m_score, b_bits, 0)
    # [BN, COLUMNS / GROUP]
    b_best = gl.max(b_bits.reshape([BN, COLUMNS // GROUP, GROUP]), axis=2)
    b_best = gl.convert_layout(b_best, ROWS).to(gl.float32, bitcast=True)
    b_best = b_best.to(scores.dtype.element_ty).to(gl.int16, bitcast=True).to(gl.int32)
    b_best = gl.where((b_best & TOP) > INF, TOP, b_best)  # as `keys.key`
    o_n = i_n + gl.arange(0, BN, gl.SliceLayout(1, ROWS))
    o_g = i_l // GROUP + gl.arange(0, COLUMNS // GROUP, gl.SliceLayout(0, ROWS))
    m_best = gl.expand_dims(o_n < n, 1) & gl.expand_dims(o_g < groups, 0)
    o_best = gl.expand_dims(o_n.to(gl.int64) * groups, 1) + gl.expand_dims(o_g, 0)
    gl.store(best + o_best, b_best.to(gl.int16), mask=m_best)


@gluon.jit
def _multiply(
    bias,
    scores,
    best,
    x_blocks,
    weight_blocks,
    ready,
    free,
    n,
    D,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BUFFERS: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """The warps that multiply, and write the scores and group maxima of their tiles."""
    TILE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BL, 16])
    # A thread stores the maxima of one token.
    ROWS: tl.constexpr = gl.BlockedLayout([1, BL // GROUP], [32, 1], [WARPS, 1], [1, 0])
    blocks = gl.cdiv(n, BN)
    step = 0
    for i_tile in range(gl.program_id(0), blocks * gl.cdiv(M, BL), gl.num_programs(0)):
        i_n, i_l = (i_tile % blocks) * BN, (i_tile // blocks) * BL
        # [BN, BL]
        b_score = gl.zeros([BN, BL], gl.float32, TILE)
        for i_d in range(0, D, BK):
            i_buffer, turn = step % BUFFERS, step // BUFFERS  # type: ignore[operator]
            hopper.mbarrier.wait(ready.index(i_buffer), turn & 1)
            b_w = weight_blocks.index(i_buffer).permute((1, 0))
            b_score = hopper.warpgroup_mma(x_blocks.index(i_buffer), b_w, b_score, is_async=True)
            # All products but the last are complete: the buffer before is free.
            b_score = hopper.warpgroup_mma_wait(1, deps=[b_score])
            i_before = (step + BUFFERS - 1) % BUFFERS
            hopper.mbarrier.arrive(free.index(i_before), count=1, pred=i_d > 0)
            step += 1
        b_score = hopper.warpgroup_mma_wait(0, deps=[b_score])
        hopper.mbarrier.arrive(free.index((step + BUFFERS - 1) % BUFFERS), count=1)
        _write(
            b_score, bias, scores, best, i_n, i_l, n, M, groups, s_scores,
            GROUP, BN, BL, TILE, ROWS, WHOLE_GROUPS, INF, TOP,
        )  # fmt: skip


@gluon.jit
def specialised_gemm_kernel(
    x,  # descriptor of [n, D]
    weight,  # descriptor of [M, D]
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups], as integers
    n,
    D,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BUFFERS: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    x_blocks = gl.allocate_shared_memory(x.dtype, [BUFFERS, BN, BK], x.layout)
    weight_blocks = gl.allocate_shared_memory(weight.dtype, [BUFFERS, BL, BK], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(free.index(i), count=1)
    # The tuples stand here: in a variable, Triton would take constants for tensors. One warp of 24
    # registers a thread loads: it computes addresses alone.
    gl.warp_specialize(
        [
            (_multiply, (
                bias, scores, best, x_blocks, weight_blocks, ready, free, n, D, M, groups, s_scores,
                GROUP, BN, BL, BK, BUFFERS, WARPS, WHOLE_GROUPS, INF, TOP,
            )),
            (_load_blocks, (
                x, weight, x_blocks, weight_blocks, ready, free, n, D, M, BN, BL, BK, BUFFERS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _multiply_in_tensor_memory(
    sums,
    x_blocks,
    weight_blocks,
    ready,
    free,
    whole,
    read,
    n,
    D,
    M,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """The warp that starts all products; of two tiles by turns, into one half of tensor memory
    each."""
    blocks = gl.cdiv(n, BN)
    step, i_turn = 0, 0
    for _ in range(gl.program_id(0), blocks * gl.cdiv(M, BL), gl.num_programs(0)):
        i_sum, turn = i_turn % 2, i_turn // 2  # type: ignore[operator]
        # In its first turn a half is free, as the buffers are.
        hopper.mbarrier.wait(read.index(i_sum), (turn & 1) ^ 1)
        for i_d in range(0, D, BK):
            i_buffer, round_ = step % BUFFERS, step // BUFFERS  # type: ignore[operator]
            hopper.mbarrier.wait(ready.index(i_buffer), round_ & 1)
            # The product frees its buffer when it is complete.
            blackwell.tcgen05_mma(
                x_blocks.index(i_buffer),
                weight_blocks.index(i_buffer).permute((1, 0)),
                sums.index(i_sum),
                use_acc=i_d > 0,
                mbarriers=[free.index(i_buffer)],
            )
            step += 1
        blackwell.tcgen05_commit(whole.index(i_sum))
        i_turn += 1  # noqa: SIM113 - a loop of the device


@gluon.jit
def _write_tiles(
    bias,
    scores,
    best,
    sums,
    whole,
    read,
    n,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    STRIP: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    """The warps that write: a thread takes the scores of one token, and finds their maxima."""
    TILE: tl.constexpr = gl.BlockedLayout([1, STRIP], [32, 1], [WARPS, 1], [1, 0])
    ROWS: tl.constexpr = gl.BlockedLayout([1, STRIP // GROUP], [32, 1], [WARPS, 1], [1, 0])
    blocks = gl.cdiv(n, BN)
    i_turn = 0
    for i_tile in range(gl.program_id(0), blocks * gl.cdiv(M, BL), gl.num_programs(0)):
        i_n, i_l = (i_tile % blocks) * BN, (i_tile // blocks) * BL
        i_sum, turn = i_turn % 2, i_turn // 2  # type: ignore[operator]
        hopper.mbarrier.wait(whole.index(i_sum), turn & 1)
        for i_strip in gl.static_range(BL // STRIP):
            b_score = sums.index(i_sum).slice(i_strip * STRIP, STRIP).load(TILE)
            if i_strip == BL // STRIP - 1:
                hopper.mbarrier.arrive(read.index(i_sum), count=1)
            _write(
                b_score, bias, scores, best, i_n, i_l + i_strip * STRIP, n, M, groups, s_scores,
                GROUP, BN, STRIP, TILE, ROWS, WHOLE_GROUPS, INF, TOP,
            )  # fmt: skip
        i_turn += 1  # noqa: SIM113 - a loop of the device


@gluon.jit
def tensor_memory_gemm_kernel(
    x,  # descriptor of [n, D]
    weight,  # descriptor of [M, D]
    bias,  # [M] or None
    scores,  # [n, M], rows s_scores apart
    best,  # [n, groups], as integers
    n,
    D,
    M,
    groups,
    s_scores,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    STRIP: tl.constexpr,
    BUFFERS: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
):
    SUMS: tl.constexpr = blackwell.TensorMemoryLayout([BN, BL], col_stride=1)
    sums = blackwell.allocate_tensor_memory(gl.float32, [2, BN, BL], SUMS)
    x_blocks = gl.allocate_shared_memory(x.dtype, [BUFFERS, BN, BK], x.layout)
    weight_blocks = gl.allocate_shared_memory(weight.dtype, [BUFFERS, BL, BK], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], hopper.mbarrier.MBarrierLayout())
    whole = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        hopper.mbarrier.init(whole.index(i), count=1)
        hopper.mbarrier.init(read.index(i), count=1)
    gl.warp_specialize(
        [
            (_write_tiles, (
                bias, scores, best, sums, whole, read, n, M, groups, s_scores,
                GROUP, BN, BL, STRIP, WARPS, WHOLE_GROUPS, INF, TOP,
            )),
            (_multiply_in_tensor_memory, (
                sums, x_blocks, weight_blocks, ready, free, whole, read, n, D, M,
                BN, BL, BK, BUFFERS,
            )),
            (_load_blocks, (
                x, weight, x_blocks, weight_blocks, ready, free, n, D, M, BN, BL, BK, BUFFERS,
            )),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
