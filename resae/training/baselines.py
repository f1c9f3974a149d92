"""Baselines of a run: the same training with raw and with identity-residual autoencoders."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from resae.choices import PredictorKind
from resae.console import Console
from resae.evaluation.methods import METHOD_OF_PREDICTOR
from resae.storage import is_unused
from resae.training.config import RunConfig
from resae.training.pipeline import Stopping, run
from resae.training.runs import load_record

BASELINES = (PredictorKind.NONE, PredictorKind.IDENTITY)


@dataclass(frozen=True)
class Baseline:
    """A training like a given one but for its predictor."""

    name: str
    """Method name in result rows."""
    folder: Path
    """Its run directory: of the name of the method, in a folder beside the given run."""
    config: RunConfig
    done: bool
    """True if it is trained already."""


def baselines_of(folder: Path, methods: Collection[str]) -> list[Baseline]:
    """Baselines of the run in `folder`, without those whose method is among `methods`: same model,
    text, layers, k, sizes, seed and number of tokens.

    Raises:
        ValueError: the run does not record its settings, is boosted, or its baselines were begun
            with others.
    """
    record = load_record(folder / "run.json", "run")
    if not record.get("config") or record.get("finetuned") is not None:
        raise ValueError(
            f"--baselines: {folder} does not record the settings of a training; train the "
            f"baselines with `resae train --predictor none` and `--predictor identity`"
        )
    began = RunConfig.load(folder / "run.json")
    if began.boost is not None:
        raise ValueError(f"--baselines: {folder} boosts another run; give that one's baselines")
    baselines = []
    for kind in BASELINES:
        name = METHOD_OF_PREDICTOR[kind]
        if name not in methods:
            out = folder.with_name(f"{folder.name}-baselines") / name
            config = replace(
                began,
                layers=tuple(record["train"]["layers"]),
                predictor=kind,
                maps=None,
                map_type=None,
                rank=None,
                eval_steps=None,
                tensorboard=False,
                wandb=None,
                out=str(out),
                resume=(out / "run.json").exists(),
            )
            _require_same_settings(out, config)
            baselines.append(Baseline(name, out, config, (out / "resae.json").exists()))
    return baselines


def train_baselines(
    baselines: Collection[Baseline],
    *,
    device: str,
    console: Console,
    command: str,
    stopping: Callable[[], Stopping],
) -> bool:
    """Train those that are not done, one after another; unfinished ones continue from their newest
    checkpoint. False: stopped before the end."""
    for baseline in baselines:
        if baseline.done:
            continue
        config = replace(baseline.config, device=device)
        if run(config, console=console, command=command, stopping=stopping()).stack is None:
            return False
    return True


def _require_same_settings(out: Path, config: RunConfig) -> None:
    """Raise ValueError if the folder of a baseline holds something else."""
    if is_unused(out):
        return
    if not (out / "run.json").exists():
        raise ValueError(f"--baselines: {out} holds something else than a run; move it away")
    where = {"out": config.out, "device": config.device, "resume": config.resume}
    if RunConfig.load(out / "run.json", **where) != config:
        raise ValueError(
            f"--baselines: {out} was begun with other settings than the run that it belongs to "
            f"has now; move it away"
        )
