"""Start-up: what importing and asking for help cost, as whole processes.

    python bench/startup.py --out DIR

Each case is a process of its own, without a cache of its own; cases take turns, and the table shows
the median CPU time (user and system), which other load on the machine disturbs less than wall time.
The bounds: `import resae_kernels` at most 1.1 times `import torch`, `import resae` and all that it
exports 1.3 times, help and a mistyped option 0.5 s. Writes `startup.md`.
"""

import argparse
import sys
from pathlib import Path

from whole import Usage, median, run

ROOT = Path(__file__).parent.parent
TORCH = "import torch"
CASES = {
    TORCH: ["-c", "import torch"],
    "import resae_kernels": ["-c", "import resae_kernels"],
    "import resae": ["-c", "import resae"],
    "from resae import *": ["-c", "from resae import *"],
    "resae --help": ["-m", "resae", "--help"],
    "resae train --help": ["-m", "resae", "train", "--help"],
    "resae train --layrs 1": ["-m", "resae", "train", "--layrs", "1"],
    "resae trian": ["-m", "resae", "trian"],
}
RATIO = {"import resae_kernels": 1.1, "import resae": 1.3, "from resae import *": 1.3}
"""Bounds relative to importing torch."""
SECONDS = 0.5
"""Bound of the others, CPU time."""


def measure(rounds: int) -> dict[str, Usage]:
    """The medians; a first round, which may still write bytecode, is not counted."""
    usages: dict[str, list[Usage]] = {name: [] for name in CASES}
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(rounds + 1):
        for name, arguments in CASES.items():
            command = [sys.executable, *arguments]
            usage = run(command, folder=ROOT, variables=variables, exit_codes=(0, 2))
            usages[name].append(usage)
    return {name: median(several[1:]) for name, several in usages.items()}


def table(usages: dict[str, Usage]) -> str:
    lines = [
        "| process | CPU s | ÷ import torch | bound | wall s | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, used in usages.items():
        ratio = used.cpu / usages[TORCH].cpu
        bound = f"{RATIO[name]:.1f} ×" if name in RATIO else f"{SECONDS} s"
        bound = "–" if name == TORCH else bound
        lines.append(
            f"| `{name}` | {used.cpu:.2f} | {ratio:.2f} | {bound} | {used.wall:.2f} "
            f"| {used.peak_mib:.0f} |"
        )
    return "\n".join(lines)


def above_bound(usages: dict[str, Usage]) -> list[str]:
    """The cases that take longer than they may."""
    torch = usages[TORCH].cpu
    limits = {name: RATIO[name] * torch if name in RATIO else SECONDS for name in usages}
    return [n for n, used in usages.items() if n != TORCH and used.cpu > limits[n]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--rounds", type=int, default=9)
    o = parser.parse_args()
    usages = measure(o.rounds)

    # Not before: the memory of this process would count as that of its children.
    from ops import commit

    from resae.environment import environment
    from resae.storage import write_atomically

    facts = environment() | {"commit": commit(), "rounds": o.rounds}
    heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    page = f"# Start-up\n\n{heading}\n\n{table(usages)}\n"
    write_atomically(o.out / "startup.md", lambda temporary: temporary.write_text(page))
    print(table(usages))
    late = above_bound(usages)
    if late:
        print(f"above the bound: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
