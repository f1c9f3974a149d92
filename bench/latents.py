"""Rate and memory of the pass over text that indexes what latents fire on.

    OMP_NUM_THREADS=1 python bench/latents.py --out bench/results

On the embedded model with a stack of three layers whose autoencoders are untrained, as time hardly
depends on what they know: model and codes alone, and with the index. Tokens per second of processor
time, which other processes on the machine change little. Writes `latents.md`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ops import commit

from resae import AffinePredictor, HookedLM
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.latents.collect import BATCH_ROWS, clean_codes, collect_latents
from resae.latents.index import IndexSizes, index_bytes
from resae.models.hooked import EMBEDDED
from resae.stack.stack import ReSAE, new_stack
from resae.storage import write_atomically

LAYERS = (1, 3, 5)
K = 32
T = 128
ALONE_TOKENS = 65_536
"""Tokens that the model and the codes are timed on without the index."""


def stack_of(lm: HookedLM, M: int) -> ReSAE:
    D = lm.d_model
    maps = [torch.eye(D) for _ in LAYERS[1:]]
    predictor = AffinePredictor("previous", maps, [torch.zeros(D) for _ in maps])
    names = [point.name for point in lm.hook_points(LAYERS)]
    return new_stack(names, predictor, d_in=D, d_sae=M, k=[K] * len(LAYERS)).eval()


def seconds(work: Callable[[], object]) -> float:
    """Processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, nargs="+", default=[512, 4096, 16_384])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = HookedLM.from_pretrained(EMBEDDED)
    rows, _ = train_and_held_out(EMBEDDED, lm, context_tokens=T, held_out_rows=64)
    text = torch.stack([row for row, _ in zip(rows, range(options.tokens // T), strict=False)])
    batches, few = text.split(BATCH_ROWS), text[: ALONE_TOKENS // T].split(BATCH_ROWS)
    lines = [
        f"# Indexing {text.numel():,} tokens of the embedded corpus, one core",
        "",
        f"Blocks {', '.join(map(str, LAYERS))}, k = {K}, rows of {T} tokens; 8 strongest and 4 "
        f"random passages of 32 tokens per latent. Commit {commit()}, torch "
        f"{environment()['torch']}, {environment()['processor']}. `python bench/latents.py`.",
        "",
        "| latents per layer | model and codes, tokens/s | with the index, tokens/s "
        "| s | index, MB |",
        "|---|---|---|---|---|",
    ]
    for M in options.latents:
        stack = stack_of(lm, M)
        clean_codes(lm, stack, batches[0])  # the first call prepares
        alone = seconds(lambda stack=stack: [clean_codes(lm, stack, b) for b in few])
        whole = seconds(lambda stack=stack: collect_latents(lm, stack, batches))
        megabytes = index_bytes(stack, IndexSizes(), text.numel()) / 1e6
        lines.append(
            f"| {M:,} | {sum(b.numel() for b in few) / alone:,.0f} | {text.numel() / whole:,.0f} "
            f"| {whole:,.0f} | {megabytes:,.0f} |"
        )
        sys.stdout.write(lines[-1] + "\n")
    page = "\n".join(lines) + "\n"
    write_atomically(options.out / "latents.md", lambda temporary: temporary.write_text(page))


if __name__ == "__main__":
    main()
