"""Train the autoencoders of all selected layers from one stream of activations.

What training needs before the first step (maps, scales, means) is a `Calibration`; every layer is
divided by its RMS, so that one learning rate suits all. Adam, decoder rows kept at norm 1 with the
gradient along them removed.

A run directory: `run.json` (configuration), `calibration.safetensors`, `log.jsonl`, `checkpoints/`,
and at the end the stack itself (`ReSAE.from_pretrained(run)`).
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from resae.data.batches import ActivationSource, Position
from resae.models.identity import ModelIdentity
from resae.stack.affine import AffinePredictor
from resae.stack.stack import ReSAE
from resae.storage import remove_partial, save_tensors, write_atomically
from resae.training.calibration import Calibration
from resae.training.checkpoints import (
    Config,
    load_newest,
    named_in_whole,
    resumed_config,
    save_checkpoint,
)
from resae.training.config import TrainConfig
from resae.training.distributed import SINGLE_PROCESS, Ranks
from resae.training.loss import LayerMetrics
from resae.training.start import initial_state, require_divisible, state_of_rank
from resae.training.step import TrainState, train_step, trained_tensors


class Progress(NamedTuple):
    """One entry of the log."""

    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    seconds_left: float
    loss: float
    layers: list[LayerMetrics[float]]
    delta_ce: Mapping[str, float] | None = None
    """Nats per held-out token lost by replacing all layers, by way of replacing; at intervals."""

    def line(self) -> str:
        fvu = " ".join(f"{m.fvu:.3f}" for m in self.layers)
        l0 = " ".join(f"{m.l0:.1f}" for m in self.layers)
        dead = " ".join(f"{m.dead_fraction:.1%}" for m in self.layers)
        hours, seconds = divmod(round(self.seconds_left), 3600)
        left = f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}"
        lost = "  ".join(f"ΔCE {way} {nats:.3f}" for way, nats in (self.delta_ce or {}).items())
        return (
            f"step {self.step}/{self.steps}  {self.tokens / 1e6:.2f}M tok  fvu {fvu}  l0 {l0}  "
            f"dead {dead}  {self.tokens_per_second / 1e3:.1f}k tok/s  left {left}"
            + (lost and f"  {lost}")
        )


class LoopOptions(TypedDict, total=False):
    """Options of a training loop; defaults as of `run_loop`."""

    resume: bool
    """Continue from the newest readable checkpoint of `out`, a folder that exists (from step 0
    without a checkpoint); with more `train_tokens` than before see `resumed_config`."""
    checkpoint_steps: int
    """Interval; a last checkpoint is written at the end."""
    keep_checkpoints: int
    """Number of newest checkpoints to keep (one more while it is written); of two or more, one is
    from before the learning rate falls."""
    log_steps: int
    """Interval."""
    eval_steps: int | None
    """Interval at which `delta_ce` measures a copy of the stack, for raw activations, on the
    training's device (in the place that gradients take in a step); the run is the same without."""
    delta_ce: Callable[[ReSAE], Mapping[str, float]] | None
    on_progress: Callable[[Progress], None] | None
    on_checkpoint: Callable[[], None]
    """Called on every rank before a checkpoint is written: what belongs to it and is not of the
    weights."""
    should_stop: Callable[[], bool]
    """Asked after every step; if true, a checkpoint is written and None returned."""


class Task(Protocol):
    """Work of a training loop: a state, and how a batch changes it."""

    state: TrainState

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the tensors of a batch."""
        ...

    def step(self, batch: list[Tensor]) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
        """One optimiser step; returns as `train_step`."""
        ...

    def whole(self) -> ReSAE | None:
        """A copy of the whole stack as it is now, for raw activations, on rank 0; None
        elsewhere."""
        ...


class Batches(Protocol):
    """Source of a task's batches: endless, from any recorded position."""

    def batches(self, start: Position) -> Iterator[tuple[list[Tensor], Position]]:
        """Tensors of one batch, and the position after it."""
        ...


def train(
    config: TrainConfig,
    source: ActivationSource,
    calibration: Calibration,
    out: Path,
    *,
    identity: ModelIdentity | None = None,
    device: str = "cpu",
    ranks: Ranks = SINGLE_PROCESS,
    **options: Unpack[LoopOptions],
) -> ReSAE | None:
    """Train, log and checkpoint into `out`; save the finished stack there and return it.

    Args:
        source: batches of L raw activations `[batch_tokens / ranks, D]`.
        identity: the model, as recorded with the stack.
        ranks: several processes that train together, in a folder that all of them see; rank 0
            writes and reports, and all stop together.
        options: `LoopOptions`: `resume`, intervals, and functions that are called.

    Raises:
        ValueError: the loss or the weights stopped being finite (no such state is saved; the batch
            is, in `nan_batch.safetensors`), or a checkpoint of another configuration.
        OSError: the disk is full; the checkpoints there are intact.
        FileNotFoundError: `resume`, and no folder `out`.
    """

    def task(config: TrainConfig) -> Task:
        return _OnActivations(config, calibration, identity, device, ranks)

    return run_loop(config, source, task, out, device=device, ranks=ranks, **options)


def run_loop(
    config: Config,
    source: Batches,
    make_task: Callable[[Config], Task],
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    checkpoint_steps: int = 1_000,
    keep_checkpoints: int = 2,
    log_steps: int = 50,
    eval_steps: int | None = None,
    delta_ce: Callable[[ReSAE], Mapping[str, float]] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_checkpoint: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE_PROCESS,
) -> ReSAE | None:
    """The loop of `train` for any task, made for the configuration that a resumed run goes on with;
    options as of `LoopOptions`, errors as of `train`."""
    _require_intervals(
        keep_checkpoints=keep_checkpoints,
        checkpoint_steps=checkpoint_steps,
        log_steps=log_steps,
        eval_steps=eval_steps,
    )
    if resume and not out.exists():
        raise FileNotFoundError(f"train: no folder {out} to resume from; look for the right one")
    if resume:
        config = resumed_config(config, out)
    task = make_task(config)
    state, own = task.state, ranks.local_layers(len(config.layers))
    _open_folder(out, state, config, ranks, resume=resume)
    batches = source.batches(state.position)
    pace, check = _Pace(config, state.step), _LossCheck()
    while state.step < config.steps:
        raw, state.position = next(batches)
        loss, metrics = task.step(raw)
        last = state.step == config.steps
        due = last or state.step % checkpoint_steps == 0
        due |= state.step == config.common_steps and keep_checkpoints > 1
        measure = eval_steps is not None and (last or state.step % eval_steps == 0)
        report = measure or last or state.step % log_steps == 0
        batch = _Batch(state.step, loss, dict(zip(task.inputs, raw, strict=True)))
        bad = check.add(batch, now=due or report)
        stop, diverged = ranks.any_rank(not last and should_stop(), bad is not None)
        if (stop or due) and not diverged:
            bad = None if _is_finite(state.stack, loss) else batch
            (diverged,) = ranks.any_rank(bad is not None)
        if diverged:
            raise ValueError(_diverged(check.recent, bad, out, config, ranks))
        if report:
            progress = pace.progress(state.step, _of_all_ranks(loss, metrics, own, config, ranks))
            whole = task.whole() if measure else None
            if whole is not None and delta_ce is not None:
                progress = progress._replace(delta_ce=delta_ce(whole.to(device).eval()))
                del whole
            if ranks.rank == 0:
                _append(out / "log.jsonl", progress)
                if on_progress is not None:
                    on_progress(progress)
        if stop or due:
            on_checkpoint()
            save_checkpoint(out / "checkpoints", state, config, keep_checkpoints, ranks)
        if stop:
            return None
    stack = task.whole()
    if stack is not None:
        stack.to("cpu").save_pretrained(out)
    ranks.barrier()  # nobody reads before
    return ReSAE.load(out) if stack is None else stack.eval()


class _OnActivations:
    """`train`'s task: autoencoders trained on activations, each layer divided by its RMS."""

    def __init__(
        self,
        config: TrainConfig,
        calibration: Calibration,
        identity: ModelIdentity | None,
        device: str,
        ranks: Ranks,
    ):
        require_divisible(config, ranks)
        self.begun = initial_state(
            config, calibration, identity, "cpu" if ranks.by_layers else device
        )
        self.state, self.config = state_of_rank(self.begun, config, ranks, device)
        self.maps = self.begun.stack.predictor.to(device)
        self.inputs: Sequence[str] = config.layers
        self.scale = calibration.scale
        self.sinks = calibration.sinks
        self.device = device
        self.ranks = ranks

    def step(self, batch: list[Tensor]) -> tuple[Tensor, list[LayerMetrics[Tensor]]]:
        xs = [x.to(self.device) * (1.0 / s) for x, s in zip(batch, self.scale, strict=True)]
        if self.ranks.by_layers:
            xs = self.ranks.gather_by_layer(_residuals(self.maps, xs))
        return train_step(self.state, self.config, xs, self.ranks)

    def whole(self) -> ReSAE | None:
        state, ranks = self.state, self.ranks
        state.optimizer.zero_grad(set_to_none=True)  # makes room for the copy
        if ranks.by_layers:
            held = ranks.gather_to_rank0(named_in_whole(trained_tensors(state.stack), ranks))
            for name, tensor in trained_tensors(self.begun.stack).items() if held else ():
                tensor.data.copy_(held[name])
        if ranks.rank > 0:
            return None
        stack = copy.deepcopy(self.begun.stack)
        stack.rescale_(self.scale)
        stack.sinks = self.sinks  # as they were, not scaled to and fro
        return stack


def _require_intervals(**intervals: int | None) -> None:
    for name, value in intervals.items():
        if value is not None and value < 1:
            raise ValueError(f"train: {name}={value}, expected at least 1")


def _open_folder(
    out: Path, state: TrainState, config: TrainConfig, ranks: Ranks, *, resume: bool
) -> None:
    """Make the run directory; with `resume` set `state` to that of its newest checkpoint."""
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            remove_partial(out)
        else:
            (out / "log.jsonl").unlink(missing_ok=True)
    ranks.barrier()  # nobody reads before
    if resume:
        left_behind = load_newest(out / "checkpoints", state, config, ranks)
        if ranks.rank == 0:
            _drop_later(out, state.step, config.steps, left_behind)


def _drop_later(out: Path, step: int, steps: int, left_behind: Sequence[Path]) -> None:
    """Remove from a run directory that is resumed at `step` everything of later steps."""
    _truncate_log(out / "log.jsonl", step)
    for path in left_behind:
        path.unlink()
    if step < steps:  # the stack there is of fewer tokens
        (out / "resae.json").unlink(missing_ok=True)


@torch.no_grad()
def _residuals(maps: AffinePredictor, xs: Sequence[Tensor]) -> list[Tensor]:
    """Residuals of L activations `[N, D]`: each minus its prediction by the maps."""
    predictions = [maps(layer, xs) for layer in range(len(xs))]
    return [
        x if prediction is None else x - prediction
        for x, prediction in zip(xs, predictions, strict=True)
    ]


def _of_all_ranks(
    loss: Tensor,
    metrics: Sequence[LayerMetrics[Tensor]],
    own: Sequence[int],
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[float, list[LayerMetrics[float]]]:
    """The loss and the metrics of a batch, from each rank's part."""
    L = len(config.layers)
    columns = {name: loss.new_zeros(L, dtype=torch.float64) for name in LayerMetrics._fields}
    for name, column in columns.items():
        column[list(own)] = torch.stack([getattr(of_layer, name).double() for of_layer in metrics])
    if ranks.by_data:
        for name in ("l0", "dead_fraction"):  # means over tokens, equally many on each rank
            columns[name] /= ranks.size
    sums = ranks.all_reduce(torch.cat([loss.double().view(1), *columns.values()])).cpu()
    rows = sums[1:].view(len(columns), L).T.tolist()
    layers = [LayerMetrics(**dict(zip(columns, row, strict=True))) for row in rows]
    return float(sums[0]), layers


class _Pace:
    """Training speed since this process began."""

    def __init__(self, config: TrainConfig, first_step: int):
        self.config = config
        self.first_step = first_step
        self.started = time.perf_counter()

    def progress(self, step: int, of_batch: tuple[float, list[LayerMetrics[float]]]) -> Progress:
        tokens = self.config.batch_tokens
        seconds = max(1e-9, time.perf_counter() - self.started)
        rate = (step - self.first_step) * tokens / seconds
        return Progress(
            step=step,
            steps=self.config.steps,
            tokens=step * tokens,
            tokens_per_second=rate,
            seconds_left=(self.config.steps - step) * tokens / rate,
            loss=of_batch[0],
            layers=of_batch[1],
        )


class _Batch(NamedTuple):
    """A batch whose loss has not yet been checked for NaN."""

    step: int
    loss: Tensor
    inputs: dict[str, Tensor]


class _LossCheck:
    """Check that losses are finite, one step late unless it is needed now: reading a loss waits for
    the device, so that while it works on this step, the host reads the loss of the step before."""

    def __init__(self) -> None:
        self.recent: list[_Batch] = []
        """The last two batches."""

    def add(self, batch: _Batch, *, now: bool) -> _Batch | None:
        """The first batch, among those that are checked, whose loss is not finite."""
        self.recent = [*self.recent[-1:], batch]
        checked = self.recent if now else self.recent[:-1]
        return next((b for b in checked if not bool(b.loss.isfinite())), None)


def _is_finite(stack: ReSAE, loss: Tensor) -> bool:
    """Are the loss and all weights that are trained finite?"""
    trained = trained_tensors(stack).values()
    finite = all(bool(t.isfinite().all()) for t in trained if t.requires_grad)
    return finite and bool(loss.isfinite())


def _diverged(
    recent: Sequence[_Batch], bad: _Batch | None, out: Path, config: TrainConfig, ranks: Ranks
) -> str:
    """Save the batch with the bad loss, each rank its share; returns the error message."""
    step = max(step for (step,) in ranks.all_gather_ints([-1 if bad is None else bad.step]))
    batch = next(b for b in recent if b.step == step)
    path = out / f"nan_batch{f'.rank{ranks.rank}' if ranks.size > 1 else ''}.safetensors"
    save_tensors(path, {**batch.inputs, "step": torch.tensor(batch.step)})
    if any(ranks.any_rank(not all(bool(x.isfinite().all()) for x in batch.inputs.values()))):
        remedy = "hold NaN or inf; look there, or load the model in float32 or bfloat16"
    else:
        remedy = f"are finite: train with a lower lr (now {config.peak_lr:g}) or clip_norm"
    return (
        f"training: loss is {float(batch.loss)} at step {batch.step}, or the weights after it are "
        f"not finite; no such state is saved. The inputs of the step, in {path}, {remedy}, "
        f"into another --out"
    )


def _append(path: Path, progress: Progress) -> None:
    record = progress._asdict()
    record["layers"] = [m._asdict() for m in progress.layers]
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}); checkpoints are intact") from error


def _truncate_log(path: Path, step: int) -> None:
    """Drop lines that steps after the checkpoint had written."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off in the middle by the interruption
        return math.inf
