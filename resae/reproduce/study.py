"""Work of a study: every job writes its result into a file of its own, and is skipped where that
file is there.

    study.json                 the settings; a study goes on with the same ones
    activations/               one capture of all layers, which every training reads
    maps/SPACING/              affine maps, scales and means, per predictor
    stacks/JOB/                trained stacks; of an interrupted training its checkpoint
    jobs/JOB.json              results

A study that is interrupted, however that happens, goes on with the job that it was at: a capture
with the next shard, a training with its newest checkpoint.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.console import Console, ProgressEstimate
from resae.data.activations import (
    MODEL_ROWS,
    ModelActivations,
    RowActivations,
    RowReader,
    WithoutSinks,
    capture_tokens,
    measure_sinks,
)
from resae.data.batches import ActivationBatches, sequential
from resae.data.cache import ActivationCache
from resae.data.rows import TokenRows, train_and_held_out
from resae.data.texts import load_texts
from resae.environment import environment
from resae.evaluation.comparison import delta_ce, evaluate
from resae.evaluation.methods import Method
from resae.evaluation.predictors import r2_per_layer
from resae.models.hooked import EMBEDDED, HookedLM
from resae.models.identity import ModelIdentity
from resae.models.points import HookPoint
from resae.models.sinks import SinkRule
from resae.reproduce.jobs import MAPS_ALONE, METHODS, Job, Kind, sweeps_of
from resae.reproduce.results import PREDICTORS, Result, require_result
from resae.reproduce.settings import StudyConfig
from resae.stack.stack import AffineOnly, ReSAE, new_stack
from resae.storage import is_unused, load_json, save_json
from resae.strict_json import brief, require_fields
from resae.training.calibration import Calibration, calibrate, sum_moments
from resae.training.config import TrainConfig
from resae.training.loop import Progress, train

CACHE_DTYPE = "bfloat16"
CHECKPOINT_STEPS = 200
CURVE_POINTS = 20
"""Entries of the training curve that a result keeps."""


class Study:
    """A study in a folder.

    Args:
        out: a new or empty folder, or one of a study with the same settings.
        lm: the model, with its tokenizer.
        device: of training; the model is on its own.

    Raises:
        ValueError: the folder holds something else, a study with other settings, or the activations
            of another model.
    """

    def __init__(
        self,
        out: Path,
        config: StudyConfig,
        lm: HookedLM,
        *,
        device: str = "cpu",
        console: Console | None = None,
    ):
        self.out = out
        self.config = config
        self.lm = lm
        self.device = device
        self.console = console or Console()
        _require_same_study(out, config)
        names = [str(block) for block in config.captured_blocks]
        self._sinks: dict[str, SinkRule] = {}
        self._rows, _ = train_and_held_out(
            EMBEDDED, lm, context_tokens=config.context_tokens, held_out_rows=0
        )
        self.cache = ActivationCache(
            out / "activations",
            ModelActivations(lm, self._rows, lm.hook_points(names)),
            data={"data": EMBEDDED},
            dtype=CACHE_DTYPE,
        )

    def run(
        self,
        jobs: Sequence[Job],
        seconds: Mapping[Job, float],
        *,
        stop: Callable[[], bool] = lambda: False,
        on_result: Callable[[Job], object] = lambda _: None,
    ) -> bool:
        """Do the jobs that are not done yet, one after the other.

        Args:
            seconds: expected time of each, for the progress.
            stop: asked between jobs, and within captures and trainings; if true, the study stops.
            on_result: called with each job that was done.

        Returns:
            Whether all jobs are done.
        """
        save_json(self.out / "study.json", self.config.to_json())
        left = [job for job in jobs if self.result(job) is None]
        plan = ProgressEstimate({j.name: seconds[j] for j in left}, self.console.progress)
        for job in left:
            if stop():
                return False
            plan.stage(job.name)
            began = time.perf_counter()
            result = self._do(job, plan, stop)
            if result is None:
                return False
            result |= {"seconds": time.perf_counter() - began, "environment": environment()}
            save_json(self._file(job), result)
            self.console.log(f"{job.name}: {result['seconds']:.0f} s")
            on_result(job)
        return True

    def result(self, job: Job) -> Result | None:
        """Result that a job wrote; None: it is not done.

        Raises:
            ValueError: the file is damaged.
        """
        file = self._file(job)
        if not file.exists():
            return None
        found, where = load_json(file, "result of a study"), f"result of a study: {file}"
        try:
            return require_result(found, job.kind, self.config.documents, where)
        except ValueError as error:
            raise ValueError(f"{error}; remove the file, and the job is done again") from None

    def points(self, spacing: str) -> list[HookPoint]:
        """The hook points that are replaced together."""
        return self.lm.hook_points([str(block) for block in self.config.blocks(spacing)])

    def activations(self, spacing: str) -> WithoutSinks:
        """Captured activations of the layers of one spacing, without sink tokens."""
        captured = self.cache.activations.points
        layers = _SomeLayers(self.cache, [captured.index(p) for p in self.points(spacing)])
        if spacing not in self._sinks:
            self._sinks[spacing] = measure_sinks(layers)
        return WithoutSinks(layers, self._sinks[spacing])

    def train_config(self, job: Job) -> TrainConfig:
        """Settings of a training, or of a try of one learning rate.

        Raises:
            ValueError: the learning rate of the method is not found yet.
        """
        factor, tokens = job.lr_factor, self.config.sweep_tokens
        if job.kind is not Kind.SWEEP:
            factor, tokens = self.best_lr_factor(job.method), self.config.train_tokens
        config = METHODS[job.method].settings(
            tuple(point.name for point in self.points(job.spacing)),
            job.k,
            self.config.expansion * self.lm.d_model,
            d_model=self.lm.d_model,
            train_tokens=tokens,
            batch_tokens=self.config.batch_tokens,
            seed=job.seed,
        )
        return replace(config, lr=factor * config.peak_lr)

    def best_lr_factor(self, method: str) -> float:
        """The learning rate, times the default, that lost least online on the tuning documents."""
        tried: dict[float, float] = {}
        for sweep in sweeps_of(method, self.config):
            result = self.result(sweep)
            if result is None:
                raise ValueError(f"reproduce: {sweep.name} is not done; run it first")
            if result["delta_ce"] is not None:
                tried[sweep.lr_factor] = result["delta_ce"]["online"]
        if not tried:
            raise ValueError(f"reproduce: {method} diverged at every learning rate; try lower ones")
        return min(tried, key=lambda factor: tried[factor])

    @cached_property
    def document_rows(self) -> list[Tensor]:
        """The first row `[T]` of each held-out document that fills one: first those on which
        learning rates are chosen, then those that are evaluated.

        Raises:
            ValueError: too few documents that are long enough.
        """
        config = self.config
        wanted = config.tuning_documents + config.documents
        rows: list[Tensor] = []
        for text in load_texts(EMBEDDED, split="validation"):
            rows += TokenRows([text], self.lm.tokenizer, config.context_tokens, take=1)
            if len(rows) == wanted:
                return rows
        raise ValueError(
            f"reproduce: {len(rows)} held-out documents of {config.context_tokens} tokens or more, "
            f"expected {wanted}; evaluate fewer documents or shorter rows"
        )

    @property
    def tuning_batches(self) -> list[Tensor]:
        """Documents on which learning rates are chosen."""
        return _batches(self.document_rows[: self.config.tuning_documents])

    @property
    def evaluation_batches(self) -> list[Tensor]:
        """Documents that are evaluated."""
        return _batches(self.document_rows[self.config.tuning_documents :])

    # -- jobs --------------------------------------------------------------------------------------

    def _file(self, job: Job) -> Path:
        return self.out / "jobs" / f"{job.name}.json"

    def _do(self, job: Job, plan: ProgressEstimate, stop: Callable[[], bool]) -> Result | None:
        """The result of a job; None: stopped before its end."""
        match job.kind:
            case Kind.CAPTURE:
                return self._capture(plan, stop)
            case Kind.MAPS:
                return self._fit_maps(job)
            case Kind.SWEEP:
                return self._try_lr(job, plan, stop)
            case Kind.TRAIN:
                trained = self._train(job, plan, stop)
                return None if trained is None else trained[1]
            case Kind.EVALUATE:
                return self._evaluate(job, plan)

    def _capture(self, plan: ProgressEstimate, stop: Callable[[], bool]) -> Result | None:
        wanted = self.config.train_tokens
        self.cache.require_disk(max(0, wanted - self.cache.stored_tokens))
        read, tokens = self.cache.reader(0), 0
        while tokens < wanted and not stop():
            counts, _ = read(MODEL_ROWS)
            if not counts:  # the corpus is shorter: it is read again
                break
            tokens += sum(counts)
            plan.at(min(1.0, tokens / wanted))
        else:
            if tokens < wanted:
                return None
        return {"tokens": tokens, "bytes": self.cache.bytes_for(self.cache.stored_tokens)}

    def _fit_maps(self, job: Job) -> Result:
        """Maps, scales and means of every predictor, and their R² on the evaluated documents."""
        points = self.points(job.spacing)
        activations = self.activations(job.spacing)
        sinks = activations.rule
        moments = sum_moments(
            "all_previous",
            sequential(activations),
            tokens=min(self.config.calibration_tokens, self.config.train_tokens),
            d_in=self.lm.d_model,
            n_layers=len(points),
        )
        unseen = [
            capture_tokens(self.lm, ids, points, sinks=sinks) for ids in self.evaluation_batches
        ]
        names = [point.name for point in points]
        r2: dict[str, list[float]] = {}
        for kind in PREDICTORS:
            calibration = calibrate(kind, moments, ridge=TrainConfig.ridge, sinks=sinks)
            calibration.save(self._maps_file(job.spacing, kind))
            if kind != "none":
                r2[kind] = r2_per_layer(calibration.predictor, unseen)
        left_out = {"sinks": activations.left_out, "median_norms": list(sinks.median_norms)}
        return {"tokens": moments.count, "layers": names, "r2": r2, **left_out}

    def _maps_file(self, spacing: str, kind: str) -> Path:
        return self.out / "maps" / spacing / f"{kind}.safetensors"

    def _calibration(self, spacing: str, kind: str) -> Calibration:
        return Calibration.load(self._maps_file(spacing, kind), kind)

    def _try_lr(self, job: Job, plan: ProgressEstimate, stop: Callable[[], bool]) -> Result | None:
        folder = self._stack_folder(job)
        try:
            trained = self._train(job, plan, stop)
        except ValueError:
            if not (folder / "nan_batch.safetensors").exists():
                raise
            result: Result = {"tokens": self.config.sweep_tokens, "delta_ce": None}
        else:
            if trained is None:
                return None
            stack, result = trained
            result["delta_ce"] = delta_ce(self.lm, stack.to(self.lm.device), self.tuning_batches)
        shutil.rmtree(folder)
        return result

    def _train(
        self, job: Job, plan: ProgressEstimate, stop: Callable[[], bool]
    ) -> tuple[ReSAE, Result] | None:
        config = self.train_config(job)
        folder = self._stack_folder(job)
        curve: list[dict[str, Any]] = []

        def record(p: Progress) -> None:
            plan.at(p.step / p.steps, f"fvu {' '.join(f'{m.fvu:.3f}' for m in p.layers)}")
            curve.append({"tokens": p.tokens, "layers": [m._asdict() for m in p.layers]})

        source = ActivationBatches(
            self.lm,
            self._rows,
            self.points(job.spacing),
            batch_tokens=config.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            buffer_dtype=getattr(torch, config.buffer_dtype),
            total_tokens=config.train_tokens,
            seed=config.seed,
            device=self.device,
            cache=self.activations(job.spacing),
        )
        stack = train(
            config,
            source,
            self._calibration(job.spacing, config.predictor),
            folder,
            identity=ModelIdentity.of(self.lm),
            device=self.device,
            resume=folder.exists(),
            checkpoint_steps=CHECKPOINT_STEPS,
            keep_checkpoints=1,
            log_steps=max(1, config.steps // CURVE_POINTS),
            on_progress=record,
            should_stop=stop,
        )
        if stack is None:
            return None
        shutil.rmtree(folder / "checkpoints")
        return stack, {
            "tokens": config.train_tokens,
            "settings": asdict(config.resolved()),
            "curve": curve,
        }

    def _stack_folder(self, job: Job) -> Path:
        return self.out / "stacks" / job.name

    def _evaluate(self, job: Job, plan: ProgressEstimate) -> Result:
        batches = self.evaluation_batches
        if job.method == MAPS_ALONE:
            method = Method(job.method, self._maps_alone(job.spacing), None)
        else:
            stack = ReSAE.load(self._stack_folder(job.training))
            method = Method(job.method, stack.to(self.lm.device), job.k)
        evaluation = evaluate(
            self.lm,
            [method],
            batches,
            documents=range(sum(map(len, batches))),
            on_batch=lambda done: plan.at(done / len(batches)),
        )
        tables = evaluation.to_dict()
        del tables["redundancy_histogram"], tables["density"]
        tokens = sum(evaluation.row_sums[0].tokens)
        return {"tokens": tokens, **tables, "row_sums": [asdict(s) for s in evaluation.row_sums]}

    def _maps_alone(self, spacing: str) -> AffineOnly:
        """Only the maps and the layers of this stack are used."""
        names = [point.name for point in self.points(spacing)]
        calibration = self._calibration(spacing, "previous")
        model = ModelIdentity.of(self.lm)
        one = (1,) * len(names)
        stack = new_stack(
            names, calibration.predictor, d_in=self.lm.d_model, d_sae=1, k=one, model=model
        )
        stack.sinks = calibration.sinks
        return AffineOnly(stack.to(self.lm.device).eval())


class _SomeLayers:
    """Some of the captured layers (`RowActivations`).

    Args:
        positions: which, in the order of the capture.
    """

    def __init__(self, captured: RowActivations, positions: Sequence[int]):
        self.captured = captured
        self.positions = positions

    def reader(self, row: int) -> RowReader:
        captured = self.captured.reader(row)

        def read(n: int) -> tuple[list[int], list[Tensor]]:
            counts, xs = captured(n)
            return counts, [xs[i] for i in self.positions] if xs else []

        return read


def _batches(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.stack(list(rows)).split(MODEL_ROWS))


def _require_same_study(out: Path, config: StudyConfig) -> None:
    """Raise ValueError if the folder holds something else than a study with these settings."""
    file = out / "study.json"
    if not file.exists():
        if not is_unused(out):
            raise ValueError(f"{out} exists and holds no study; choose another --out")
        return
    found, asked = require_fields(load_json(file, "study"), {}, f"study: {file}"), config.to_json()
    differing = [name for name, value in asked.items() if found.get(name) != value]
    if differing:
        has = ", ".join(f"{name}={brief(found.get(name))}" for name in differing)
        here = ", ".join(f"{name}={asked[name]}" for name in differing)
        raise ValueError(
            f"{out} holds a study with {has}, asked for {here}; use the same settings, or choose "
            f"another --out"
        )
