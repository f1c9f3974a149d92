"""Run directories: their record, opening a run, and resuming one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from resae.data.rows import TokenRows
from resae.data.texts import fingerprint
from resae.environment import environment
from resae.settings import current_names
from resae.stack.stack import ReSAE
from resae.storage import is_unused, load_json
from resae.training.config import FitConfig, RunConfig, TrainConfig

RECORDED = (
    "model",
    "data",
    "text_column",
    "streaming",
    "context_tokens",
    "held_out_rows",
    "dtype",
)
"""Settings that name what a run reads."""


def record_of(
    config: RunConfig | FitConfig,
    rows: TokenRows,
    affine: list[dict[str, Any]],
    device: str,
    command: str,
) -> dict[str, Any]:
    """Record of a run or a fit. `config` repeats it: `resae train --config FILE`, or
    `RunConfig.load(FILE)`."""
    settings = asdict(config)
    settings.pop("resume", None)
    return {
        "command": command,
        "config": settings,
        **{name: getattr(config, name) for name in RECORDED},
        "data_fingerprint": fingerprint(rows.texts),
        "device": device,
        "affine": affine,
        "environment": environment(),
    }


def open_run(folder: Path, device: str) -> tuple[dict[str, Any], ReSAE]:
    """The record and the stack of a finished run.

    Raises:
        FileNotFoundError: no run directory.
        ValueError: the run is not finished.
    """
    if not (folder / "run.json").exists() and not (folder / "resae.json").exists():
        raise FileNotFoundError(f"{folder} is not a run directory; make one with `resae train`")
    if not (folder / "resae.json").exists():
        raise ValueError(
            f"the run in {folder} is not finished; continue it with `resae train … --resume`"
        )
    record = load_json(folder / "run.json", "run") if (folder / "run.json").exists() else {}
    return record, ReSAE.load(folder).to(device)


def require_startable(out: Path, resume: bool) -> None:
    """Refuse to start in a folder that is not empty, and to resume where there is no run."""
    if not resume and not is_unused(out):
        raise ValueError(
            f"{out} exists and is not empty; continue with --resume, or choose another --out"
        )
    if resume and not (out / "run.json").exists():
        raise FileNotFoundError(
            f"--resume: no run in {out} to continue (no run.json there); give the --out that the "
            f"run began with, or leave --resume out to begin one"
        )


def require_same_run(
    record: dict[str, Any], config: RunConfig, train: TrainConfig, out: Path
) -> None:
    """Refuse to resume with another model, dataset or predictor."""
    names = (*RECORDED, "maps")
    began = {name: record.get(name) for name in names}
    fitted = ("layers", "predictor", "map_type", "rank")
    trained = current_names(record["train"])
    began |= {name: trained.get(name) for name in fitted}
    now = {name: getattr(config, name) for name in names}
    now |= {name: getattr(train, name) for name in fitted} | {"layers": list(train.layers)}
    changed = [name for name in began if began[name] != now[name]]
    if changed:
        raise ValueError(
            f"--resume: the run in {out} began with "
            f"{', '.join(f'{name}={began[name]}' for name in changed)}; use the same, or another "
            f"--out"
        )


def require_same_text(record: dict[str, Any], config: RunConfig, rows: TokenRows) -> None:
    """Refuse to resume on text that was changed."""
    if record.get("data_fingerprint") not in (None, fingerprint(rows.texts)):
        raise ValueError(
            f"--resume: {config.data} holds other text than the run in {config.out} began with; "
            f"bring it back, or choose another --out"
        )


def model_of(record: dict[str, Any], stack: ReSAE) -> str:
    """Name of the model that a run was trained on.

    Raises:
        ValueError: neither its record nor its stack has one.
    """
    if "model" in record:
        return record["model"]
    if stack.model_identity is not None:
        return stack.model_identity.name
    raise ValueError("the stack does not record the model it was trained on; name it with --model")
