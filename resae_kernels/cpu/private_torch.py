"""All uses of torch's private interfaces in this package, each with a probe.

Torch may move or remove them in any version. For each there is a fallback with the same result, or
a probe by which the caller chooses its own.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from resae_kernels import memory


def _found(path: str, otherwise: Callable[..., Any]) -> Any:
    """`torch.<path>`, or `otherwise` where this torch has no such thing."""
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        return otherwise


# -- what sees a call ------------------------------------------------------------------------------
# Where torch cannot tell, calls count as seen: they go through the dispatcher, which is slower and
# always right.

_dispatch_modes = _found("_C._len_torch_dispatch_stack", lambda: 1)
"""Number of active dispatch modes (fake tensors, tracing, counting of FLOPs)."""
_transform = _found("_C._functorch.maybe_current_level", lambda: 0)
"""Level of the innermost transform of `torch.func`, whose tensors have no memory; None: none."""
is_profiled: Callable[[], bool] = _found("_C._autograd._profiler_enabled", lambda: True)
"""True if torch's profiler records dispatched calls."""


_is_cast: Callable[[], bool] = _found(
    "_C._is_any_autocast_enabled",
    lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
)
"""True if autocast casts calls, on any device type."""


def is_transformed() -> bool:
    """True inside a transform of `torch.func` or a level of forward-mode differentiation. Ops of
    this package have no rule for these: tangents would be lost."""
    return _is_forward_mode() or _transform() is not None


def _is_forward_mode() -> bool:
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def refuse_forward_mode(op: str) -> None:
    """Raise NotImplementedError inside forward-mode differentiation: the tangents of the result
    would be zero, without a word."""
    if _is_forward_mode():
        raise NotImplementedError(
            f"{op}: no forward-mode derivative (torch.func.jvp, forward_ad); use reverse mode, or "
            f"`resae_kernels.reference`"
        )


def is_eager() -> bool:
    """True if nothing traces, transforms or casts calls."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or is_transformed() or _is_cast()
    )


# -- ops of the CPU --------------------------------------------------------------------------------


def gathered_dot(x: Tensor, tokens: Tensor, W: Tensor, latents: Tensor) -> Tensor:
    """SDDMM of pairs in any order: ⟨x[tokens], W[latents]⟩, `[P]`, on a CPU in fp32 or fp64.

    The gradient of `embedding_bag` in its weights computes it without copying a row. Where torch
    has no such op, rows are gathered.
    """
    private = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if private is not None:
        x, W, mode_sum = x.contiguous(), W.contiguous(), 0
        return private(x, W, latents.contiguous(), tokens.new_zeros(1), tokens, mode_sum)
    out = x.new_empty(len(tokens))
    for chunk in memory.row_chunks(len(tokens), W.shape[1] * W.itemsize, memory.GATHER_BYTES):
        out[chunk] = (x[tokens[chunk]] * W[latents[chunk]]).sum(-1)
    return out


def has_onednn_linear() -> bool:
    """True if this torch has the float32 linear op of oneDNN (`onednn_linear`)."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` of contiguous float32 tensors, which have no gradient. The op takes
    addresses: it reads a strided bias as if it were contiguous, past its end."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def has_16bit_gemm(dtype: torch.dtype) -> bool:
    """True if torch has a CPU GEMM of this 16-bit dtype by instructions made for it, accumulating
    in float32."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    probe = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return probe is not None and bool(probe())


def int8_linear_unavailable() -> str | None:
    """Why this processor or torch has no 8-bit linear op (`int8_linear`); None if it has.

    Needs the 8-bit dot product instructions (VNNI: without them the integer GEMM saturates) and
    oneDNN's quantised linear op.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this processor has no 8-bit dot product instructions (AVX-512 VNNI)"
    names = ("qlinear_prepack", "qlinear_pointwise")
    if not all(hasattr(torch.ops.onednn, name) for name in names):
        return f"torch {torch.__version__} has no torch.ops.onednn.{' and '.join(names)}"
    return None


def int8_pack(weight: Tensor, rows: int) -> Tensor:
    """An int8 `weight [M, D]` as `int8_linear` reads it, for inputs of `rows` rows."""
    return torch.ops.onednn.qlinear_prepack(weight, [rows, weight.shape[1]])


def int8_linear(
    levels: Tensor,  # [n, D] uint8, 128 more than the levels meant
    packed: Tensor,  # by int8_pack
    steps: Tensor,  # [M]
    zero_points: Tensor,  # [M] int64, 0
    shift: Tensor,  # [M]
) -> Tensor:
    """`[n, M]` float32: `steps · ((levels − 128) @ weight.T) + shift`."""
    return torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, 128, packed, steps, zero_points, shift, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
