"""Results of the jobs of a study, as they stand in files, held against what is read of them."""

from typing import Any

from resae.reproduce.jobs import Kind
from resae.strict_json import require_fields

Result = dict[str, Any]
"""Findings of a job, as JSON."""

PREDICTORS = ("none", "identity", "previous", "all_previous")
"""Predictors for which a job of `Kind.MAPS` fits maps; all but the first have an R²."""
EVERY = {"seconds": float, "environment": dict}
ENVIRONMENT = dict.fromkeys(("commit", "transformers", "gpu", "processor"), (str, None)) | {
    "torch": str,
    "threads": int,
}
FIELDS: dict[Kind, dict[str, Any]] = {
    Kind.CAPTURE: {},
    Kind.MAPS: {"layers": [str], "r2": dict},
    Kind.SWEEP: {},
    Kind.TRAIN: {"settings": dict, "curve": [dict]},
    Kind.EVALUATE: dict.fromkeys(
        ("row_sums", "reconstruction", "redundancy", "replacement"), [dict]
    ),
}
"""Entries of a result that are read, by the kind of its job."""


def require_result(found: Any, kind: Kind, documents: int, where: str) -> Result:
    """The content of a job's file, if it has the entries that are read, of their types.

    Args:
        documents: number that are evaluated.

    Raises:
        ValueError: it has not; `where` begins the message.
    """
    require_fields(found, EVERY | FIELDS[kind], where)
    require_fields(found["environment"], ENVIRONMENT, f"{where}: environment")
    match kind:
        case Kind.MAPS:
            require_fields(found["r2"], dict.fromkeys(PREDICTORS[1:], [float]), f"{where}: r2")
        case Kind.SWEEP:
            if found.get("delta_ce", {}) is not None:  # null: the training diverged
                require_fields(found, {"delta_ce": dict}, where)
                require_fields(found["delta_ce"], {"online": float}, f"{where}: delta_ce")
        case Kind.TRAIN:
            _require_training(found, where)
        case Kind.EVALUATE:
            _require_evaluation(found, documents, where)
        case Kind.CAPTURE:
            pass
    return found


def _require_training(found: Result, where: str) -> None:
    require_fields(found["settings"], {"lr": float}, f"{where}: settings")
    if not found["curve"]:
        raise ValueError(f"{where}: curve is empty, expected the end of the training")
    end = require_fields(found["curve"][-1], {"layers": [dict]}, f"{where}: curve")
    for layer in end["layers"]:
        require_fields(layer, {"dead_fraction": float}, f"{where}: curve: layers")


def _require_evaluation(found: Result, documents: int, where: str) -> None:
    read = {"fvu_stream": float, "loop": (str, None)}
    for name, fields in {
        "row_sums": {"ce": [float], "tokens": [float]},
        "reconstruction": read,
        "redundancy": {"mean_max_cos": float},
        "replacement": {"active_total": int},
    }.items():
        for row in found[name]:
            require_fields(row, fields, f"{where}: {name}")
    for number, row in enumerate(found["row_sums"]):
        if number:  # the first is of the unchanged model
            require_fields(row, {"mode": str, "loop": (str, None)}, f"{where}: row_sums")
        if len(row["ce"]) != documents or len(row["tokens"]) != documents:
            raise ValueError(f"{where}: row_sums are not of {documents} documents")
    if not found["row_sums"] or not found["replacement"]:
        raise ValueError(f"{where}: row_sums or replacement is empty, expected a row or more")
