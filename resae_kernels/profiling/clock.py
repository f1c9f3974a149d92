"""Time of a call on one device, and the roofs of that device: copy bandwidth and GEMM rate."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from resae_kernels.profiling.specs import Case

COLD_BYTES = 256 << 20
"""Written before each cold call: more than any last-level cache in use."""
WARM_SECONDS = 0.01
"""A hot call is repeated for this long, at least once, before it is timed."""

GRAPH_SECONDS, MOST_CALLS = 2e-3, 50
"""Length of a hot graph, in calls of about this total time: its launch takes some microseconds."""


class Roofs(NamedTuple):
    """Measured bounds of the machine."""

    copy: float
    """Bytes per second, read and written."""
    gemm: float
    """FLOPs per second of a large GEMM in the case's dtype."""

    def seconds(self, case: Case) -> float:
        """Lower bound of the case's time."""
        moved, computed = case.work()
        return max(moved / self.copy, computed / self.gemm)


class Gpu:
    """A CUDA device as the clock uses it: events, and capture of a call in a CUDA graph."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def elapsed(self, call: Callable[[], Any]) -> float:
        """Seconds between an event before the call and one after it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[], Any], calls: int) -> Callable[[], Any]:
        """The replay of a CUDA graph of this many calls.

        Raises:
            RuntimeError: something in the call cannot be captured.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compile and allocate before the capture
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay


class Timer(NamedTuple):
    """The ways to time one call; each function measures once and returns seconds per call."""

    eager: Callable[[], float]
    graph: Callable[[], float] | None = None
    """Replay of a CUDA graph, free of Python; None on a CPU, or with the reason `not_captured`."""
    not_captured: str | None = None


class Clock:
    """Times calls on one device: CUDA events around the call and around the replay of a CUDA graph;
    on a CPU the wall clock, and with one thread its CPU time, which other load on the machine
    disturbs less."""

    def __init__(self, device: torch.device, gpu: Gpu | None = None):
        self.device = device
        self.gpu = Gpu(device) if gpu is None and device.type == "cuda" else gpu
        self._flush = torch.empty(COLD_BYTES // 4, dtype=torch.float32, device=device)

    def synchronize(self) -> None:
        if self.gpu is not None:
            self.gpu.synchronize()

    def timer(self, call: Callable[[], Any], *, cold: bool) -> Timer:
        """Prepare to time a call again and again: on a GPU it is captured here."""
        eager = partial(self.seconds, call, cold=cold)
        if self.gpu is None:
            return Timer(eager)
        call()
        self.synchronize()
        calls = 1 if cold else self._calls_per_graph(self.gpu.elapsed(call))
        try:
            replay = self.gpu.capture(call, calls)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            return Timer(
                eager, not_captured=f"{type(error).__name__}: {reason}"[:200].replace("|", "/")
            )
        return Timer(eager, partial(self._replayed, self.gpu, replay, calls, cold))

    @staticmethod
    def _calls_per_graph(seconds: float) -> int:
        return max(1, min(MOST_CALLS, round(GRAPH_SECONDS / max(seconds, 1e-9))))

    def _replayed(self, gpu: Gpu, replay: Callable[[], Any], calls: int, cold: bool) -> float:
        if cold:  # while the cache is emptied the replay is launched
            self._flush.zero_()
        else:
            replay()
        return gpu.elapsed(replay) / calls

    def seconds(self, call: Callable[[], Any], *, cold: bool) -> float:
        """Time of one eager call; on a CPU with a hot cache the mean of about a millisecond of
        calls."""
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
        if self.gpu is not None:
            return self.gpu.elapsed(call)
        calls = max(1, warmed // 10)
        began = now()
        for _ in range(calls):
            call()
        return (now() - began) / calls

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
    """Measure copy bandwidth and GEMM rate: the best of a few runs, as they serve as bounds."""
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
    copy, gemm = (
        clock.timer(call, cold=False)
        for call in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=out))
    )
    fastest = [min((t.graph or t.eager)() for _ in range(10)) for t in (copy, gemm)]
    return Roofs(copy=2 * COLD_BYTES / fastest[0], gemm=2 * size**3 / fastest[1])
