"""Model, not measurement: expected time of each stage of an op on a GPU that is not there.

Each stage is bytes over a memory rate, FLOPs over a GEMM rate, or a fixed time. The first rows
measured on a real GPU are judged by it: measured / model far from 1 names the op to look at, or an
assumption that does not hold.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resae_kernels.profiling.clock import Roofs
from resae_kernels.profiling.measuring import device_ms
from resae_kernels.profiling.specs import Case
from resae_kernels.triton.encode_few import FEW_TOKENS


class Machine(NamedTuple):
    """Rates of a GPU in the model. All are assumptions: rates that large kernels usually reach."""

    copy: float
    """Bytes per second from and to memory."""
    cache: float
    """Bytes per second read from the L2 cache."""
    gemm: Mapping[str, float]
    """FLOPs per second, by dtype."""
    multiprocessors: int


def _rates(narrow: float, wide: float) -> dict[str, float]:
    return {"bfloat16": narrow, "float16": narrow, "float32": wide}


MACHINES: dict[str, Machine] = {
    "h200": Machine(4.3e12, 5.5e12, _rates(790e12, 60e12), 132),
    "h100": Machine(3.0e12, 5.5e12, _rates(790e12, 60e12), 132),
    "a100": Machine(1.8e12, 4.0e12, _rates(250e12, 18e12), 108),
}
WEIGHT_READ = 0.92
"""Share of the copy rate at which the GEMM of few tokens reads the weight."""
EDGE_US = 1.3
"""One launch inside a CUDA graph."""
SELECT_US = 1.0
"""Selection of one row on one multiprocessor."""
SORT_US = 50.0
"""Sort of the codes by act, and gather of the indices, for 8192 tokens of 64 latents."""
RADIX_US = 70.0
"""Sort of 524,288 entries by latent."""
ORDER_LAUNCHES = 16
"""Launches around the sort by latent: keys, order, bounds and pieces of the sums, counted on the
host."""
STEP_US = 6.5
"""Selection and decode of an online step in one launch."""


class Stage(NamedTuple):
    """One part of an op."""

    name: str
    us: float


def stages(case: Case, machine: Machine) -> list[Stage]:
    """The stages of our op on the machine, launches included."""
    return _STAGES[case.op](case, machine)


def floor_us(case: Case, machine: Machine) -> float:
    """Lower bound of any implementation: least bytes and FLOPs at the machine's rates."""
    return 1e6 * Roofs(machine.copy, machine.gemm[case.dtype]).seconds(case)


def _weight_bytes(case: Case) -> int:
    return case.M * case.D * case.itemsize


def _encode(case: Case, machine: Machine) -> list[Stage]:
    N, rows = case.N, -(-case.N // machine.multiprocessors)
    if N <= FEW_TOKENS:
        read = 1e6 * _weight_bytes(case) / (WEIGHT_READ * machine.copy)
        return [
            Stage("scores and group maxima", read + EDGE_US),
            Stage("selection", SELECT_US * rows + EDGE_US),
            Stage("sort of the code", 3 * EDGE_US),
        ]
    scores = N * case.M * case.itemsize
    return [
        Stage("residual", 1e6 * 2 * N * case.D * case.itemsize / machine.copy + EDGE_US),
        Stage("GEMM", 1e6 * 2.0 * N * case.D * case.M / machine.gemm[case.dtype] + EDGE_US),
        Stage("group maxima", 1e6 * scores / machine.copy + EDGE_US),
        Stage("selection", SELECT_US * rows + EDGE_US),
        Stage("sort of the code", SORT_US * N * case.k / (8192 * 64) + 3 * EDGE_US),
    ]


def _threshold(case: Case, machine: Machine) -> list[Stage]:
    """An encode whose selection reads its row of scores itself, one multiprocessor a row."""
    scores, *rest = [part for part in _encode(case, machine) if part.name != "group maxima"]
    row = case.M * case.itemsize * machine.multiprocessors / machine.copy
    rows = -(-case.N // machine.multiprocessors)
    return [scores, Stage("comparison with the thresholds", 1e6 * rows * row), *rest]


def _gather(case: Case, machine: Machine, name: str) -> Stage:
    gathered = case.N * case.k * case.D * case.itemsize
    return Stage(name, 1e6 * gathered / machine.cache + EDGE_US)


def _decode(case: Case, machine: Machine) -> list[Stage]:
    return [_gather(case, machine, "gather of W_dec")]


def _forward(case: Case, machine: Machine) -> list[Stage]:
    return _encode(case, machine) + _decode(case, machine)


def _step(case: Case, machine: Machine) -> list[Stage]:
    return [_encode(case, machine)[0], Stage("selection and decode", STEP_US)]


def _train(case: Case, machine: Machine) -> list[Stage]:
    write = Stage("weight gradients written", 1e6 * 2 * _weight_bytes(case) / machine.copy)
    return [
        *_forward(case, machine),
        _gather(case, machine, "gradient of the acts"),
        Stage(
            "sort by latent",
            RADIX_US * case.N * case.k / (8192 * 64) + ORDER_LAUNCHES * EDGE_US,
        ),
        _gather(case, machine, "gradient of W_dec"),
        _gather(case, machine, "gradient of the encoder"),
        write,
    ]


def _train_with_adam(case: Case, machine: Machine) -> list[Stage]:
    return [*_train(case, machine), Stage("Adam", 1e6 * 14 * _weight_bytes(case) / machine.copy)]


def _chain(case: Case, machine: Machine) -> list[Stage]:
    (gather,) = _decode(case, machine)
    maps = max(
        case.D**2 * case.itemsize / machine.copy,
        2.0 * case.N * case.D**2 / machine.gemm[case.dtype],
    )
    layers = case.L
    return [
        Stage(f"{layers} gathers of W_dec", layers * gather.us),
        Stage(f"{layers - 1} maps", (layers - 1) * (1e6 * maps + EDGE_US)),
    ]


_STAGES: Mapping[str, Callable[[Case, Machine], list[Stage]]] = {
    "encode": _encode,
    "decode": _decode,
    "forward": _forward,
    "step": _step,
    "train": _train,
    "train+adam": _train_with_adam,
    "chain": _chain,
    "threshold": _threshold,
}


# -- tables ----------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that were measured: an `ops.csv` of bench/ops.py or a `rows.jsonl` of bench/gpu.py.

    Raises:
        ValueError: the file holds neither.
    """
    numbers = ("ms_p50", "graph_ms_p50")
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
        else:
            lines = path.read_text().splitlines()
            rows = [row for line in lines for row in json.loads(line)["rows"]]
        rows = [row for row in rows if "op" in row]
        for row in rows:
            row.update({name: int(row[name]) for name in ("N", "D", "M", "k", "L")})
            row.update(
                {n: float(row[n]) if row.get(n) not in (None, "") else None for n in numbers}
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no measured rows ({error}); expected ops.csv or rows.jsonl of bench/"
        ) from None
    return rows


def measured_us(case: Case, rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Measured time of our provider at this case with a hot cache; None: not measured."""
    fields = ("op", "N", "D", "M", "k", "dtype", "L")
    for row in rows:
        ours = row["provider"].startswith("resae") and row["cache"] == "hot"
        if ours and Case(**{name: row[name] for name in fields}) == case:
            return 1e3 * device_ms(row)
    return None


def model_table(cases: Sequence[Case], name: str, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Markdown: floor and stages of each case, and measured / model where rows are given."""
    machine = MACHINES[name]
    lines = [
        f"MODEL of one {name}, not a measurement: copy {machine.copy / 1e9:.0f} GB/s, L2 "
        f"{machine.cache / 1e9:.0f} GB/s, bf16 GEMM {machine.gemm['bfloat16'] / 1e12:.0f} TFLOP/s. "
        "Floors count each row of W_dec once, stages every gathered row, from the L2 cache.",
        "",
        "| case | floor µs | model µs | stages µs | measured µs | measured / model |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        parts = stages(case, machine)
        total = sum(part.us for part in parts)
        found = measured_us(case, rows)
        listed = ", ".join(f"{part.name} {part.us:.1f}" for part in parts)
        measured = "– | –" if found is None else f"{found:.1f} | {found / total:.2f}"
        lines.append(
            f"| {case.name} | {floor_us(case, machine):.1f} | {total:.1f} | {listed} | {measured} |"
        )
    return "\n".join(lines)
