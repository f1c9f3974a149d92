"""Time and memory of `resae.evaluate` on a real model, against whole passes and whole logits.

    python bench/real_models.py fetch gemma-3-270m
    OMP_NUM_THREADS=1 python bench/evaluation.py --out bench/results/real

Against it: every way of running the model is a whole pass, whose logits `[B, T, V]` are compared
with the clean ones by `cross_entropy` and `kl_divergence` of `resae.evaluation.metrics`. Both
measure the same methods on the same rows in turns: a ReSAE in open and closed loop and its maps
alone, each teacher-forced, online and error-added, and zero and mean ablation. Autoencoders are
untrained and maps the identity, as time does not depend on what they know. Then the losses of both
are compared with float64 ones, of the logits of whole passes over one row. Writes `evaluation.md`.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from generate import REAL_SETTINGS, SETTINGS, Setting, language_model, stack_of
from ops import commit
from real_models import SOURCES
from torch import Tensor

from resae import AffineOnly, HookedLM, Method, evaluate, replacement
from resae.data.activations import MODEL_ROWS
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.evaluation.comparison import forward_passes
from resae.evaluation.metrics import cross_entropy, kl_divergence
from resae.models.hooked import EMBEDDED
from resae.models.points import HookPoint
from resae.storage import write_atomically

MODES = ("teacher_forced", "online", "error_added")


def methods_of(lm: HookedLM, setting: Setting) -> list[Method]:
    stack = stack_of(lm, setting, chained=True)
    return [Method("resae", stack, setting.k), Method("affine_only", AffineOnly(stack), None)]


def ways(
    lm: HookedLM, methods: Sequence[Method], means: dict[HookPoint, Tensor], ids: Tensor
) -> Iterator[tuple[tuple[str, str | None, str], AbstractContextManager]]:
    """Method, loop and mode of every replaced way of running the model, and its context; then the
    ablations."""
    streams = lm.capture(ids, list(means))
    clean = list(streams.values())
    for method in methods:
        for loop in method.loops:
            for mode in MODES:
                options = {"mode": mode, "loop": loop or "open"}
                options |= {} if mode == "online" else {"clean": clean}
                key = (method.name, None if loop is None else str(loop), mode)
                yield key, replacement(lm, method.stack, **options)
    keep = lm.is_special(ids).unsqueeze(-1)
    for name in ("zero", "mean"):
        put = {
            point: torch.where(keep, streams[point], mean * (name == "mean"))
            for point, mean in means.items()
        }
        yield (name, None, "ablation"), lm.replacing(put)


def mean_activations(lm: HookedLM, points: list[HookPoint], ids: Tensor) -> dict[HookPoint, Tensor]:
    streams = lm.capture(ids, points)
    return {point: stream[~lm.is_special(ids)].mean(0) for point, stream in streams.items()}


def whole_passes(
    lm: HookedLM,
    methods: Sequence[Method],
    ids: Tensor,
    losses: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> dict[tuple[str, str | None, str], tuple[float, float]]:
    """Cross-entropy and KL per way of running the model, by `losses(clean, replaced, ids)`."""
    points = lm.hook_points(methods[0].stack.hook_points)
    means = mean_activations(lm, points, ids)
    clean = lm.logits(ids)
    counted = ~lm.is_special(ids)[:, :-1]
    rows = {}
    for key, context in ways(lm, methods, means, ids):
        with context, torch.no_grad():
            ce, kl = losses(clean, lm.logits(ids), ids)
        rows[key] = (float(ce[counted].double().mean()), float(kl[counted].double().mean()))
    return rows


def in_float32(clean: Tensor, replaced: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(replaced, ids), kl_divergence(clean, replaced)


def in_float64(clean: Tensor, replaced: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (clean, replaced))
    ce = -q.gather(2, ids[:, 1:, None]).squeeze(2)
    return ce, (p.exp() * (p - q)).sum(-1)


def of_evaluate(lm: HookedLM, methods: Sequence[Method], ids: Tensor):
    rows = evaluate(lm, methods, list(ids.split(MODEL_ROWS))).replacement
    return {(row.method, row.loop, row.mode): (row.ce, row.kl) for row in rows}


def errors(lm: HookedLM, methods: Sequence[Method], ids: Tensor) -> str:
    """Largest differences to float64, as a table."""
    exact = whole_passes(lm, methods, ids, in_float64)
    lines = ["| | CE, nats | KL, nats |", "|---|---|---|"]
    for name, rows in (
        ("`evaluate`", of_evaluate(lm, methods, ids)),
        ("whole logits, float32", whole_passes(lm, methods, ids, in_float32)),
    ):
        keys = [key for key in rows if key in exact]
        largest = [max(abs(rows[k][i] - exact[k][i]) for k in keys) for i in (0, 1)]
        lines.append(f"| {name} | {largest[0]:.1e} | {largest[1]:.1e} |")
    return "\n".join(lines)


def measured(lm: HookedLM, methods: Sequence[Method], ids: Tensor, rounds: int) -> str:
    """Seconds of both, in turns, and peaks of memory, as a table."""
    runs = {
        "`evaluate`": lambda: of_evaluate(lm, methods, ids),
        "whole passes": lambda: [
            whole_passes(lm, methods, part, in_float32) for part in ids.split(MODEL_ROWS)
        ],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    peaks = {}
    before = peak_mib()
    for _ in range(rounds):
        for name, run in runs.items():  # the one that takes less memory first
            began, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - began, time.process_time() - cpu))
            peaks.setdefault(name, peak_mib() - before)
            print(f"{name}: {times[name][-1][1]:.1f} CPU-seconds", flush=True)
    lines = ["| | seconds | CPU-seconds | memory above the model's, MiB |", "|---|---|---|---|"]
    for name, taken in times.items():
        wall, cpu = (statistics.median(t[i] for t in taken) for i in (0, 1))
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {peaks[name]:.0f} |")
    ratios = [old[1] / new[1] for new, old in zip(*times.values(), strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return "\n".join(lines) + f"\n\nCPU time of whole passes ÷ `evaluate`, per round: {listed}."


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--setting", choices=REAL_SETTINGS, default="gemma-3-270m")
    parser.add_argument("--rows", type=int, default=16, help="of 128 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    lm = language_model(setting.model, torch.device("cpu"), torch.float32)
    methods = methods_of(lm, setting)
    _, held_out = train_and_held_out(EMBEDDED, lm, context_tokens=128, held_out_rows=options.rows)
    ids = torch.stack(list(held_out))
    table = measured(lm, methods, ids, options.rounds)
    facts = environment() | {
        "commit": commit(),
        "model": f"{options.setting}, layers {setting.layers}, M = {setting.M}, k = {setting.k}",
        "licence": SOURCES[setting.model].licence,
        "rows": f"{len(ids)} of {ids.shape[1]} tokens, {forward_passes(methods)} passes over each",
        "rounds": options.rounds,
    }
    heading = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    text = (
        f"# Evaluation at a real vocabulary\n\n{heading}\n\n{table}\n\n"
        f"Largest difference to float64 of any way of running the model, on one row:\n\n"
        f"{errors(lm, methods, ids[:1])}\n"
    )
    write_atomically(options.out / "evaluation.md", lambda temporary: temporary.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
