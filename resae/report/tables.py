"""Tables of the page: columns with headings, and rows whose cells are ready to be shown.

A column with an interval has two others beside it in the rows, `NAME_low` and `NAME_high`; they are
shown inside its cells. Columns of the rows that no one named are shown after the others, under
their own names, so that a new measure needs no change here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from resae.evaluation.labels import base_name, label
from resae.report.charts import decimals
from resae.settings import field_docstrings

SHORT_TABLE = 8
"""Up to this many rows, a table is looked through without a filter."""
ENDS = ("_low", "_high")


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str
    """The value as it is shown."""
    value: float | str | None = None
    """Key that the column is sorted by; None: no value."""
    interval: str = ""
    """The interval of the value, where it has one."""
    best: bool = False
    """Best of its column."""


@dataclass(frozen=True)
class Row:
    """Cells of one row, the first of which names it."""

    cells: Sequence[Cell]
    begins: bool = False
    """First row of a group, above which a rule is drawn."""
    marked: bool = False
    """The row that the page is about."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table with a caption."""

    name: str
    """Its id in the page."""
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    @property
    def filtered(self) -> bool:
        """True where it is long enough for a filter."""
        return len(self.rows) > SHORT_TABLE


def table_of(
    name: str,
    caption: str,
    rows: Sequence[Any],
    headings: dict[str, str],
    *,
    left_out: Sequence[str] = (),
    titled: Callable[[Any], str] | None = None,
) -> Table:
    """A table of dataclass rows of one class; a rule is drawn where k changes.

    Args:
        headings: columns of the rows → headings, of which those in percent end in %; `name` is the
            label of the method.
        left_out: further columns that are not shown.
        titled: row → its label, in place of method and loop.
    """
    titled = titled or (lambda row: label(row.method, getattr(row, "loop", None)))
    known = {key: text for key, text in headings.items() if key == "name" or _has(rows, key)}
    headings = known | _further(rows, headings, left_out)
    meanings = field_docstrings(type(rows[0])) if rows else {}
    columns = [
        Column(heading, meanings.get(key, ""), numeric=_is_numeric(rows, key))
        for key, heading in headings.items()
    ]
    made: list[Row] = []
    previous: Any = object()
    for row in rows:
        cells = [
            Cell(titled(row), titled(row)) if key == "name" else _cell(row, key, heading)
            for key, heading in headings.items()
        ]
        k = getattr(row, "k", None)
        marked = base_name(getattr(row, "method", None) or "") == "resae"
        made.append(Row(cells, begins=bool(made) and k != previous, marked=marked))
        previous = k
    return Table(name, caption, columns, made)


def shown_number(value: float, digits: int = 4) -> str:
    """A number as tables show it, with a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def short_name(hook_point: str) -> str:
    """Short form of the names of hook points in a text."""
    short = hook_point.replace("blocks.", "block ").replace(".hook_resid_post", "")
    return short.replace(".hook_", " ")


def interval_of(row: Any, key: str) -> tuple[float, float] | None:
    """The interval of a column, where the row has one that is more than a point."""
    low, high = (getattr(row, key + end, None) for end in ENDS)
    return None if low is None or high is None or low == high else (low, high)


def _cell(row: Any, key: str, heading: str) -> Cell:
    value = getattr(row, key)
    if value is None:
        return Cell("–")
    if isinstance(value, list):
        return Cell(short_name(", ".join(map(_plain, value))), ", ".join(map(str, value)))
    if isinstance(value, bool | str):
        return Cell(short_name(str(value)), str(value))
    if isinstance(value, int):
        return Cell(f"{value:,}".replace("-", "−"), value)
    if heading.endswith("%"):
        return Cell(f"{value:+.1%}".replace("-", "−"), value)
    interval = interval_of(row, key)
    if interval is None:
        return Cell(shown_number(value), value)
    digits = decimals(*interval)
    low, high = (shown_number(end, digits) for end in interval)
    return Cell(shown_number(value, digits), value, f"[{low}, {high}]")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_numeric(rows: Sequence[Any], key: str) -> bool:
    if key == "name":
        return False
    values = [value for row in rows if (value := getattr(row, key)) is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _further(
    rows: Sequence[Any], headings: dict[str, str], left_out: Sequence[str]
) -> dict[str, str]:
    """Numeric columns that no one named → headings made of their names."""
    named = {*headings, *left_out, "method", "loop", "mode", "layers"}
    keys = [f.name for f in fields(rows[0]) if f.name not in named] if rows else []
    return {
        key: key.replace("_", " ")
        for key in keys
        if not key.endswith(ENDS)
        and any(isinstance(getattr(row, key), int | float) for row in rows)
    }


def _has(rows: Sequence[Any], key: str) -> bool:
    """True where any row has a value in this column."""
    return any(getattr(row, key) is not None for row in rows)
