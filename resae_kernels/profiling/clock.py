"""Time of a call on one device, and the roofs of that device: copy bandwidth and GEMM rate."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from resae_kernels.profiling.specs import Case

COLD_BYTES = 256 << 20
"""Written before each cold call: more than any last-level cache in use."""
WARM_SECONDS = 0.01
"""A hot call is repeated for this long, at least once, before it is timed."""


class Roofs(NamedTuple):
    """Measured bounds of the machine."""

    copy: float
    """Bytes per second, read and written."""
    product: float
    """FLOPs per second of a large matrix product in the case's dtype."""

    def seconds(self, case: Case) -> float:
        """Lower bound of the case's time."""
        moved, computed = case.work()
        return max(moved / self.copy, computed / self.product)


class Clock:
    """Times calls on one device: CUDA events, or on a CPU the wall clock, and with one thread its
    CPU time, which other load on the machine disturbs less."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = torch.empty(COLD_BYTES // 4, dtype=torch.float32, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], *, cold: bool) -> float:
        """Time of one call; on a CPU with a hot cache the mean of about a millisecond of calls."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        now = time.thread_time if alone else time.perf_counter
        warmed = 0
        if cold:
            self._flush.zero_()
        else:  # in the cache is then what the call leaves there itself, not what another one did
            began = now()
            while warmed == 0 or now() - began < WARM_SECONDS:
                call()
                self.synchronize()
                warmed += 1
        if self.device.type != "cuda":
            calls = max(1, warmed // 10)
            began = now()
            for _ in range(calls):
                call()
            return (now() - began) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Memory allocated beyond the inputs; None where the device does not count it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def measure_roofs(clock: Clock, dtype: str) -> Roofs:
    """Copy bandwidth and product rate: best of a few, as bounds should be."""
    source = torch.empty(COLD_BYTES // 4, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    size = 8192 if clock.device.type == "cuda" else 1024
    a, b = (
        torch.randn(size, size, device=clock.device).to(getattr(torch, dtype)) for _ in range(2)
    )
    out = torch.empty_like(a)
    for _ in range(2):
        target.copy_(source)
        torch.mm(a, b, out=out)
    copies = [clock.seconds(lambda: target.copy_(source), cold=False) for _ in range(10)]
    products = [clock.seconds(lambda: torch.mm(a, b, out=out), cold=False) for _ in range(10)]
    return Roofs(copy=2 * COLD_BYTES / min(copies), product=2 * size**3 / min(products))
