"""Everything that needs a GPU, in parts of a few minutes, the most valuable first.

    bench/gpu.sh OUT                            (all parts)
    bench/gpu.sh OUT --part 1 --budget 480      (one part, at most 480 seconds of it)
    bench/gpu.sh OUT --dry                      (tiny shapes, also on a CPU: does it run?)

    1  encode and decode against the encoder GEMM and the copy roof
    2  online step, chain and generation
    3  training step
    4  tests of the kernels
    5  single questions, tiles, peers

Each task appends its rows to OUT/rows.jsonl when it ends; an error is a row, too. A later call with
the same OUT skips what was measured at this commit on this device, takes up what was cut off, and
tries what failed last. OUT/gpu.md is the page of all rows: times, targets, what to try next.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the packages of this checkout

import torch  # noqa: E402

from resae.environment import environment  # noqa: E402
from resae_kernels.files import write_atomically  # noqa: E402
from resae_kernels.profiling import Case, Clock, Roofs, measure_roofs, profile, table  # noqa: E402
from resae_kernels.profiling.measuring import device_ms  # noqa: E402
from resae_kernels.profiling.specs import GEMM  # noqa: E402

Row = dict[str, Any]
DENSE = "dense PyTorch"
PROVIDERS = (GEMM, "GEMM + torch.topk", "dense GEMM", DENSE, "resae sequential")
PROVIDERS += ("resae transported",)
"""Providers besides "resae". The reference is omitted: it takes minutes at these shapes."""
MODELS = ("pythia-1.4b 64k", "gemma-2-9b", "pythia-1.4b", "gemma-2-9b 128k")
"""Settings of bench/generate.py."""
WITH_PEERS = ("encode N=8192", "encode N=1 ", "decode N=8192", "forward N=1 ", "train N=8192")
"""Cases of bench/ops.py, by the beginning of their names."""
TEST_FILES = ("topk_encode", "encode_few", "triton_encode", "sparse_decode", "affine_chain")
TEST_FILES += ("online_step", "threshold_encode", "triton_screening", "gemm_specialised", "tuning")


# -- the plan --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One step of the plan, which is done, or failed, as a whole."""

    name: str
    run: Callable[["Session", float], list[Row]]
    """Given the session and the seconds left; returns rows."""


class Part(NamedTuple):
    title: str
    tasks: Sequence[Task]
    together: bool = False
    """Run all tasks at the same time: nothing is timed."""


def measured(case: Case) -> Task:
    def run(session: "Session", left: float) -> list[Row]:
        with time_limit(left):
            return session.profile(case)

    return Task(case.name, run)


def command(name: str, *arguments: str, table_file: str | None = None, dry: bool = True) -> Task:
    """A program as a task of its own, its output in OUT/<name>.log.

    Args:
        name: of the task, and of the folder under OUT that takes the place of `{out}`.
        arguments: of Python.
        table_file: in that folder, whose lines are the rows.
        dry: whether the program knows `--dry`; without it a dry run leaves it out.
    """
    return Task(name, partial(_run_command, name, arguments, table_file, dry))


def _run_command(
    name: str,
    arguments: Sequence[str],
    table_file: str | None,
    dry: bool,
    session: "Session",
    left: float,
) -> list[Row]:
    if session.dry and not dry:
        return []
    folder = session.out / name
    folder.mkdir(parents=True, exist_ok=True)
    full = [sys.executable, *(a.format(out=folder) for a in arguments)]
    full += ["--dry"] if session.dry else []
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "bench"))
    # Compiled kernels are kept for later calls.
    given = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(session.out / "triton-cache")}
    with (session.out / f"{name}.log").open("w") as log:
        done = subprocess.run(
            full,
            cwd=ROOT,
            env=os.environ | given,
            stdout=log,
            stderr=log,
            timeout=left,
            check=False,
        )
    if done.returncode != 0:
        lines = (session.out / f"{name}.log").read_text().strip().splitlines()
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else 'no output'}")
    if table_file is None:
        return []
    with (folder / table_file).open(newline="") as file:
        return list(csv.DictReader(file))


def shapes(op: str, k: int = 64) -> Iterator[Case]:
    """Training or prefill and generation at each dictionary, then the numbers of tokens between."""
    dictionaries = ((2048, 65536), (3584, 131072), (2048, 16384), (768, 24576))
    for tokens in ((8192, 1), (16, 256)):
        for D, M in dictionaries:
            for N in tokens:
                yield Case(op, N, D, M, k, "bfloat16")


def plan() -> list[Part]:
    """All parts, the most valuable first."""
    wide = (2048, 65536, 64, "bfloat16")
    tests = [
        command(
            f"tests-{name}",
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"),
            f"tests/test_{name}.py",
            dry=False,
        )
        for name in TEST_FILES
    ]
    encode, decode = list(shapes("encode")), list(shapes("decode"))
    return [
        Part(
            "Encode and decode",
            [measured(c) for pair in zip(encode, decode, strict=True) for c in pair],
        ),
        Part(
            "Online step, chain and generation",
            [
                *(measured(Case("step", N, *wide)) for N in (1, 16)),
                *(measured(Case("forward", N, *wide)) for N in (1, 16, 8192)),
                measured(Case("step", 1, 3584, 131072, 64, "bfloat16")),
                *(measured(Case("chain", N, 2048, 16384, 64, "bfloat16", 4)) for N in (1, 8192)),
                *(
                    command(
                        f"generate-{model.replace(' ', '-')}",
                        *("bench/generate.py", "--out", "{out}", "--setting", model),
                        table_file="generate.csv",
                        dry=False,
                    )
                    for model in MODELS
                ),
            ],
        ),
        Part(
            "Training step",
            [
                *(measured(Case(op, 8192, *wide)) for op in ("train", "train+adam")),
                measured(Case("train", 8192, 2048, 16384, 64, "bfloat16")),
                command("train", "bench/train.py", "--out", "{out}", "--rounds", "1"),
            ],
        ),
        Part("Tests of the kernels", tests, together=True),
        Part(
            "Questions, tiles, peers",
            [
                command("questions", "bench/questions.py", "--out", "{out}"),
                command("tune", "-m", "resae", "tune", dry=False),
                *(
                    command(
                        f"peers-{case.strip().replace(' ', '-')}",
                        *("bench/ops.py", "--out", "{out}", "--only", case),
                        table_file="ops.csv",
                        dry=False,
                    )
                    for case in WITH_PEERS
                ),
            ],
        ),
    ]


# -- targets ---------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A time to be reached: `factor` times that of something measured in the same rows."""

    op: str
    N: int
    D: int
    M: int
    factor: float
    of: str
    """Provider; or "roof", the bound by copy bandwidth and GEMM rate; or "µs"."""

    def ms(self, rows: Sequence[Row]) -> float | None:
        """Milliseconds of the target; None if its reference was not measured."""
        if self.of == "µs":
            return self.factor / 1e3
        if self.of == "roof":
            ours = [row for row in rows if row["provider"].startswith("resae")]
            times = [device_ms(row) * row["percent_of_roof"] / 100 for row in ours]
        else:
            times = [device_ms(row) for row in rows if row["provider"] == self.of]
        return self.factor * times[0] if times else None

    @property
    def text(self) -> str:
        return f"≤ {self.factor:.3g} µs" if self.of == "µs" else f"≤ {self.factor:.3g} × {self.of}"


TARGETS = [
    Target("encode", 8192, 2048, 65536, 1.15, GEMM),
    Target("encode", 8192, 3584, 131072, 1.15, GEMM),
    Target("encode", 8192, 2048, 16384, 1.20, GEMM),
    Target("encode", 1, 2048, 65536, 1.20, "roof"),
    Target("encode", 1, 2048, 16384, 1.60, "roof"),
    Target("decode", 8192, 2048, 65536, 507, "µs"),  # 1.3 × the gather from L2 of the cost model
    Target("decode", 1, 2048, 65536, 4, "µs"),
    Target("train", 8192, 2048, 65536, 1 / 3, DENSE),
    Target("train+adam", 8192, 2048, 65536, 1 / 3, DENSE),
]
GENERATION = (
    "Generation, tokens per second replaced / plain: ≥ 0.9 at Gemma-2-9B, M = 16,384, 4 layers; "
    "≥ 0.8 at Pythia-1.4B, M = 65,536."
)
NEXT = {
    ("encode", False): "`resae tune`: tiles `gemm_2_tokens_*` (in registers or by tensor cores) "
    "and `gemm_16_tokens_*` (residual in a launch of its own or not, resident programs); then "
    "8-bit screening: its times are among the questions, its tile is `screen`",
    ("encode", True): "`resae tune`: `gemm_many_tokens_16bit` (the library's GEMM, or our own that "
    "leaves the group maxima), `select` (which can find the maxima itself), `group_max`",
    ("decode", False): "tile `decode_few`: narrower slices of D, all k rows in one tile",
    (
        "decode",
        True,
    ): "tile `decode` and GATHER_REGISTERS (loads in flight); the dense algorithm where "
    "M/k is small (DENSE_RATIO)",
    ("train", True): "one launch for the gradients of W_dec, too; tile `scatter_outer` (8/512/1); "
    "tile `sddmm`; PIECE",
    ("train+adam", True): "as the step without Adam; then a fused Adam over touched rows",
}
"""Choices to try where a target is missed, by (op, whether tokens are many)."""


# -- running ---------------------------------------------------------------------------------------


class Session:
    """One call: device, results folder, and the tasks already done there."""

    def __init__(self, out: Path, *, dry: bool):
        self.out, self.dry = out, dry
        self.device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
        self.facts = environment()
        self.key = {"commit": source(self.facts["commit"]), "device": self.facts["gpu"] or "cpu"}
        self.key["dry"] = dry
        self.clock = cache(lambda: Clock(self.device))
        self.roofs: Callable[[str], Roofs] = cache(lambda dtype: measure_roofs(self.clock(), dtype))

    @property
    def rows_file(self) -> Path:
        return self.out / "rows.jsonl"

    def entries(self) -> dict[str, Row]:
        """Last entry of each task at this commit on this device. A line that a killed call left
        half-written is no entry."""
        found: dict[str, Row] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.rows_file.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry["key"] == self.key:
                        found[entry["task"]] = entry
        return found

    def profile(self, case: Case) -> list[Row]:
        if self.dry:
            case = replace(case, N=min(case.N, 4), D=64, M=256, k=8, dtype="float32")
        roofs = self.roofs(case.dtype)
        rows = profile(
            case,
            device=self.device,
            roofs=roofs,
            clock=self.clock(),
            rounds=2 if self.dry else 20,
            only=PROVIDERS,
        )
        facts = {"roof_copy_gb_per_s": roofs.copy / 1e9, "roof_tflop_per_s": roofs.gemm / 1e12}
        return [row | facts for row in rows]

    def run(self, part: int, task: Task, left: float) -> Row:
        """Run a task and append its entry, whatever comes."""
        began = time.monotonic()
        entry: Row = {"key": self.key, "part": part, "task": task.name, "status": "done"}
        try:
            entry["rows"] = task.run(self, left)
        except (TimeoutError, subprocess.TimeoutExpired):
            entry |= {"status": "cut off", "error": f"time limit after {left:.0f} s", "rows": []}
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            entry |= {"status": "failed", "error": f"{type(error).__name__}: {text}", "rows": []}
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["date"] = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}"
        with self.rows_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return entry


def source(commit: str | None) -> str:
    """The commit; of files that were changed since, or without one, their hash."""
    if commit and not commit.endswith("-dirty"):
        return commit
    files = [p for name in ("resae_kernels", "bench") for p in sorted((ROOT / name).rglob("*.py"))]
    return "files-" + hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after some seconds."""

    def stop(_signal, _frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pending(tasks: Iterable[Task], entries: dict[str, Row]) -> list[Task]:
    """Tasks that are not done: those never tried or cut off first, those that failed last."""
    left = [t for t in tasks if entries.get(t.name, {}).get("status") != "done"]
    return sorted(left, key=lambda t: entries.get(t.name, {}).get("status") == "failed")


def run_part(session: Session, number: int, part: Part, deadline: float) -> None:
    """Run what is left of a part until the deadline, and write the page after each task."""
    tasks = pending(part.tasks, session.entries())

    def left() -> float:
        return deadline - time.monotonic()

    def finish(entry: Row) -> None:
        print(f"[{number}] {entry['task']}: {entry['status']} {entry.get('error', '')}", flush=True)
        text = page(session)
        write_atomically(session.out / "gpu.md", lambda temporary: temporary.write_text(text))

    if part.together:
        with ThreadPoolExecutor() as pool:
            for entry in pool.map(lambda task: session.run(number, task, max(1.0, left())), tasks):
                finish(entry)
        return
    for task in tasks:
        if left() <= 0:
            print(f"[{number}] time is up; call again for the rest", flush=True)
            return
        finish(session.run(number, task, left()))


# -- the page --------------------------------------------------------------------------------------


def page(session: Session) -> str:
    """Markdown: the targets, the table with roofs, what failed and what is missing."""
    entries = session.entries()
    facts = [f"- {key}: {value}" for key, value in (session.facts | session.key).items()]
    lines = ["# GPU", "", *facts, ""]
    if session.dry:
        lines += ["**A dry run: tiny shapes under the names of the real ones, no results.**", ""]
    lines += ["## Targets", "", *verdicts(entries), "", GENERATION]
    for number, part in enumerate(plan(), start=1):
        mine = [entries[task.name] for task in part.tasks if task.name in entries]
        lines += ["", f"## {number}. {part.title}", ""]
        rows = [row for entry in mine for row in entry["rows"] if "roof_tflop_per_s" in row]
        if rows:
            lines += [
                f"Roofs: copy {rows[0]['roof_copy_gb_per_s']:.0f} GB/s, GEMM "
                f"{rows[0]['roof_tflop_per_s']:.1f} TFLOP/s.",
                "",
                table(rows),
                "",
            ]
        for entry in mine:
            if not any(row in rows for row in entry["rows"]):
                error = f": {entry['error']}" if "error" in entry else ""
                lines.append(f"- {entry['task']}: {entry['status']}{error}")
        missing = [task.name for task in part.tasks if task.name not in entries]
        if missing:
            lines.append(f"- not yet run: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


def verdicts(entries: dict[str, Row]) -> list[str]:
    lines = ["| case | target | target ms | measured ms | measured / target | try next |"]
    lines.append("|---|---|---|---|---|---|")
    for target in TARGETS:
        op, N, D, M, *_ = target
        name = Case(op, N, D, M, 64, "bfloat16").name
        rows = [row for row in entries.get(name, {}).get("rows", []) if row["cache"] == "hot"]
        ours = next((row for row in rows if row["provider"].startswith("resae")), None)
        wanted = target.ms(rows)
        if ours is None or wanted is None:
            lines.append(f"| {name} | {target.text} | – | not measured | – | – |")
            continue
        ratio = device_ms(ours) / wanted
        advice = NEXT[op, N > 16] if ratio > 1 else "reached"
        lines.append(
            f"| {name} | {target.text} | {wanted:.4g} | {device_ms(ours):.4g} | {ratio:.2f} | "
            f"{advice} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the results")
    parser.add_argument("--part", type=int, help="one part alone; default: all, in order")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for each part")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: does it run?")
    options = parser.parse_args()
    parts = plan()
    if options.part is not None and not 1 <= options.part <= len(parts):
        parser.error(f"--part {options.part}, expected 1 to {len(parts)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no GPU is found; run this on a machine with CUDA, or with --dry")
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.out.resolve(), dry=options.dry)
    for number, part in enumerate(parts, start=1):
        if options.part in (None, number):
            run_part(session, number, part, time.monotonic() + options.budget)
    failed = [name for name, entry in session.entries().items() if entry["status"] == "failed"]
    print(f"{session.out / 'gpu.md'}; failed: {', '.join(failed) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
