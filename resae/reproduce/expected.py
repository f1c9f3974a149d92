"""Expected time, disk and memory of a study, from short measurements and from the jobs done."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from resae.choices import Mode
from resae.data.activations import capture_tokens
from resae.evaluation.comparison import evaluate, forward_passes
from resae.evaluation.methods import Method
from resae.reproduce.jobs import MAPS_ALONE, METHODS, Job, Kind
from resae.reproduce.settings import Spacing
from resae.reproduce.study import CACHE_DTYPE, Study
from resae.training.calibration import calibrate, sum_moments
from resae.training.config import TrainConfig
from resae.training.estimate import ModelSizes, checkpoint_bytes, estimate_run
from resae.training.start import initial_state
from resae.training.step import train_step

WARM_UP, TIMED = 1, 3
"""Training steps before the clock starts, and on the clock."""
ROWS = 4
"""Documents that the model and the evaluation are timed on."""


class Rates(NamedTuple):
    """Seconds per token."""

    capture: float
    maps: float
    train: float
    """Training of raw SAEs at the headline's k."""
    evaluate: float
    """Evaluation of raw SAEs, per forward pass."""
    passes: int
    """Forward passes of the evaluation of raw SAEs."""


def measure_rates(study: Study) -> Rates:
    """Measure the rates on a few documents: up to a minute on a small model."""
    lm, config = study.lm, study.config
    ids = torch.stack(study.document_rows[:ROWS])
    every, points = study.cache.activations.points, study.points(Spacing.FAR)
    capture_tokens(lm, ids[:1], every)
    began = time.perf_counter()
    captured = capture_tokens(lm, ids, every)
    seconds_capture = time.perf_counter() - began
    xs, tokens = [captured[every.index(point)] for point in points], len(captured[0])

    began = time.perf_counter()
    moments = sum_moments(
        "all_previous", [xs], tokens=tokens, d_in=lm.d_model, n_layers=len(points)
    )
    calibration = calibrate("none", moments, ridge=0.0)
    seconds_maps = time.perf_counter() - began

    settings = _settings(study, "raw", config.headline_k)
    state = initial_state(settings, calibration, None, study.device)
    picked = torch.arange(config.batch_tokens) % tokens
    batch = [(x[picked] / s).to(study.device) for x, s in zip(xs, calibration.scale, strict=True)]
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            began = time.perf_counter()
        float(train_step(state, settings, batch)[0])
    seconds_step = (time.perf_counter() - began) / TIMED

    state.stack.rescale_(calibration.scale)
    method = Method("raw", state.stack.to(lm.device).eval(), config.headline_k)
    passes = forward_passes([method])
    began = time.perf_counter()
    evaluate(lm, [method], [ids])
    seconds_pass = (time.perf_counter() - began) / passes
    return Rates(
        seconds_capture / tokens,
        seconds_maps / tokens,
        seconds_step / config.batch_tokens,
        seconds_pass / ids.numel(),
        passes,
    )


def _settings(study: Study, method: str, k: int) -> TrainConfig:
    config = study.config
    return METHODS[method].settings(
        tuple(point.name for point in study.points(Spacing.FAR)),
        k,
        config.expansion * study.lm.d_model,
        d_model=study.lm.d_model,
        batch_tokens=config.batch_tokens,
        train_tokens=config.train_tokens,
    )


def expected_seconds(study: Study, jobs: Sequence[Job], rates: Rates) -> dict[Job, float]:
    """Seconds of each job: by the rates, corrected by the jobs of its kind that are done."""
    by_rate = {job: tokens_of(study, job, rates) * getattr(rates, _RATE[job.kind]) for job in jobs}
    took: dict[Kind, float] = {}
    thought: dict[Kind, float] = {}
    for job in jobs:
        result = study.result(job)
        if result is not None:
            took[job.kind] = took.get(job.kind, 0.0) + result["seconds"]
            thought[job.kind] = thought.get(job.kind, 0.0) + by_rate[job]
    pace = {kind: took[kind] / max(1e-9, thought[kind]) for kind in took}
    return {job: seconds * pace.get(job.kind, 1.0) for job, seconds in by_rate.items()}


_RATE = {
    Kind.CAPTURE: "capture",
    Kind.MAPS: "maps",
    Kind.SWEEP: "train",
    Kind.TRAIN: "train",
    Kind.EVALUATE: "evaluate",
}


def tokens_of(study: Study, job: Job, rates: Rates) -> int:
    """Tokens that a job reads; of an evaluation once per forward pass."""
    config = study.config
    match job.kind:
        case Kind.CAPTURE | Kind.TRAIN:
            return config.train_tokens
        case Kind.MAPS:
            return min(config.calibration_tokens, config.train_tokens)
        case Kind.SWEEP:
            return config.sweep_tokens
        case Kind.EVALUATE:
            two_loops = job.method != MAPS_ALONE and METHODS[job.method].predictor != "none"
            passes = rates.passes + (len(Mode) if two_loops else 0)
            return passes * config.documents * config.context_tokens


def plan_table(study: Study, jobs: Sequence[Job], rates: Rates) -> str:
    """The plan for people: one line per stack, with the sweeps that its learning rate needs."""
    seconds = expected_seconds(study, jobs, rates)
    lines = [f"{'':<44}{'jobs':>6}{'done':>6}{'M tokens':>10}{'minutes':>9}{'in all':>8}"]
    pending: list[Job] = []
    spent = 0.0
    for job in jobs:
        pending.append(job)
        if job.kind in (Kind.SWEEP, Kind.TRAIN):  # an evaluation ends the work on a stack
            continue
        group, pending = (pending, []) if job.kind is Kind.EVALUATE else ([job], pending[:-1])
        left = [j for j in group if study.result(j) is None]
        tokens = sum(tokens_of(study, j, rates) for j in group)
        minutes = sum(seconds[j] for j in left) / 60
        spent += minutes
        lines.append(
            f"{'-'.join(job.words[job.kind is Kind.EVALUATE :]):<44}{len(group):>6}"
            f"{len(group) - len(left):>6}{tokens / 1e6:>10.2f}{minutes:>9.1f}{spent:>8.1f}"
        )
    return "\n".join([*lines, "", *_sizes(study, jobs, rates)])


def _sizes(study: Study, jobs: Sequence[Job], rates: Rates) -> list[str]:
    config, lm = study.config, study.lm
    largest = _settings(study, "raw_equal_total", config.k[-1])
    names = tuple(point.name for point in study.points(Spacing.FAR))
    estimate = estimate_run(
        largest,
        ModelSizes.of(lm, names, config.context_tokens),
        context_tokens=config.context_tokens,
        model_dtype=next(lm.model.parameters()).dtype,
    )
    stacks = sum(job.kind is Kind.TRAIN for job in jobs)
    disk = {
        "activations": study.cache.bytes_for(config.train_tokens),
        f"{stacks} stacks": stacks * estimate.disk["stack"],
        "checkpoints": 2 * checkpoint_bytes(largest, lm.d_model),
    }
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in disk.items())
    memory = sum(estimate.device_memory.values()) - estimate.device_memory["encode"]
    return [
        f"disk: {sum(disk.values()) / 1e9:.2f} GB ({said}; activations in {CACHE_DTYPE})",
        f"memory: about {memory / 1e9:.1f} GB in training, the language model included",
        f"measured rates: capture {1 / rates.capture:,.0f}, training {1 / rates.train:,.0f} "
        f"(raw SAEs, k = {config.headline_k}), evaluation {1 / rates.evaluate:,.0f} tokens/s and "
        f"pass; corrected by the jobs done",
    ]
