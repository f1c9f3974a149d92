"""Host memory of `resae.evaluate` against the length of the text, and what its sums take.

    OMP_NUM_THREADS=1 python bench/evaluation_memory.py --out bench/results/cpu

Evaluates an untrained ReSAE in both loops on the embedded model and random tokens, each length in a
process of its own. Prints the peak of the resident memory per length, and the bytes of all sums,
which are those of the file that an interrupted evaluation goes on from. Writes
`evaluation_memory.md`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from generate import SETTINGS, Setting, language_model, stack_of
from ops import commit

from resae import Method, evaluate
from resae.evaluation.sums import MOST_DOCUMENTS
from resae.storage import write_atomically

CONTEXT = 64
BATCH_ROWS = 8


class Measured(Exception):
    """Raised before the last batch is done, to leave the file of the sums there."""


def measure(tokens: int, latents: int, file: Path) -> None:
    """Evaluate all but the end of a text of this many tokens, print the peak in MiB."""
    lm = language_model("tiny", torch.device("cpu"), torch.float32)
    setting = Setting("tiny", SETTINGS["tiny"].layers, latents, 8)
    methods = [Method("resae", stack_of(lm, setting, chained=True), setting.k)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        10, int(lm.config.vocab_size), (tokens // CONTEXT, CONTEXT), generator=generator
    )
    batches = list(ids.split(BATCH_ROWS))

    def stop(done: int) -> None:
        if done == len(batches):
            raise Measured

    with suppress(Measured):
        evaluate(lm, methods, batches, on_batch=stop, checkpoint=file, checkpoint_seconds=0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 49152])
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        measure(arguments.tokens[0], arguments.latents, arguments.one)
        return 0
    rows = []
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sums"
            command = [sys.executable, __file__, "--out", folder, "--one", str(file)]
            command += ["--tokens", str(tokens), "--latents", str(arguments.latents)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append((tokens, float(done.stdout), file.stat().st_size / 2**20))
            print(*rows[-1], flush=True)
    more = rows[-1][1] - rows[0][1]
    lines = [
        "# Host memory of an evaluation",
        "",
        f"Embedded model, 3 layers of {arguments.latents:,} latents, k = 8, rows of {CONTEXT} "
        f"tokens; a ReSAE in two loops. Commit {commit()}, torch {torch.__version__}, CPU.",
        "",
        "| tokens | peak resident MiB | all sums MiB |",
        "|---:|---:|---:|",
        *(f"| {tokens:,} | {peak:,.0f} | {sums:.2f} |" for tokens, peak, sums in rows),
        "",
        f"The longest text takes {more:+,.0f} MiB beside the shortest one. Sums are per "
        f"document and grow up to {MOST_DOCUMENTS} of them.",
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "evaluation_memory.md"
    write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
