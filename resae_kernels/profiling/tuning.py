"""Choose the tiles of the kernels by measurement on this machine's GPU.

A *tile* is the amount of work that a kernel's program does at a time. Each kernel has a short table
of them (`triton/tiles.py`), all of which compile without spilling registers; which is fastest
depends on the GPU. Every candidate runs the kernel's op at a few representative shapes, in turns,
after its answer has been compared with a float64 one. The fastest are written to the user's cache
directory, from which the ops read them.
"""

import datetime
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels import SparseCode, sparse_decode, topk_encode
from resae_kernels.files import write_atomically
from resae_kernels.profiling.clock import Clock, Timer
from resae_kernels.profiling.specs import Case, Inputs, make_inputs, relative_error
from resae_kernels.triton import screening
from resae_kernels.triton import tiles as kernel_tiles
from resae_kernels.types import Implementation

MARGIN = 0.02
"""The shipped tile stays unless another takes this share less time: repeated runs differ by it."""
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
"""Relative error of a whole answer: a few roundings of its entries."""


# -- what is tuned ---------------------------------------------------------------------------------


class Tunable(NamedTuple):
    """A kernel that can be tuned: the op that launches it, and the cases to time."""

    run: Callable[[Case, Inputs, Implementation], Sequence[Tensor]]
    """Calls the op by "triton" or "torch"; returns the outputs to compare."""
    cases: tuple[Case, ...]
    """Shapes at which this kernel takes most of the op's time."""


def _encode(case: Case, inputs: Inputs, implementation: Implementation) -> Sequence[Tensor]:
    code = topk_encode(
        inputs["x"],
        inputs["weight"],
        inputs["bias"],
        case.k,
        pre_bias=inputs["b_dec"][0],
        implementation=implementation,
    )
    return [code.acts]  # of two scores that differ by a rounding either may be the last one taken


def _screened(case: Case, inputs: Inputs, implementation: Implementation) -> Sequence[Tensor]:
    """`_encode` by screening with an 8-bit copy, which is made at the first call."""
    if implementation != "triton":
        return _encode(case, inputs, implementation)
    copy = inputs.get("copy")
    if copy is None:
        copy = screening.quantise(inputs["weight"], inputs["bias"], "statistical", seed=0)
        inputs["copy"] = copy
    assert copy is not None
    return [copy.encode(inputs["x"], case.k, inputs["b_dec"][0], None, True).acts]


def _decode(case: Case, inputs: Inputs, implementation: Implementation) -> Sequence[Tensor]:  # noqa: ARG001
    acts, indices = inputs["codes"][0]
    W_dec, b_dec = inputs["W_dec"][0], inputs["b_dec"][0]
    decode = partial(sparse_decode, algorithm="gather", implementation=implementation)
    return [decode(acts, indices, W_dec, bias=b_dec)]


def _sddmm(case: Case, inputs: Inputs, implementation: Implementation) -> Sequence[Tensor]:  # noqa: ARG001
    return [
        torch.ops.resae.sddmm(
            inputs["x"],
            inputs["codes"][0].indices,
            inputs["W_dec"][0],
            implementation=implementation,
            algorithm="gather",
        )
    ]


def _scatter_outer(case: Case, inputs: Inputs, implementation: Implementation) -> Sequence[Tensor]:
    acts, indices = inputs["codes"][0]
    return [
        torch.ops.resae.scatter_outer(
            acts, indices, inputs["x"], case.M, implementation=implementation, algorithm="gather"
        )
    ]


_BOTH = ("bfloat16", "float32")


def _cases(
    op: str, few: Sequence[int] = (), many: bool = False, dtypes: Sequence[str] = _BOTH
) -> tuple[Case, ...]:
    """Cases at the widths and usual dictionaries of Pythia-160m, Gemma-2-2B and Pythia-1.4B.

    Args:
        op: op of the cases.
        few: numbers of tokens for each of the three.
        many: also (or only) thousands of tokens.
        dtypes: dtypes of the cases.
    """
    shapes = ((768, 24576, 32), (2304, 16384, 64), (2048, 65536, 64))
    sizes = [(N, *shape) for N in few for shape in shapes]
    if many:
        sizes += [(N, *shape) for N, shape in zip((4096, 4096, 8192), shapes, strict=True)]
    return tuple(Case(op, *size, dtype) for size in sizes for dtype in dtypes)


def _each_dtype(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(case, dtype=dtype) for case in cases for dtype in _BOTH)


# A narrow x leaves little of the op but its maxima and selection, a single group of latents little
# but its residual.
_NARROW = _each_dtype(Case("encode", 4096, 16, 24576, 32), Case("encode", 8192, 16, 65536, 64))
TUNABLES: Mapping[str, Tunable] = {
    "gemm_2_tokens_16bit": Tunable(_encode, _cases("encode", (1, 2), dtypes=("bfloat16",))),
    "gemm_2_tokens_32bit": Tunable(_encode, _cases("encode", (1, 2), dtypes=("float32",))),
    "gemm_16_tokens_16bit": Tunable(_encode, _cases("encode", (4, 16), dtypes=("bfloat16",))),
    "gemm_16_tokens_32bit": Tunable(_encode, _cases("encode", (4, 16), dtypes=("float32",))),
    "gemm_many_tokens_16bit": Tunable(_encode, _cases("encode", many=True, dtypes=("bfloat16",))),
    "screen": Tunable(_screened, _cases("encode", (1, 16))),
    "group_max": Tunable(_encode, _NARROW),
    "select": Tunable(_encode, _NARROW),
    "residual": Tunable(
        _encode,
        _each_dtype(Case("encode", 16384, 2304, 64, 1), Case("encode", 8192, 2048, 64, 1)),
    ),
    "decode": Tunable(_decode, _cases("decode", many=True)),
    "decode_few": Tunable(_decode, _cases("decode", (1, 16))),
    "sddmm": Tunable(_sddmm, _cases("train", many=True)),
    "scatter_outer": Tunable(_scatter_outer, _cases("train", many=True)),
}


# -- measuring -------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """One tile of one kernel at one shape."""

    kernel: str
    case: Case
    tile: Any
    ms: float
    """Median over the rounds, of a CUDA graph's replay where all tiles were captured."""
    relative: float
    """Time relative to the shipped tile: below 1 is faster."""
    eager_ms: float
    """Median of eager calls."""
    not_captured: str | None = None
    """Reason why there is no graph."""


def measure(
    kernel: str,
    case: Case,
    *,
    device: torch.device,
    rounds: int,
    timer: Callable[[Callable[[], Any]], Timer],
) -> list[Timing]:
    """Check and time every candidate tile of a kernel at one shape, the shipped one first.

    Args:
        kernel: a key of `TUNABLES`.
        case: the shape.
        device: where to run; a CPU serves for tests, in Triton's interpreter.
        rounds: calls of each tile, in turns.
        timer: prepares to time a call; a captured graph has the tile that is active then.

    Raises:
        ValueError: a tile's answer is wrong.
    """
    tiles = kernel_tiles.TILES[kernel].candidates(kernel_tiles.device_class(device))
    inputs = make_inputs(case, device)
    run = TUNABLES[kernel].run
    expected = run(case, _widened(inputs), "torch")
    call = partial(run, case, inputs, "triton")
    timers: dict[Any, Timer] = {}
    with kernel_tiles.override_tiles(_shipped(device)):
        for tile in tiles:
            with kernel_tiles.override_tiles({kernel: tile}):
                _check(kernel, case, tile, call(), expected)
                timers[tile] = timer(call)
        eager = {tile: [] for tile in tiles}
        graph = {tile: [] for tile in tiles}
        for _ in range(rounds):
            for tile in tiles:
                with kernel_tiles.override_tiles({kernel: tile}):
                    eager[tile].append(timers[tile].eager())
                    replay = timers[tile].graph
                    if replay:
                        graph[tile].append(replay())
    times = graph if all(graph.values()) else eager
    shipped = statistics.median(times[tiles[0]])
    return [
        Timing(
            kernel,
            case,
            tile,
            1e3 * (median := statistics.median(times[tile])),
            median / shipped,
            1e3 * statistics.median(eager[tile]),
            timers[tile].not_captured,
        )
        for tile in tiles
    ]


def _shipped(device: torch.device) -> dict[str, Any]:
    """The package's own tiles for the device, without those of the user's file."""
    name = kernel_tiles.device_class(device)
    return {kernel: table.of(name).tile for kernel, table in kernel_tiles.TILES.items()}


def _widened(value: Any) -> Any:
    """The same inputs in float64."""
    if isinstance(value, dict):
        return {name: _widened(part) for name, part in value.items()}
    if isinstance(value, SparseCode):
        return SparseCode(*map(_widened, value))
    if isinstance(value, list):
        return [_widened(part) for part in value]
    return value.double() if value.is_floating_point() else value


def _check(
    kernel: str, case: Case, tile: Any, outputs: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    for got, want in zip(outputs, expected, strict=True):
        error = relative_error(got, want)
        if not error < TOLERANCE[case.dtype]:
            raise ValueError(
                f"tune: {kernel} with {tile} is wrong on {case.name}: relative error {error:.2e}, "
                f"expected below {TOLERANCE[case.dtype]:g}; nothing is stored"
            )


def fastest(timings: Sequence[Timing]) -> Any:
    """The tile of least geometric mean over the shapes; the shipped one if it is as good."""
    relatives: dict[Any, list[float]] = {}
    for timing in timings:
        relatives.setdefault(timing.tile, []).append(timing.relative)
    means = {tile: math.exp(statistics.fmean(map(math.log, r))) for tile, r in relatives.items()}
    shipped, best = next(iter(means)), min(means, key=means.__getitem__)
    return best if means[best] < 1 - MARGIN else shipped


# -- the command -----------------------------------------------------------------------------------


def tune(
    device: torch.device,
    *,
    rounds: int = 20,
    timer: Callable[[Callable[[], Any]], Timer] | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Measure every tunable kernel on a GPU and store the fastest tiles for it; returns them.

    Raises:
        ValueError: there is no GPU, the user's file is damaged, or a tile's answer is wrong.
    """
    _require_gpu(device)
    if rounds < 1:
        raise ValueError(f"rounds={rounds}, expected at least 1")
    kernel_tiles.stored_tiles()  # raises if the file is damaged: before the work, not after it
    if timer is None:  # with an empty cache, as inside a model
        timer = partial(Clock(device).timer, cold=True)
    winners = {}
    for kernel, tunable in TUNABLES.items():
        timings = []
        for case in tunable.cases:
            timings += measure(kernel, case, device=device, rounds=rounds, timer=timer)
        winners[kernel] = fastest(timings)
        say(table(timings, winners[kernel]))
    store(device, winners)
    return winners


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            "there is nothing to tune without a GPU: tiles belong to the kernels that run on one; "
            "run this on a machine with CUDA"
        )


def store(device: torch.device, tiles: Mapping[str, Any]) -> None:
    """Write the tiles of a device to the user's file; those of other devices stay."""
    stored = kernel_tiles.stored_tiles()
    stored[kernel_tiles.device_name(device)] = {
        "date": datetime.date.today().isoformat(),
        "torch": version("torch"),
        "triton": version("triton"),
        "tiles": {kernel: tile._asdict() for kernel, tile in tiles.items()},
    }
    text = json.dumps(stored, indent=2) + "\n"
    write_atomically(kernel_tiles.tiles_file(), lambda temporary: temporary.write_text(text))
    kernel_tiles.reload_tiles()


def table(timings: Sequence[Timing], winner: Any) -> str:
    """One line per shape and tile of one kernel: milliseconds (of the graph, and eager), time
    relative to the shipped tile. The winner has a star."""
    lines = [timings[0].kernel]
    for t in timings:
        shape = t.case.name.partition(" ")[2]
        star = "*" if t.tile == winner else " "
        ms = f"{t.ms:>9.4f} ms{t.eager_ms:>9.4f} eager"
        reason = f"  {t.not_captured}" if t.not_captured else ""
        lines.append(f"{star} {shape:<36}{_fields(t.tile):<58}{ms}{t.relative:>8.3f}{reason}")
    return "\n".join(lines)


def active_tiles(device: torch.device) -> str:
    """One line per kernel: its tile on this device, the source of the tile, and its measurement."""
    name, file = kernel_tiles.device_name(device), kernel_tiles.tiles_file()
    lines = [f"tiles on {name}; tuned ones are in {file}"]
    for kernel in kernel_tiles.TILES:
        chosen, source = kernel_tiles.active_tile(kernel, device)
        measured = chosen.measured or "not measured"
        lines.append(f"{kernel:<23}{_fields(chosen.tile):<58}{source:<9}{measured}")
    return "\n".join(lines)


def _fields(tile: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in tile._asdict().items())
