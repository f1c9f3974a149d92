"""The whole method on the embedded model and corpus: fit, train, replace, measure, and say what
holds.

Raw SAEs, raw SAEs with the total latents of a ReSAE reconstruction, identity residuals and ReSAE
are trained on the same activations in the same order with the same seeds, and evaluated on the same
held-out tokens. The activations are captured once and kept in memory.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resae.affine import Moments, r2_per_layer
from resae.data import StoredActivations, TokenRows, capture_tokens, train_and_held_out
from resae.environment import environment
from resae.evaluate import Method, collapse_difference, evaluate
from resae.model import EMBEDDED, HookedLM, HookPoint
from resae.replace import generate
from resae.stack import AffineOnly, ModelIdentity, ReSAE
from resae.storage import save_json
from resae.train import Calibration, Progress, TrainConfig, calibrate, sum_moments, train

SCHEMA_VERSION = 1
HOP_HELD_OUT_ROWS = 64
PROMPTS = ("And it came to pass", "def __init__(self,")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demonstration; the defaults fit in five minutes and 3 GB on two CPU cores."""

    layers: tuple[str, ...] = ("1", "3", "5")
    k: tuple[int, ...] = (4, 8, 32)
    d_sae: int = 512
    train_tokens: int = 200_000
    calibration_tokens: int = 60_000
    batch_tokens: int = 1_024
    held_out_rows: int = 64
    context_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.layers) < 2:
            raise ValueError("demo: it compares layers; name at least two, for example 1,3,5")
        if not self.k or list(self.k) != sorted(set(self.k)):
            raise ValueError(f"demo: k={self.k}, expected rising numbers, for example 4,8,32")
        if self.k[-1] * len(self.layers) > self.d_sae:
            raise ValueError(
                f"demo: k={self.k[-1]} on {len(self.layers)} layers means raw SAEs with "
                f"{self.k[-1] * len(self.layers)} active latents, more than d_sae={self.d_sae}; "
                f"lower k"
            )


@dataclass(frozen=True)
class _Recipe:
    """How one compared method is trained."""

    name: str
    predictor: str
    k_grows: bool = False
    """Layer l gets (l+1)·k active latents: as many as a ReSAE reconstruction there is made of."""


RECIPES = (
    _Recipe("raw", "none"),
    _Recipe("raw_equal_total", "none", k_grows=True),
    _Recipe("identity", "identity"),
    _Recipe("resae", "previous"),
)


class Plan:
    """What is done and what comes, with a time that corrects itself by the speed met so far.

    Stages are given with the seconds they took where they were measured; `at(fraction)` reports how
    far the current one is.
    """

    def __init__(self, stages: dict[str, float], show: Callable[[str], None]):
        self._stages = stages
        self._show = show
        self._began = time.perf_counter()
        self._done = 0.0
        self._current = ""

    def stage(self, name: str) -> None:
        if self._current:
            self._done += self._stages[self._current]
        self._current = name
        self.at(0.0)

    def at(self, fraction: float, detail: str = "") -> None:
        expected = self._done + fraction * self._stages[self._current]
        total = sum(self._stages.values())
        spent = time.perf_counter() - self._began
        # Until something is measured the reference speed has to do; then it fades out.
        pace = (spent + 5.0) / (expected + 5.0)
        left = (total - expected) * pace
        number = list(self._stages).index(self._current) + 1
        self._show(
            f"[{number}/{len(self._stages)}] {self._current:<42} {fraction:4.0%}  "
            f"{spent:4.0f} s, about {left:.0f} s left  {detail}"
        )


def run_demo(
    out: Path, config: DemoConfig, *, say: Callable[[str], None], show: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything into `out`; returns what is written to `out/report.json`.

    Args:
        say: for lines that stay. show: for progress that may overwrite itself.
    """
    lm = HookedLM.from_pretrained(EMBEDDED)
    points = lm.hook_points(config.layers)
    names = tuple(point.name for point in points)
    stages = _stages(config)
    say(
        f"{len(config.k) * len(RECIPES)} stacks of {len(names)} autoencoders ({config.d_sae} "
        f"latents; k = {', '.join(map(str, config.k))}) for {', '.join(names)} of a "
        f"{lm.n_layers}-layer Pythia of width {lm.d_model}"
    )
    say(
        f"{config.train_tokens:,} training tokens, "
        f"{config.held_out_rows * config.context_tokens:,} held out; "
        f"about {sum(stages.values()) / 60:.0f} minutes"
    )
    say(
        f"what comes: {_CAPTURE}, {_FIT}, train each stack, {_EVALUATE}, {_GENERATE}; then a page "
        f"with figures"
    )
    plan = Plan(stages, show)

    plan.stage(_CAPTURE)
    rows, held_out = train_and_held_out(
        EMBEDDED,
        lm,
        context_tokens=config.context_tokens,
        held_out_rows=config.held_out_rows + HOP_HELD_OUT_ROWS,
        seed=config.seed,
    )
    xs = _capture(lm, rows, points, config.train_tokens, plan)
    unseen = list(held_out.batches(16))
    eval_rows, hop_rows = torch.cat(unseen).split([config.held_out_rows, HOP_HELD_OUT_ROWS])

    plan.stage(_FIT)
    moments = sum_moments(
        "all_previous",
        zip(*(x.split(8_192) for x in xs), strict=True),
        tokens=config.calibration_tokens,
        d_in=lm.d_model,
        n_layers=len(points),
    )
    hops = [f"{a} → {b}" for a, b in zip(names, names[1:], strict=False)]
    affine = _hop_rows(lm, points, moments, hops, hop_rows)

    source = StoredActivations(xs, batch_tokens=config.batch_tokens, seed=config.seed)
    methods: list[Method] = []
    training: list[dict[str, Any]] = []
    for rank, k in enumerate(config.k):
        for recipe in RECIPES:
            plan.stage(_training_stage(recipe, k))
            folder = out / "stacks" / f"{recipe.name}_k{k}"
            stack, log = _train(recipe, k, config, names, lm, moments, source, folder, plan)
            # The last layer alone, beside all of them, shows what teacher-forcing hides.
            subsets = ((names[-1],),) if recipe.name in ("raw", "resae") else ()
            methods.append(Method(recipe.name, stack, k, subsets))
            training.append({"method": recipe.name, "k": k, "rank": rank, "log": log})
    methods.append(_affine_only(methods))

    plan.stage(_EVALUATE)
    batches = list(eval_rows.split(16))
    report = evaluate(lm, methods, batches, on_batch=lambda done: plan.at(done / len(batches)))
    resae = _stack_of(methods, "resae", config.k[-1])
    collapse = collapse_difference(lm, resae, batches[0])

    plan.stage(_GENERATE)
    samples = _samples(lm, methods, config)
    report = {
        "schema_version": SCHEMA_VERSION,
        "title": "ReSAE on the embedded model",
        "config": {**asdict(config), "model": EMBEDDED, "data": EMBEDDED, "layers": list(names)},
        "environment": environment(),
        **report,
        "affine": affine,
        "training": training,
        "samples": samples,
        "teacher_forced_collapse": collapse,
        "findings": findings(report, collapse),
    }
    save_json(out / "report.json", report)
    return report


# Seconds per stage, measured on one core; the display corrects them by the speed it meets.
_CAPTURE, _FIT = "capture activations", "fit affine maps"
_EVALUATE, _GENERATE = "replace layers and measure", "write text with the layers replaced"


def _training_stage(recipe: _Recipe, k: int) -> str:
    return f"train {recipe.name}, k = {k}"


def _stages(config: DemoConfig) -> dict[str, float]:
    tokens = config.train_tokens / 200_000
    stages = {_CAPTURE: 12.0 * tokens, _FIT: 2.0}
    for k in config.k:
        for recipe in RECIPES:
            stages[_training_stage(recipe, k)] = (5.8 + 0.1 * k) * tokens
    methods = 18 * len(config.k) + 3
    return {**stages, _EVALUATE: 0.0135 * methods * config.held_out_rows, _GENERATE: 3.0}


def _capture(
    lm: HookedLM, rows: TokenRows, points: Sequence[HookPoint], tokens: int, plan: Plan
) -> list[torch.Tensor]:
    pieces: list[list[torch.Tensor]] = []
    held = 0
    for ids in rows.batches(32):
        pieces.append(capture_tokens(lm, ids, points))
        held += len(pieces[-1][0])
        plan.at(min(1.0, held / tokens))
        if held >= tokens:
            break
    return [torch.cat(layer)[:tokens] for layer in zip(*pieces, strict=True)]


def _train(
    recipe: _Recipe,
    k: int,
    config: DemoConfig,
    names: tuple[str, ...],
    lm: HookedLM,
    moments: Moments,
    source: StoredActivations,
    folder: Path,
    plan: Plan,
) -> tuple[ReSAE, list[dict[str, Any]]]:
    """One method at one k, and its training curve."""
    settings = TrainConfig(
        layers=names,
        k=tuple(k * (layer + 1) if recipe.k_grows else k for layer in range(len(names))),
        d_sae=config.d_sae,
        predictor=recipe.predictor,
        train_tokens=config.train_tokens,
        calibration_tokens=config.calibration_tokens,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )
    log: list[dict[str, Any]] = []

    def note(p: Progress) -> None:
        plan.at(p.step / p.steps, f"fvu {' '.join(f'{m.fvu:.3f}' for m in p.layers)}")
        curve = [{"fvu": m.fvu} for m in p.layers]
        log.append({"step": p.step, "tokens": p.tokens, "layers": curve})

    stack = train(
        settings,
        source,
        calibrate(recipe.predictor, moments, ridge=settings.ridge),
        folder,
        identity=ModelIdentity.of(lm),
        log_steps=10,
        on_progress=note,
    )
    assert stack is not None  # nothing asks it to stop
    return stack, log


def _hop_rows(
    lm: HookedLM,
    points: Sequence[HookPoint],
    moments: Moments,
    hops: Sequence[str],
    rows: torch.Tensor,
) -> list[dict[str, Any]]:
    """R² per hop on held-out tokens, of the learned maps and of the identity."""
    unseen = [capture_tokens(lm, ids, points) for ids in rows.split(16)]
    table = []
    for method, kind in (("identity", "identity"), ("resae", "previous")):
        calibration: Calibration = calibrate(kind, moments, ridge=1e-4)
        for hop, r2 in zip(hops, r2_per_layer(calibration.predictor, unseen), strict=True):
            table.append({"method": method, "hop": hop, "r2": r2})
    return table


def _affine_only(methods: Sequence[Method]) -> Method:
    resae = next(m for m in methods if m.name == "resae")
    assert isinstance(resae.stack, ReSAE)
    return Method("affine_only", AffineOnly(resae.stack), None)


def _stack_of(methods: Sequence[Method], name: str, k: int) -> ReSAE:
    stack = next(m.stack for m in methods if (m.name, m.k) == (name, k))
    assert isinstance(stack, ReSAE)
    return stack


def _samples(
    lm: HookedLM, methods: Sequence[Method], config: DemoConfig
) -> list[dict[str, str | int]]:
    k = config.k[-1]
    writers: list[tuple[str, ReSAE | None]] = [("nothing replaced", None)]
    for name in ("raw", "resae"):
        stack = _stack_of(methods, name, k)
        writers.append((f"{name}, k = {k}, {stack.n_layers} layers replaced online", stack))
    samples: list[dict[str, str | int]] = []
    for prompt in PROMPTS:
        for how, stack in writers:
            written = generate(lm, prompt, stack, max_new_tokens=48, seed=config.seed)
            replaced = sum(c.replaced for c in written.counts)
            detail = f" ({replaced} activations)" if stack is not None else ""
            samples.append(
                {"how": how + detail, "prompt": prompt, "text": written.text, "replaced": replaced}
            )
    return samples


# -- in words --------------------------------------------------------------------------------------


def findings(report: dict[str, list[dict[str, Any]]], collapse: float) -> list[str]:
    """What the rows say about the paper's claims, in sentences; also where they do not hold.

    `collapse` is what `collapse_difference` measured.
    """
    rows = report["replacement"]
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    several = max(len(row["layers"]) for row in rows)

    def delta(method: str, k: int | None, mode: str, loop: str | None) -> float:
        return next(
            row["delta_ce"]
            for row in rows
            if (row["method"], row["k"], row["mode"], row["loop"]) == (method, k, mode, loop)
            and len(row["layers"]) == several
        )

    def listed(values: Sequence[float], digits: int = 2) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    at = f"at k = {', '.join(map(str, ks))}"
    online = {
        "raw": [delta("raw", k, "online", None) for k in ks],
        "equal": [delta("raw_equal_total", k, "online", None) for k in ks],
        "identity": [delta("identity", k, "online", "closed") for k in ks],
        "resae": [delta("resae", k, "online", "closed") for k in ks],
        "before": [delta("resae", k, "online", "open") for k in ks],
    }
    ratios = [ours / raw for ours, raw in zip(online["resae"], online["raw"], strict=True)]
    held = "below 0.6 at every k" if max(ratios) < 0.6 else "NOT below 0.6 at every k"
    sentences = [
        f"Online, all {several} layers replaced at once, ReSAE loses {listed(online['resae'])} "
        f"nats per token where raw SAEs lose {listed(online['raw'])} ({at}): "
        f"{listed(ratios)} of it, {held}.",
    ]
    fair = sum(a < b for a, b in zip(online["resae"], online["equal"], strict=True))
    sentences.append(
        f"Raw SAEs given as many latents in total as a ReSAE reconstruction is made of lose "
        f"{listed(online['equal'])} online: ReSAE is ahead at {fair} of {len(ks)} k."
    )
    sentences.append(
        f"The residual must be taken against what was put into the stream: against the stream "
        f"before replacement, ReSAE loses {listed(online['before'])} online."
    )
    opened = [delta("resae", k, "teacher_forced", "open") for k in ks]
    closed = [delta("resae", k, "teacher_forced", "closed") for k in ks]
    order = "closed is below open" if all(map(float.__lt__, closed, opened)) else "the order VARIES"
    sentences.append(
        f"With clean codes, teacher-forced, encoding the error made so far again (closed loop) "
        f"loses {listed(closed)}, the open loop {listed(opened)}: {order}."
    )
    equal = [delta("raw_equal_total", k, "teacher_forced", None) for k in ks]
    behind = sum(a > b for a, b in zip(opened, equal, strict=True))
    sentences.append(
        f"Teacher-forced at equal total latents, raw SAEs lose {listed(equal)}: open-loop ReSAE is "
        f"behind them at {behind} of {len(ks)} k, so its gain is online, not here."
        if behind
        else f"Teacher-forced at equal total latents, raw SAEs lose {listed(equal)}, more than "
        f"open-loop ReSAE."
    )
    identity_open = [delta("identity", k, "teacher_forced", "open") for k in ks]
    shares = [a / b for a, b in zip(online["resae"], online["identity"], strict=True)]
    sentences.append(
        f"Control: with the identity in place of the learned map the online loss is "
        f"{listed(online['identity'])}, teacher-forced in open loop {listed(identity_open)}. "
        + (
            "So the gain comes from passing the previous reconstruction on, hardly from the map "
            "being learned."
            if min(shares) > 0.85
            else f"Learning the map leaves {listed(shares)} of that loss online."
        )
    )
    added = [delta("resae", k, "error_added", "closed") for k in ks]
    added_raw = [delta("raw", k, "error_added", None) for k in ks]
    added_equal = [delta("raw_equal_total", k, "error_added", None) for k in ks]
    fair = sum(a < b for a, b in zip(added, added_equal, strict=True))
    sentences.append(
        f"With the clean errors of all layers added to the running stream, closed-loop ReSAE loses "
        f"{listed(added)}, raw SAEs {listed(added_raw)}, raw SAEs with as many latents in total "
        f"{listed(added_equal)}: ReSAE is ahead of the last at {fair} of {len(ks)} k."
    )
    alone = delta("affine_only", None, "online", None)
    beaten = [k for k, ours in zip(ks, online["resae"], strict=True) if alone < ours]
    sentences.append(
        f"The affine maps alone, no autoencoder after the first selected layer, which stays as it "
        f"is, lose {alone:.2f} online"
        + (f": less than ReSAE at k = {', '.join(map(str, beaten))}." if beaten else ".")
    )
    sentences.append(_redundancy_sentence(report["redundancy"]))
    sentences.append(
        f"Replacing whole streams with clean codes, all layers at once differ from the last one "
        f"alone by exactly {collapse:g} in every logit: what goes in last overwrites the rest, so "
        f"read online and error-added."
    )
    return sentences


def _redundancy_sentence(rows: Sequence[dict[str, Any]]) -> str:
    def of(method: str) -> dict[int, float]:
        return {row["k"]: row["mean_max_cos"] for row in rows if row["method"] == method}

    raw, ours, identity = of("raw"), of("resae"), of("identity")
    floor = rows[0]["random_floor"]
    near = all(value < floor + 0.05 for k, value in ours.items() if k <= 8)

    def listed(values: dict[int, float]) -> str:
        return ", ".join(f"{v:.2f}" for v in values.values())

    return (
        f"Dictionaries of different layers repeat each other far less: mean of the largest cosine "
        f"{listed(ours)} against {listed(raw)} for raw SAEs (k = {', '.join(map(str, ours))}); "
        f"{'within' if near else 'NOT within'} 0.05 of random directions ({floor:.2f}) at k ≤ 8. "
        f"The identity residual does the same ({listed(identity)})."
    )
