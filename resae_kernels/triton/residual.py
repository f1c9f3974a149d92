# pyright: basic
"""The residual that the encoder reads, in one launch or inside the kernel that multiplies it."""

import torch
from torch import Tensor

from resae_kernels.triton import runtime, tiles
from resae_kernels.triton.runtime import tl, triton


def launch_residual(
    x: Tensor, pre_bias: Tensor | None, prediction: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """`precision.residual` in one launch, into contiguous `out` where it is given."""
    n, D = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tiles.tile("residual", x.device)
    residual_kernel[n, runtime.cdiv(D, tile.columns)](
        x,
        prediction,
        pre_bias,
        out,
        D,
        x.stride(0),
        0 if prediction is None else prediction.stride(0),
        BD=tile.columns,
        **runtime.launch_options(tile.num_warps),
    )
    return out


@triton.jit
def residual_tile(x, prediction, pre_bias, o_x, o_prediction, o_d, m_x, m_d):
    """`x − prediction − pre_bias` in fp32, rounded once to x's dtype."""
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    if prediction is not None:
        b_x = b_x.to(tl.float32) - tl.load(prediction + o_prediction, mask=m_x, other=0.0).to(
            tl.float32
        )
    if pre_bias is not None:
        b_x = b_x.to(tl.float32) - tl.load(pre_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x.to(x.dtype.element_ty)


@triton.jit
def residual_kernel(x, prediction, pre_bias, out, D, s_x, s_prediction, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_x = residual_tile(
        x, prediction, pre_bias, i_n * s_x + o_d, i_n * s_prediction + o_d, o_d, m_d, m_d
    )
    tl.store(out + i_n * D + o_d, b_x, mask=m_d)
