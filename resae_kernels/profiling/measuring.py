"""Measure the ops against alternatives and against the roofs of the machine.

    case | provider | eager ms | graph ms | rounds | × GEMM | × peer | ours ÷ it | GB/s | TFLOP/s |
    % of roof

A *case* is an op at one shape and dtype. Every provider gets the same inputs and must give the
reference's answer before it is timed. Providers are timed in turns, one call each per round, so
that a slow phase of the machine affects all of them; where an op scores every latent, the encoder
GEMM alone is timed too. "× GEMM" is the time relative to it, "× peer" relative to the fastest
peer, "ours ÷ it" the time of our first provider relative to the row's: medians of the rounds'
ratios. Roofs are measured in the same process: copy bandwidth and the rate of a large GEMM; the
roof of a case is the longer of the times of its least bytes and its least FLOPs. "Cold" empties the
last-level cache before each call, "hot" repeats the call for 10 ms before it is timed.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resae_kernels.profiling.clock import Clock, Roofs, Timer
from resae_kernels.profiling.specs import (
    GEMM,
    Case,
    Inputs,
    Peer,
    check,
    make_inputs,
    providers,
)

CASE_SECONDS, LEAST_ROUNDS = 30.0, 5
"""A case that has taken this long gets no more than this number of rounds."""

Times = Mapping[tuple[str, bool], Sequence[float]]
"""Seconds by provider and whether the cache is cold."""


def profile(
    case: Case,
    *,
    device: torch.device,
    roofs: Roofs,
    clock: Clock,
    rounds: int = 20,
    peers: Mapping[str, Peer] | None = None,
    only: Sequence[str] | None = None,
    hot_only: bool = False,
    inputs: Inputs | None = None,
) -> list[dict[str, Any]]:
    """Check and time every provider of a case; one flat row per provider and cache state.

    Args:
        rounds: calls per provider and cache state; fewer, but `LEAST_ROUNDS`, once the case has
            taken `CASE_SECONDS`.
        only: names of providers besides "resae"; None: all.
        hot_only: no calls with a cold cache.
        inputs: in place of those of `make_inputs`.

    Raises:
        ValueError: a provider's answer is wrong.
    """
    inputs = inputs or make_inputs(case, device)
    calls = providers(case, inputs, peers or {})
    if only is not None:
        calls = {name: call for name, call in calls.items() if name in ("resae", *only)}
    for name, call in calls.items():
        if name != GEMM:
            check(case, inputs, name, call())
    peaks = {name: clock.peak_bytes(call) for name, call in calls.items()}
    states = (False,) if hot_only else (False, True)
    timers = {
        (n, cold): clock.timer(call, cold=cold) for n, call in calls.items() for cold in states
    }
    eager, graph = _seconds(timers, rounds)
    rows = []
    ours = next(iter(calls))
    for (name, cold), timer in timers.items():
        key, rivals = (name, cold), [(n, cold) for n in peers or () if n in calls]
        times = graph.get(key, eager[key])
        seconds = statistics.median(times)
        moved, computed = case.work()
        peak = peaks[name]
        rows.append(
            {
                **asdict(case),
                "provider": name,
                "cache": "cold" if cold else "hot",
                **_milliseconds("ms", eager[key]),
                **_milliseconds("graph_ms", graph.get(key)),
                "not_captured": timer.not_captured,
                "rounds": len(times),
                "x_gemm": ratio(key, [(GEMM, cold)], graph, eager),
                "x_peer": ratio(key, rivals, graph, eager),
                "ours_x": ratio((ours, cold), [key], graph, eager),
                "gb_per_s": moved / seconds / 1e9,
                "tflop_per_s": computed / seconds / 1e12,
                "percent_of_roof": 100 * roofs.seconds(case) / seconds,
                "peak_mib": None if peak is None else peak / 2**20,
            }
        )
    return rows


def _seconds(timers: Mapping[tuple[str, bool], Timer], rounds: int) -> tuple[Times, Times]:
    """Seconds of every call, eager and in a CUDA graph: one call of each in every round, so that a
    slow phase of the machine affects all of them."""
    eager = {key: [] for key in timers}
    graph = {key: [] for key, timer in timers.items() if timer.graph}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > CASE_SECONDS:
            break
        for key, timer in timers.items():
            eager[key].append(timer.eager())
            if timer.graph:
                graph[key].append(timer.graph())
    return eager, graph


def ratio(
    key: tuple[str, bool], others: Sequence[tuple[str, bool]], graph: Times, eager: Times
) -> float | None:
    """Time of a provider over that of the fastest of others, the median of the rounds' ratios:
    replayed where all were captured, otherwise eager; None where there is no other."""
    others = [other for other in others if other in eager]
    if not others:
        return None
    times = graph if all(one in graph for one in (key, *others)) else eager
    fastest = min((times[one] for one in others), key=statistics.median)
    return statistics.median(ours / its for ours, its in zip(times[key], fastest, strict=True))


def device_ms(row: Mapping[str, Any]) -> float:
    """Median of a row: of the graph's replay where the call was captured, otherwise eager."""
    return row["ms_p50"] if row["graph_ms_p50"] is None else row["graph_ms_p50"]


def _milliseconds(name: str, values: Sequence[float] | None) -> dict[str, float | None]:
    p20, p50, p80 = (None, None, None) if values is None else (1e3 * v for v in _quantiles(values))
    return {f"{name}_p50": p50, f"{name}_p20": p20, f"{name}_p80": p80}


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def trace(case: Case, *, device: torch.device, path: Path) -> list[dict[str, Any]]:
    """Run our provider under torch's profiler, write a Chrome trace, and list what ran.

    Returns:
        Per kernel (on a GPU: with registers per thread, shared bytes and estimated occupancy, as
        the driver reports them) or CPU op: name, calls and microseconds, slowest first.
    """
    call = next(iter(providers(case, make_inputs(case, device), {}).values()))
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    wanted = "kernel" if device.type == "cuda" else "cpu_op"
    ran: dict[str, dict[str, Any]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") != wanted:
            continue
        facts = event.get("args", {})
        row = ran.setdefault(
            event["name"],
            {
                "name": event["name"],
                "calls": 0,
                "us": 0.0,
                "registers": facts.get("registers per thread"),
                "shared_bytes": facts.get("shared memory"),
                "occupancy_percent": facts.get("est. achieved occupancy %"),
            },
        )
        row["calls"] += 1
        row["us"] += event.get("dur", 0.0)
    return sorted(ran.values(), key=lambda row: -row["us"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per row."""
    lines = [
        "| case | provider | cache | eager ms p50 (p20–p80) | graph ms p50 (p20–p80) | rounds | "
        "× GEMM | × peer | ours ÷ it | GB/s | TFLOP/s | % of roof | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = Case(**{name: row[name] for name in ("op", "N", "D", "M", "k", "dtype", "L")})
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        gemm, peer, ours = (
            "–" if row[ratio] is None else f"{row[ratio]:.2f}"
            for ratio in ("x_gemm", "x_peer", "ours_x")
        )
        lines.append(
            f"| {case.name} | {row['provider']} | {row['cache']} | {_span(row, 'ms')} | "
            f"{_span(row, 'graph_ms') or row['not_captured'] or '–'} | {row['rounds']} | "
            f"{gemm} | {peer} | {ours} | {row['gb_per_s']:.1f} | {row['tflop_per_s']:.3f} | "
            f"{row['percent_of_roof']:.0f} | {peak} |"
        )
    return "\n".join(lines)


def _span(row: Mapping[str, Any], name: str) -> str | None:
    p50, p20, p80 = (row[f"{name}_{part}"] for part in ("p50", "p20", "p80"))
    return None if p50 is None else f"{p50:.4g} ({p20:.4g}–{p80:.4g})"
