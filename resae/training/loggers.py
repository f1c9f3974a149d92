"""Metric loggers in addition to the run's own log: TensorBoard, Weights & Biases."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resae.console import Console
from resae.stack.stack import ReSAE
from resae.storage import load_json, save_json
from resae.training.config import Files, TrainConfig
from resae.training.loop import LoopOptions, Progress


def require_loggers(config: Files) -> None:
    """Raise ModuleNotFoundError before anything runs, not after."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb is not None}
    for name, asked in wanted.items():
        if asked and name not in sys.modules and not find_spec(name):
            raise ModuleNotFoundError(
                f'--{name}: {name} is not installed; pip install "resae[{name}]"'
            )


def metric_loggers(
    config: Files, train: TrainConfig, until_done: ExitStack
) -> list[Callable[[Progress], None]]:
    """Functions to call with each progress; what they hold open is closed with `until_done`."""
    out = Path(config.out)
    loggers: list[Callable[[Progress], None]] = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writers: list[Any] = []

        def to_tensorboard(p: Progress) -> None:
            if not writers:  # a resumed run drops what came after its checkpoint
                writer = SummaryWriter(str(out / "tensorboard"), purge_step=p.step)
                writers.append(until_done.enter_context(writer))
            for name, value in _scalars(p, train).items():
                writers[0].add_scalar(name, value, p.step)
            writers[0].flush()

        loggers.append(to_tensorboard)
    if config.wandb is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        known = out / "wandb.json"
        run_id = load_json(known, "wandb run")["id"] if known.exists() else None
        settings = {"project": config.wandb, "name": out.name, "dir": str(out)}
        run = wandb.init(**settings, config=asdict(train), id=run_id, resume="allow")
        until_done.callback(run.finish)
        save_json(known, {"id": run.id})
        loggers.append(lambda p: run.log(_scalars(p, train), step=p.step))
    return loggers


def loop_options(
    config: Files,
    loggers: Sequence[Callable[[Progress], None]],
    console: Console,
    *,
    delta_ce: Callable[[ReSAE], Mapping[str, float]],
    on_checkpoint: Callable[[], None],
    should_stop: Callable[[], bool],
) -> LoopOptions:
    """Options of a training loop: intervals as of `config`, progress to console and loggers."""

    def report(p: Progress) -> None:
        console.log(p.line())
        for logger in loggers:
            logger(p)

    return LoopOptions(
        resume=config.resume,
        checkpoint_steps=config.checkpoint_steps,
        keep_checkpoints=config.keep_checkpoints,
        log_steps=config.log_steps,
        eval_steps=config.eval_steps,
        delta_ce=delta_ce,
        on_progress=report,
        on_checkpoint=on_checkpoint,
        should_stop=should_stop,
    )


def _scalars(p: Progress, config: TrainConfig) -> dict[str, float]:
    """The numbers of a progress line by name."""
    scalars = {"loss": p.loss, "tokens": p.tokens, "tokens_per_second": p.tokens_per_second}
    for name, metrics in zip(config.layers, p.layers, strict=True):
        scalars |= {f"{name}/{key}": value for key, value in metrics._asdict().items()}
    return scalars | {f"delta_ce/{way}": nats for way, nats in (p.delta_ce or {}).items()}
