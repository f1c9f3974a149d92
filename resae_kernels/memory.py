"""Bounds on the memory that an op holds at once, and chunks of rows within a bound."""

from collections.abc import Iterator

from torch import Tensor

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Default bound on what an op holds at once of tokens × latents, by device type: about a CPU's
last-level cache; on a GPU thousands of rows, so that a dictionary is not read again for every few
of them."""

GATHER_BYTES = 64 << 20
"""Bound on the gathered rows `[n, k, D]` that a gradient of the acts in torch holds at once."""


def workspace_bytes(tensor: Tensor) -> int:
    """The bound on the tensor's device."""
    return WORKSPACE_BYTES.get(tensor.device.type, WORKSPACE_BYTES["cuda"])


def row_chunks(N: int, row_bytes: int, bound: int) -> Iterator[slice]:
    """Rows 0 to N, as many at a time as the bound allows, at least one."""
    rows = max(1, bound // max(1, row_bytes))
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))
