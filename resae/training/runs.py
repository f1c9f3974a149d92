"""Run directories: their record, opening a run, and resuming one."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from resae.choices import DTYPES, MapType, PredictorKind
from resae.data.config import Source
from resae.data.rows import TokenRows
from resae.data.texts import fingerprint
from resae.environment import environment
from resae.interop.hub import REPOSITORY
from resae.settings import current_names
from resae.stack.stack import ReSAE
from resae.storage import is_unused, load_json
from resae.strict_json import brief, require_fields
from resae.training.config import FinetuneConfig, FitConfig, RunConfig, TrainConfig

RECORDED = (
    "model",
    "revision",
    "data",
    "data_revision",
    "split",
    "encoding",
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


_TEXT, _WHOLE = (str, None), (int, None)
RECORD = {
    "model": _TEXT,
    "revision": _TEXT,
    "data": _TEXT,
    "data_revision": _TEXT,
    "split": _TEXT,
    "encoding": _TEXT,
    "text_column": _TEXT,
    "streaming": (bool, None),
    "context_tokens": _WHOLE,
    "held_out_rows": _WHOLE,
    "dtype": _TEXT,
    "held_out_split": _TEXT,
    "data_fingerprint": (dict, None),
    "config": (dict, None),
    "train": (dict, None),
    "affine": ([dict], None),
}
"""Entries of a record (run.json, fit.json) that are read, with their types."""
OF_TRAINING = {
    "seed": _WHOLE,
    "train_tokens": _WHOLE,
    "layers": ([str], None),
    "predictor": _TEXT,
    "map_type": _TEXT,
    "rank": _WHOLE,
    "calibration_tokens": _WHOLE,
    "on_reconstructions": _TEXT,
    "ridge": (float, None),
}
"""Entries of its `train` that are read; of fit.json they are beside the others."""


def load_record(file: Path, what: str) -> dict[str, Any]:
    """The record of a run or a fit, with entries of the expected types, those that are null left
    out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    where = f"{what}: {file}"
    record = current_names(require_fields(load_json(file, what), {}, where))
    require_fields(record, RECORD | OF_TRAINING, where)
    _require_choices(record, where)
    if record.get("train"):
        train = require_fields(current_names(record["train"]), OF_TRAINING, f"{where}: train")
        _require_choices(train, f"{where}: train")
        record["train"] = {name: value for name, value in train.items() if value is not None}
    for row in record.get("affine") or ():
        require_fields(row, {"method": str, "hop": str, "r2": float}, f"{where}: affine")
    known = RECORD | OF_TRAINING
    return {n: v for n, v in record.items() if v is not None or n not in known}


def _require_choices(record: dict[str, Any], where: str) -> None:
    for name, choices in (("predictor", PredictorKind), ("map_type", MapType), ("dtype", DTYPES)):
        if record.get(name) is not None and record[name] not in tuple(choices):
            raise ValueError(
                f"{where}: {name} = {brief(record[name])}, expected one of {', '.join(choices)}"
            )


def open_run(run: str | Path, device: str) -> tuple[dict[str, Any], ReSAE]:
    """The record and the stack of a finished run.

    Args:
        run: its directory; or, where there is no such folder, a stack on the hub, `owner/name` or
            `owner/name@revision`, which has no record.

    Raises:
        FileNotFoundError: no run directory, and no stack on the hub.
        ValueError: the run is not finished.
    """
    folder = Path(run)
    if is_on_hub(run):
        name, _, revision = str(run).partition("@")
        return {}, ReSAE.from_pretrained(name, revision=revision or None).to(device)
    if not (folder / "run.json").exists() and not (folder / "resae.json").exists():
        raise FileNotFoundError(f"{folder} is not a run directory; make one with `resae train`")
    if not (folder / "resae.json").exists():
        raise ValueError(
            f"the run in {folder} is not finished; continue it with `resae train … --resume`"
        )
    record = load_record(folder / "run.json", "run") if (folder / "run.json").exists() else {}
    return record, ReSAE.load(folder).to(device)


def is_on_hub(run: str | Path) -> bool:
    """True for a name `owner/name` or `owner/name@revision` that is no local path."""
    name, at, revision = str(run).partition("@")
    named = REPOSITORY.fullmatch(name) is not None and bool(revision) == bool(at)
    return named and not Path(run).exists()


def folder_beside(run: str | Path, out: str | None, name: str = "") -> Path:
    """The folder that results about a run go into: `out`, or else the run, or `name` in it.

    Raises:
        ValueError: a stack on the hub and no `out`.
    """
    if out is None and is_on_hub(run):
        raise ValueError(
            f"{run}: there is no such folder, and results about a stack on the hub need one; name "
            f"it with --out"
        )
    return Path(run, name) if out is None else Path(out)


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
    """Refuse to resume with another model, dataset or predictor, or an online training."""
    if record.get("finetuned") is not None:
        raise ValueError(
            f"--resume: {out} holds an online training of {record['finetuned']}; go on with `resae "
            f"finetune`, or choose another --out"
        )
    names = (*RECORDED, "maps")
    defaults = {f.name: f.default for f in fields(Source)}  # of settings that earlier runs had not
    began = {name: record.get(name, defaults.get(name)) for name in names}
    fitted = ("layers", "predictor", "map_type", "rank")
    trained = current_names(record.get("train", {}))
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


def require_same_text(
    record: dict[str, Any], config: RunConfig | FinetuneConfig, rows: TokenRows
) -> None:
    """Refuse to resume on text that was changed."""
    if record.get("data_fingerprint") not in (None, fingerprint(rows.texts)):
        raise ValueError(
            f"--resume: {config.data or 'the data'} holds other text than the run in {config.out} "
            f"began with; "
            f"bring it back, or choose another --out"
        )


def model_of(
    record: dict[str, Any], stack: ReSAE, model: str | None = None, revision: str | None = None
) -> tuple[str, str | None]:
    """Name and revision of the model that a run was trained on: the commit, where it is known.

    Args:
        model, revision: others that are asked for.

    Raises:
        ValueError: neither its record nor its stack has one.
    """
    identity = stack.model_identity
    name = model or record.get("model") or (identity and identity.name)
    if name is None:
        raise ValueError(
            "the stack does not record the model it was trained on; name it with --model"
        )
    if model is None and revision is None:
        revision = (identity and identity.revision) or record.get("revision")
    return name, revision
