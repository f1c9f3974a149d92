"""Several reports as one: the rows of each, under names that tell of which run they are.

A compared report is an ordinary one (`Report`) whose methods are called `resae (first)`: the page,
its figures and its tables need to know nothing else. Tables whose rows name no method are left to
the reports of the runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from resae.report.content import Report, load_report
from resae.report.page import write_report
from resae.report.rows import RunRow
from resae.storage import require_writable, save_json


def write_comparison(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Compare the reports in some folders: write `out/report.json`, and draw it as `write_report`
    does; returns the path of the page.

    Raises:
        FileNotFoundError, ValueError: as of `load_report`; fewer than two runs, a run named twice,
            or `out` among them. OSError: `out` cannot be written into.
    """
    out, runs = Path(out), [Path(folder) for folder in folders]
    places = [run.resolve() for run in runs]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise ValueError(f"got {', '.join(map(str, runs))}, expected two or more different runs")
    if out.resolve() in places:
        raise ValueError(f"{out} holds one of the reports to compare; choose another --out")
    reports = {
        name: load_report(run / "report.json") for name, run in zip(_names(runs), runs, strict=True)
    }
    require_writable(out)
    save_json(out / "report.json", compared(reports).to_dict())
    return write_report(out)


def compared(reports: Mapping[str, Report]) -> Report:
    """One report of several; settings, where one is asked for, are those of the first."""
    first = next(iter(reports.values()))
    tables = {
        f.name: [row for name, report in reports.items() for row in _of_run(report, f.name, name)]
        for f in fields(Report)
        if isinstance(getattr(first, f.name), list)
    }
    runs = [RunRow(name, r.title, r.config, r.environment) for name, r in reports.items()]
    return replace(
        first,
        title=f"{', '.join(reports)} compared",
        teacher_forced_collapse=None,
        **tables | {"runs": runs},
    )


def _of_run(report: Report, table: str, name: str) -> list[Any]:
    """The rows of a table under the name of their run."""
    rows = getattr(report, table)
    if table == "findings":
        return [f"{name}: {sentence}" for sentence in rows]
    if table == "samples":
        return [replace(sample, how=f"{sample.how} ({name})") for sample in rows]
    return [_renamed(row, name) for row in rows if hasattr(row, "method")]


def _renamed(row: Any, name: str) -> Any:
    changed = {"method": f"{row.method} ({name})"}
    if getattr(row, "reference", None):
        changed["reference"] = f"{row.reference} ({name})"
    return replace(row, **changed)


def _names(runs: Sequence[Path]) -> list[str]:
    """Names of the folders, with as much of their paths as tells them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = next(
        n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts)
    )
    return ["/".join(p[-depth:]) for p in parts]
