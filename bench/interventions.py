"""Effects of latent edits on later layers against the maps' predictions, and their cost.

    resae demo --k 8 --out DEMO
    python bench/interventions.py DEMO --out DIR

On held-out rows of the embedded corpus, the most frequent latents of the first selected layer are
ablated one by one. Per later layer: the cosine between the change that arrives there and what the
transported directions predict, its mean over tokens and then over latents, and the smallest of any
latent. Then greedy generation of one row: plain, replaced, with every layer's codes read, with two
latents of every layer edited; medians, over interleaved rounds, of the time over that of the same
round's replacement. Writes `interventions.md`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from ops import commit
from torch import Tensor

from resae import HookedLM, ReSAE, StrongestLatents, replacement
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.evaluation.effects import edit_effects
from resae.models.hooked import EMBEDDED
from resae.storage import write_atomically

METHODS = ("resae", "identity")
ROWS, ROW_TOKENS, LATENTS = 16, 64, 20
PROMPT, NEW = 16, 65


def frequent(lm: HookedLM, stack: ReSAE, ids: Tensor, n: int) -> list[int]:
    """The n latents of the first selected layer that are active on the most tokens."""
    codes = StrongestLatents(stack.sae(0).config.k)
    with replacement(lm, stack, on_codes=codes):
        lm.logits(ids)
    acts, indices = codes.codes[stack.hook_points[0]]
    return indices[acts > 0].bincount().topk(n).indices.tolist()


def cosines(lm: HookedLM, stack: ReSAE, ids: Tensor, n: int, keep_error: bool) -> list[list[Any]]:
    """Per later layer: its name, the mean of the latents' cosines, the smallest of them."""
    found: dict[str, list[float]] = {}
    for latent in frequent(lm, stack, ids, n):
        edit = {"layer": stack.hook_points[0], "action": "ablate", "latents": latent}
        for row in edit_effects(lm, stack, ids, {"edits": [edit], "keep_error": keep_error}):
            found.setdefault(row.hook_point, []).append(row.cosine)
    return [[name, statistics.mean(values), min(values)] for name, values in found.items()]


def costs(lm: HookedLM, stack: ReSAE, ids: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds per generated token, and as a multiple of replacement's: medians over rounds."""
    edits = [{"layer": name, "action": "ablate", "latents": [3, 4]} for name in stack.hook_points]
    contexts: dict[str, Callable[[], AbstractContextManager]] = {
        "plain": nullcontext,
        "replaced": lambda: replacement(lm, stack),
        "codes read": lambda: replacement(lm, stack, on_codes=StrongestLatents(3)),
        "two latents a layer edited": lambda: replacement(lm, stack, interventions=edits),
    }
    spent: dict[str, list[float]] = {name: [] for name in contexts}
    for round_ in range(-1, rounds):  # the first one warms up
        for name, context in contexts.items():
            with context(), torch.no_grad():
                began = time.perf_counter()
                lm.model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                if round_ >= 0:
                    spent[name].append((time.perf_counter() - began) / NEW)
    return {
        name: (
            statistics.median(times),
            statistics.median(a / b for a, b in zip(times, spent["replaced"], strict=True)),
        )
        for name, times in spent.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, metavar="DEMO", help="where `resae demo` wrote, k = 8")
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    parser.add_argument("--rounds", type=int, default=25, help="of the timing")
    parser.add_argument("--dry", action="store_true", help="two latents, two rounds")
    options = parser.parse_args()
    n, rounds = (2, 2) if options.dry else (LATENTS, options.rounds)
    lm = HookedLM.from_pretrained(EMBEDDED)
    _, held_out = train_and_held_out(
        EMBEDDED, lm, context_tokens=ROW_TOKENS, held_out_rows=ROWS, seed=0
    )
    ids = next(iter(held_out.batches(ROWS)))
    facts = environment() | {"commit": commit(), "latents ablated": n, "rounds": rounds}
    lines = ["# Interventions", "", *(f"- {key}: {value}" for key, value in facts.items())]
    lines += ["", f"{ROWS} rows of {ROW_TOKENS} tokens", ""]
    lines += ["| stack | error | layer | cosine, mean | smallest |", "|---|---|---|---|---|"]
    stacks = {name: ReSAE.load(options.demo / "stacks" / f"{name}_k8") for name in METHODS}
    for name, stack in stacks.items():
        for error in ("left out", "kept"):
            for layer, mean, least in cosines(lm, stack, ids, n, error == "kept"):
                lines.append(f"| {name} | {error} | {layer} | {mean:.3f} | {least:.3f} |")
    lines += ["", f"One row, {PROMPT} prompt tokens, {NEW} written", ""]
    lines += ["| | ms per token | ÷ replaced |", "|---|---|---|"]
    for name, (seconds, ratio) in costs(lm, stacks["resae"], ids[:1, :PROMPT], rounds).items():
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {ratio:.3f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_atomically(options.out / "interventions.md", lambda to: to.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
