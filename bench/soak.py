"""Half an hour of replaced generations on the embedded model: nothing may be left behind.

    python bench/soak.py --out DIR [--minutes 30]

Thousands of generations of mixed length, batch, padding, mode, loop, cache and sampling, with
exceptions thrown in the middle of forward passes. Every hundred of them: the model's logits are
those of the beginning, bit for bit; its modules are the very objects of the beginning, none has a
hook; Python holds no more tensors than after the first hundred. At the end: the memory of the
process is within 5 % of what it was after a tenth of the time. Writes `soak.md`; a failure is an
error.
"""

import argparse
import gc
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ops import commit
from torch import nn

from resae import AffineOnly, HookedLM, replacement
from resae.data.activations import capture_tokens
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.models.hooked import EMBEDDED
from resae.models.identity import ModelIdentity
from resae.stack.fit import Moments, fit_predictor
from resae.stack.stack import ReSAE, new_stack
from resae.storage import write_atomically

LAYERS = (1, 3, 5)
GROWTH = 0.05


class Thrown(Exception):
    """Exception thrown by the soak itself."""


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def stacks(lm: HookedLM) -> list[ReSAE]:
    points = lm.hook_points(LAYERS)
    rows, _ = train_and_held_out(EMBEDDED, lm, context_tokens=128, held_out_rows=1)
    moments = Moments(len(points), lm.d_model)
    moments.add(capture_tokens(lm, next(iter(rows.batches(16))), points))
    return [
        new_stack(
            [point.name for point in points],
            fit_predictor(kind, moments),
            d_in=lm.d_model,
            d_sae=512,
            k=(8,) * len(points),
            model=ModelIdentity.of(lm),
        ).eval()
        for kind in ("none", "previous", "all_previous")
    ]


def generation(lm: HookedLM, made: list[ReSAE], draw: random.Random, seen: Counter) -> None:
    """One call, of a kind drawn at random; exceptions of our own end here."""
    stack = draw.choice(made)
    rows, length = draw.choice((1, 1, 2, 4)), draw.randint(1, 40)
    ids = torch.randint(10, lm.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    if rows > 1 and length > 2:
        mask[0, : draw.randint(0, length - 2)] = 0
    mode = draw.choice(("online", "online", "online", "teacher_forced", "error_added"))
    options: dict[str, Any] = {
        "mode": mode,
        "loop": draw.choice(("open", "closed")),
        "layers": draw.choice((None, [1], [3, 5])),
        "replace_special": draw.random() < 0.3,
        "keep_error": mode == "online" and draw.random() < 0.2,
    }
    throw = draw.random() < 0.15

    def fail(_: torch.Tensor) -> None:
        raise Thrown

    hooks = {lm.hook_point(draw.choice((0, 2, 3, 6))): fail} if throw else {}
    what = AffineOnly(stack) if stack.chained and draw.random() < 0.1 else stack
    try:
        with replacement(lm, what, **options), lm.hooked(hooks):
            if mode != "online":
                lm.logits(ids, attention_mask=mask)
            else:
                lm.model.generate(  # type: ignore[operator]
                    ids,
                    attention_mask=mask,
                    max_new_tokens=draw.randint(1, 16),
                    do_sample=draw.random() < 0.3,
                    num_beams=draw.choice((1, 1, 1, 3)),
                    cache_implementation=draw.choice((None, None, "static")),
                    pad_token_id=0,
                )
    except Thrown:
        seen["thrown"] += 1
    seen[mode] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lm = HookedLM.from_pretrained(EMBEDDED)
    made = stacks(lm)
    draw, seen = random.Random(options.seed), Counter()
    ids = torch.randint(10, lm.config.vocab_size, (2, 24))
    clean, modules = lm.logits(ids), dict(lm.model.named_modules())

    def require_unchanged() -> None:
        now = dict(lm.model.named_modules())
        if now.keys() != modules.keys() or any(now[name] is not modules[name] for name in now):
            raise AssertionError("soak: a module of the model was not put back")
        if any(_hooks(module) for module in now.values()):
            raise AssertionError("soak: a hook was left on the model")
        if not torch.equal(lm.logits(ids), clean):
            raise AssertionError("soak: the model's logits have changed")

    began, done = time.perf_counter(), 0
    seconds = 60 * options.minutes
    tensors = start_mib = None
    while (spent := time.perf_counter() - began) < seconds or start_mib is None:
        for _ in range(100):
            generation(lm, made, draw, seen)
        done += 100
        require_unchanged()
        alive = tensors_alive()
        if tensors is None:
            tensors = alive
        if alive > tensors:
            raise AssertionError(f"soak: {alive} tensors alive, {tensors} after the first hundred")
        if start_mib is None and spent >= seconds / 10:
            start_mib = resident_mib()
        print(f"{spent / 60:5.1f} min  {done} generations  {resident_mib():.0f} MiB", flush=True)
    end_mib = resident_mib()
    lines = [f"- {key}: {value}" for key, value in environment().items()]
    lines += [
        f"- commit: {commit()}",
        f"- {done} generations in {spent / 60:.1f} minutes, {seen['thrown']} of them ended by an "
        f"exception; " + ", ".join(f"{m} {n}" for m, n in sorted(seen.items()) if m != "thrown"),
        f"- resident memory after a tenth of the time {start_mib:.0f} MiB, at the end "
        f"{end_mib:.0f} MiB",
        f"- tensors alive after the first hundred {tensors}, at the end {tensors_alive()}",
        "- the model's logits, modules and hooks: unchanged",
    ]
    text = "# Soak\n\n" + "\n".join(lines) + "\n"
    write_atomically(options.out / "soak.md", lambda temporary: temporary.write_text(text))
    if end_mib > (1 + GROWTH) * start_mib:
        raise AssertionError(f"soak: memory grew from {start_mib:.0f} to {end_mib:.0f} MiB")
    return 0


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


if __name__ == "__main__":
    sys.exit(main())
