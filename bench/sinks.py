"""Sink tokens of a real model, and what leaving them alone changes.

    python bench/real_models.py fetch smollm2-135m
    OMP_NUM_THREADS=1 python bench/sinks.py smollm2-135m --work DIR --out bench/results/real

First the norms of the residual stream against the median of their layer, on held-out rows of the
embedded corpus: how many tokens are how long. Then raw autoencoders and a ReSAE are trained with
the rule of `resae.models.sinks` and without it (`sink_factor`), everything else alike, and measured
on the same rows. Last the first position: the rows lose their BOS, and the token that comes first
then is replaced (its position is given as 1) or left alone. Writes `sinks.NAME.md`.

Activations and runs are kept in DIR: a second call measures what is there.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from ops import commit
from real_models import CACHE, SOURCES, find
from torch import Tensor

from resae import HookedLM, Method, ReSAE, evaluate, replacement
from resae.console import Console
from resae.data.activations import MODEL_ROWS, capture_tokens
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.evaluation.metrics import cross_entropy
from resae.evaluation.predictors import r2_per_layer
from resae.models.hooked import EMBEDDED
from resae.models.points import HookPoint
from resae.models.sinks import SINK_FACTOR, SinkRule
from resae.storage import write_atomically
from resae.training import RunConfig, run

LAYERS = {"smollm2-135m": ("7", "15", "23"), "gemma-3-270m": ("5", "9", "13")}
FACTORS = {"before": 0.0, "after": SINK_FACTOR}
"""State of the rule → `sink_factor`."""
METHODS = {"raw": "none", "ReSAE": "previous"}
"""Name → predictor."""


def trained(path: Path, predictor: str, factor: float, options: argparse.Namespace) -> Path:
    """Folder of a run, which is made unless it is there."""
    out = options.work / f"{options.name}-{predictor}-{factor:g}"
    if not (out / "resae.json").exists():
        config = RunConfig(
            model=str(path),
            data=EMBEDDED,
            layers=tuple(options.layers.split(",")),
            k=options.k,
            expansion=8,
            predictor=predictor,
            train_tokens=options.tokens,
            sink_factor=factor,
            cache=str(options.work / f"cache-{options.name}"),
            cache_dtype="bfloat16",
            log_steps=100,
            out=str(out),
        )
        run(config, console=Console())
    return out


def norms(lm: HookedLM, points: Sequence[HookPoint], batches: Sequence[Tensor]) -> Iterator[str]:
    """Table of the norms against the median of their layer."""
    pieces = [capture_tokens(lm, ids, points) for ids in batches]
    xs = [torch.cat(layer) for layer in zip(*pieces, strict=True)]
    rule = SinkRule.measured(xs)
    yield "| hook point | median | longest / median | above 3 × | 5 × | 10 × | energy of those |"
    yield "|---|---|---|---|---|---|---|"
    for layer, (point, x) in enumerate(zip(points, xs, strict=True)):
        ratio = x.norm(dim=-1) / rule.median_norms[layer]
        above = [int((ratio > factor).sum()) for factor in (3, 5, SINK_FACTOR)]
        energy = x.double().square().sum(-1)
        share = float(energy[rule.at(layer, x)].sum() / energy.sum())
        yield (
            f"| {point.name} | {rule.median_norms[layer]:.4g} | {float(ratio.max()):.1f} | "
            f"{' | '.join(map(str, above))} | {share:.1%} |"
        )
    yield f"\n{len(xs[0]):,} tokens that are not special, {int(rule.anywhere(xs).sum())} are sinks."


def first_positions(lm: HookedLM, stack: ReSAE, batches: Sequence[Tensor]) -> dict[str, float]:
    """Online Δ CE on rows without BOS, per way of treating the token that is then the first."""
    sums = dict.fromkeys(("clean", "left alone", "replaced"), 0.0)
    tokens = 0
    for ids in batches:
        rows = ids[:, 1:]
        keep = ~lm.is_special(rows)[:, :-1]
        positions = torch.arange(1, rows.shape[1] + 1).expand(rows.shape)  # none is the first
        sums["clean"] += float(cross_entropy(lm.logits(rows), rows)[keep].sum())
        with replacement(lm, stack):
            sums["left alone"] += float(cross_entropy(lm.logits(rows), rows)[keep].sum())
            shifted = lm.logits(rows, position_ids=positions)
        sums["replaced"] += float(cross_entropy(shifted, rows)[keep].sum())
        tokens += int(keep.sum())
    return {way: (nats - sums["clean"]) / tokens for way, nats in sums.items() if way != "clean"}


def comparison(
    lm: HookedLM,
    points: Sequence[HookPoint],
    folders: dict[tuple[str, str], Path],
    batches: Sequence[Tensor],
) -> Iterator[str]:
    """Tables of what the rule changes."""
    stacks = {key: ReSAE.load(folder) for key, folder in folders.items()}
    rule = stacks["raw", "after"].sinks
    yield "\n| maps | R² without sinks | R² with sinks |\n|---|---|---|"
    for state in FACTORS:
        predictor = stacks["ReSAE", state].predictor
        table = []
        for sinks in (rule, None):
            unseen = [capture_tokens(lm, ids, points, sinks=sinks) for ids in batches]
            table.append(", ".join(f"{r2:.4f}" for r2 in r2_per_layer(predictor, unseen)))
        yield f"| {state} | {' | '.join(table)} |"
    k = stacks["raw", "after"].sae(0).config.k
    methods = [Method(f"{name}, {state}", stack, k) for (name, state), stack in stacks.items()]
    found = evaluate(lm, methods, batches)
    yield (
        "\n| method, rule | Δ CE online | teacher-forced | FVU without sinks | FVU with sinks | "
        "never fired |\n|---|---|---|---|---|---|"
    )
    for method in methods:
        loop = None if method.loops == (None,) else "closed"
        lost = {
            row.mode: row.delta_ce
            for row in found.replacement
            if row.method == method.name and row.loop == loop
        }
        layers = [
            row for row in found.reconstruction if row.method == method.name and row.loop == loop
        ]
        columns = (
            [row.fvu_stream for row in layers],
            [row.fvu_with_sinks or 0.0 for row in layers],
        )
        fvu = " | ".join(", ".join(f"{value:.4f}" for value in column) for column in columns)
        dead = ", ".join(f"{row.dead_fraction:.1%}" for row in layers)
        yield (
            f"| {method.name} | {lost['online']:.4f} | {lost['teacher_forced']:.4f} | {fvu} | "
            f"{dead} |"
        )
    row = found.reconstruction[0]
    yield (
        f"\n{found.replacement[0].tokens:,} positions, CE of the unchanged model "
        f"{found.replacement[0].ce_clean:.4f}, {row.sinks} sinks."
    )
    yield "\n| rows without BOS, rule after | first token left alone | replaced |\n|---|---|---|"
    for name in METHODS:
        lost = first_positions(lm, stacks[name, "after"], batches)
        yield f"| {name}, Δ CE online | {lost['left alone']:.4f} | {lost['replaced']:.4f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--models", type=Path, default=CACHE, help="folder of the models")
    parser.add_argument("--layers", help="blocks; default as in the results")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows to measure on")
    parser.add_argument("--norms-only", action="store_true", help="train nothing")
    parser.add_argument("--work", type=Path, required=True, help="folder of activations and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    options.layers = options.layers or ",".join(LAYERS[options.name])
    path = find(options.name, options.models)
    of_package = ("resae", "commit")  # of the installed one, which may be another
    found = {name: value for name, value in environment().items() if name not in of_package}
    versions = ", ".join(f"{name} {value}" for name, value in found.items())
    here = f"commit {commit()} ({versions})"
    folders = {
        (name, state): trained(path, predictor, factor, options)
        for name, predictor in METHODS.items()
        for state, factor in FACTORS.items()
        if not options.norms_only
    }
    lm = HookedLM.from_pretrained(str(path))
    points = lm.hook_points(options.layers.split(","))
    _, held_out = train_and_held_out(EMBEDDED, lm, context_tokens=128, held_out_rows=options.rows)
    batches = list(held_out.batches(MODEL_ROWS))
    lines = [
        f"# Sink tokens: {options.name}, blocks {options.layers}\n",
        f"Embedded corpus, {here}. Rows of {batches[0].shape[1]} tokens with BOS.\n",
        *norms(lm, points, batches),
    ]
    if folders:
        lines.append(
            f"\nk = {options.k}, M = 8 D, {options.tokens:,} training tokens, one seed. Layers in "
            f"their order; ReSAE in closed loop."
        )
        lines += comparison(lm, points, folders, batches)
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"sinks.{options.name}.md"
    write_atomically(file, lambda temporary: temporary.write_text(text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
