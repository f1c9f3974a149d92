# pyright: basic
"""Scores as integers, in whose order the selection compares them."""

from typing import NamedTuple

import torch

from resae_kernels.triton.runtime import tl, triton


class Keys(NamedTuple):
    """Scores as integers, in whose order selection is done."""

    dtype: torch.dtype
    """Signed, as wide as the scores."""
    inf: int
    """Bits of +inf: a larger magnitude is a NaN."""
    top: int
    """The largest integer, itself a NaN: the key of every NaN."""


KEYS = {
    torch.bfloat16: Keys(torch.int16, 0x7F80, 0x7FFF),
    torch.float16: Keys(torch.int16, 0x7C00, 0x7FFF),
    torch.float32: Keys(torch.int32, 0x7F800000, 0x7FFFFFFF),
}


@triton.jit
def key(bits, INF: tl.constexpr, TOP: tl.constexpr):
    """Scores' bits to int32: positive in the scores' order, NaN of either sign on top. Negative
    scores are negative in some order: the selection takes positive keys alone, which is relu."""
    bits = bits.to(tl.int32)
    return tl.where((bits & TOP) > INF, TOP, bits)
