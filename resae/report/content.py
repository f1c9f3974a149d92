"""Content of report.json: the tables that `resae eval` and `resae demo` write, and the only place
that reads them.

    Report       everything in one file, as rows
    load_report  a file → a report
"""

from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from resae.evaluation.rows import (
    AblationRow,
    DensityRow,
    GenerationRow,
    HistogramRow,
    LayerPairRow,
    ReconstructionRow,
    RedundancyRow,
    ReplacementRow,
    SharedLatentsRow,
    TaskRow,
    replacement_html,
)
from resae.report.rows import (
    BoostRow,
    ElsewhereRow,
    FairRow,
    FvuRow,
    NestedFvuRow,
    RoutingRow,
    RunRow,
    Sample,
    TrainingRow,
)
from resae.storage import load_json
from resae.strict_json import require_fields

T = TypeVar("T")
SCHEMA_VERSION = 1
"""Rises where a column changes its meaning or goes. Columns and tables that come, such as
intervals, leave it: they are None or empty where a file lacks them."""
CONFIG = {"model": str, "data": str, "layers": [str], "d_sae": (int, [int]), "train_tokens": int}
"""Settings that the page names; the others are listed as they are."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of report.json; a table without rows is a part that the page leaves out."""

    title: str
    """Heading of the page."""
    config: dict[str, Any]
    """Settings of what was run, those of `CONFIG` among them."""
    environment: dict[str, Any]
    """Versions and machine."""
    replacement: list[ReplacementRow]
    """Per method, loop, mode and set of layers; at least one row."""
    reconstruction: list[ReconstructionRow] = field(default_factory=list[ReconstructionRow])
    """Per method, loop and layer."""
    redundancy: list[RedundancyRow] = field(default_factory=list[RedundancyRow])
    """Per method with several dictionaries."""
    redundancy_histogram: list[HistogramRow] = field(default_factory=list[HistogramRow])
    """Per method with several dictionaries."""
    affine: list[LayerPairRow] = field(default_factory=list[LayerPairRow])
    """Per method with maps and pair of layers."""
    training: list[TrainingRow] = field(default_factory=list[TrainingRow])
    """Per trained stack."""
    samples: list[Sample] = field(default_factory=list[Sample])
    """Per prompt and way of replacing."""
    teacher_forced_collapse: float | None = None
    """Largest difference between the logits with all layers replaced teacher-forced and with the
    last one alone; None where it was not measured."""
    findings: list[str] = field(default_factory=list[str])
    """Sentences."""
    routing: list[RoutingRow] = field(default_factory=list[RoutingRow])
    """Per method with several sources, layer and source."""
    boost: list[BoostRow] = field(default_factory=list[BoostRow])
    """Per text, autoencoders and layer."""
    fair: list[FairRow] = field(default_factory=list[FairRow])
    """Per trained stack of the fair comparison."""
    elsewhere: list[ElsewhereRow] = field(default_factory=list[ElsewhereRow])
    """Per other hook points, method, loop and mode."""
    mlsae: list[FvuRow] = field(default_factory=list[FvuRow])
    """Per k and layer."""
    hierarchical: list[NestedFvuRow] = field(default_factory=list[NestedFvuRow])
    """Per k and layer."""
    ablation: list[AblationRow] = field(default_factory=list[AblationRow])
    """Per kind of ablation and set of layers."""
    density: list[DensityRow] = field(default_factory=list[DensityRow])
    """Per method with autoencoders, loop and layer."""
    shared_latents: list[SharedLatentsRow] = field(default_factory=list[SharedLatentsRow])
    """Per method with one dictionary at all layers."""
    generation: list[GenerationRow] = field(default_factory=list[GenerationRow])
    """Per method and loop: text that the model continues prompts with."""
    runs: list[RunRow] = field(default_factory=list[RunRow])
    """The runs that are compared; empty in the report of one. `config` and `environment` are those
    of the first."""
    tasks: list[TaskRow] = field(default_factory=list[TaskRow])
    """Per task of lm-eval, metric and way of running the model."""

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json; tables of further methods only where they have rows."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        content["affine"] = [row.to_dict() for row in self.affine]
        further = ("routing", "boost", "fair", "elsewhere", "mlsae", "hierarchical")
        further += ("ablation", "density", "shared_latents", "generation", "runs", "tasks")
        return {name: value for name, value in content.items() if value or name not in further}

    def _repr_html_(self) -> str:
        title = f"{self.title}: all selected layers replaced; nats per token"
        return replacement_html(title, self.replacement)


def load_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, no report, one of another schema version, or rows that lack a column
            or have another type in one; columns that are not known are left out.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; write it first with `resae eval {path.parent}` or "
            f"`resae demo --out {path.parent}`"
        )
    content = require_fields(load_json(path, "report"), {}, str(path))
    absent = sorted({"title", "config", "replacement", "environment"} - set(content))
    if absent:
        raise ValueError(f"{path} is no report of resae: it has no {', '.join(absent)}")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, expected {SCHEMA_VERSION}; draw it with the "
            f"version of resae that wrote it, or write it again with `resae eval`"
        )
    try:
        report = _row(Report, content, str(path))
        require_fields(report.config, CONFIG, f"{path}: config")
        if not report.replacement:
            raise ValueError(f"{path}: replacement has no rows")
    except ValueError as error:
        raise ValueError(f"{error}; write the file again with `resae eval`") from None
    return report


def _row(cls: type[T], content: Any, where: str) -> T:
    """A dataclass from an object, and so the ones inside of it. Raises ValueError, beginning with
    `where`, for one without a required entry or with one of another type."""
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    expected = {name: _kind(hints[name], optional=_has_default(f)) for name, f in known.items()}
    require_fields(content, expected, where)
    values = {name: content[name] for name in known if content.get(name) is not None}
    for name, value in values.items():
        inner = _row_type(hints[name])
        if inner is not None:
            values[name] = [_row(inner, v, f"{where}: {name}[{i}]") for i, v in enumerate(value)]
    given = dict.fromkeys(name for name, f in known.items() if not _has_default(f))
    return cls(**(given | values))


def _has_default(of: Field[Any]) -> bool:
    return of.default is not MISSING or of.default_factory is not MISSING


def _row_type(hint: Any) -> type | None:
    """The dataclass of a list of rows; None for another type."""
    (inner, *_) = get_args(hint) or (None,)
    of_rows = get_origin(hint) is list and isinstance(inner, type) and is_dataclass(inner)
    return inner if of_rows else None


def _kind(hint: Any, *, optional: bool) -> Any:
    """A type as `require_fields` takes it."""
    if _row_type(hint) is not None:
        kind: Any = [dict]
    elif get_origin(hint) is list:
        kind = list(get_args(hint))
    elif isinstance(hint, UnionType):
        kind = tuple(None if t is NoneType else get_origin(t) or t for t in get_args(hint))
    else:
        kind = get_origin(hint) or hint
    return (kind, None) if optional else kind
