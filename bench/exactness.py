"""Does the screened encoder find the TopK? Counted over 10⁸ (token, latent) pairs of a real model.

    python bench/exactness.py --out DIR

Codes of `ScreenedEncoder` against float64 scores of every latent, on activations of the embedded
model and autoencoders trained on it. Per row, the best score that was not selected is compared with
the worst that was. float32 scores are uncertain by some 10⁻⁷ of ‖x‖‖w‖ + |b|, so that nearer ones
may change places: such rows are counted as ties, any other difference as a miss. Writes
`exactness.md`; a miss is an error.
"""

import argparse
import sys
from pathlib import Path

import torch
from ops import trained_on_embedded
from torch import Tensor

from resae.environment import environment
from resae.storage import write_atomically
from resae_kernels import ScreenedEncoder
from resae_kernels import screened as screened_encode

TIE = 1e-6
"""Tolerance relative to ‖x‖‖w‖ + |b|: a few times the rounding error of a float32 sum of some
hundred products."""
CHUNK = 512


def compare(x: Tensor, weight: Tensor, bias: Tensor, selected: Tensor) -> tuple[int, int]:
    """Rows whose selected latents `[n, k]` differ from the TopK of float64 scores: by a tie, by a
    miss."""
    wide, W, b = x.double(), weight.double(), bias.double()
    scores = wide @ W.T + b
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, selected, True)
    worst = scores.masked_fill(~taken, torch.inf).amin(1)
    best = scores.masked_fill(taken, -torch.inf).amax(1)
    size = wide.norm(dim=1) * W.norm(dim=1).max() + b.abs().max()
    differs, misses = best > worst, best - worst > TIE * size
    return int((differs & ~misses).sum()), int(misses.sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    parser.add_argument("--pairs", type=float, default=1e8, help="(token, latent) pairs a line")
    parser.add_argument("--dry", action="store_true", help="little training, few pairs")
    options = parser.parse_args()
    reason = screened_encode.unavailable()
    if reason is not None:
        parser.error(f"nothing is screened here: {reason}")
    pairs = 1e6 if options.dry else options.pairs
    # Screen also where, by the rule, it would not pay.
    for rules in screened_encode.RULES.values():
        for dtype, rule in rules.items():
            rules[dtype] = rule._replace(entries=0, width=0, certain_rows=CHUNK)
    lines = [f"- {key}: {value}" for key, value in environment().items()]
    lines += [
        "",
        "| activations | margin | k | pairs | rows screened | exact path | candidates a row | ties "
        "| misses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    missed = 0
    for D, M, k in ((128, 4096, 32), (1024, 8192, 32)):
        N = -(-int(pairs) // M)
        sae, unseen = trained_on_embedded(
            D, M, k, train_tokens=4_096 if options.dry else 250_000, held_out_rows=N // 100 + 1
        )
        x = unseen[:N] - sae.b_dec
        if len(x) < N:
            raise ValueError(f"exactness: {len(x)} held-out tokens, expected {N}")
        weight, bias = sae.encoder.weight, sae.encoder.bias
        for margin in screened_encode.MARGINS:
            encoder = ScreenedEncoder(weight, bias, margin=margin)
            totals = torch.zeros(5, dtype=torch.int64)
            for rows in x.split(CHUNK):
                found = encoder.encode_with_info(rows, k)
                if not bool((found.code.acts > 0).all()):
                    raise ValueError("exactness: a row has fewer than k positive scores; lower k")
                differing = compare(rows, weight, bias, found.code.indices)
                totals += torch.tensor(
                    [found.rows_screened, found.rows_exact, found.candidates, *differing]
                )
            screened, exact, candidates, ties, misses = totals.tolist()
            missed += misses
            lines.append(
                f"| stream, D = {D}, M = {M} | {margin} | {k} | {len(x) * M:,} | {screened:,} | "
                f"{exact:,} | {candidates / max(1, screened):.0f} | {ties} | {misses} |"
            )
            print(lines[-1], flush=True)
    text = "# Exactness of the screened encoder\n\n" + "\n".join(lines) + "\n"
    write_atomically(options.out / "exactness.md", lambda temporary: temporary.write_text(text))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
