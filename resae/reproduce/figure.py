"""Figure of a study: cross-entropy lost online against k, one panel per spacing."""

from resae.choices import Mode
from resae.evaluation.intervals import interval
from resae.evaluation.labels import LABELS
from resae.report.charts import Curves, Point, Series, linear_axis, standalone, steps_axis
from resae.report.figures import K_LABEL, legend_of
from resae.report.styles import styles_of
from resae.reproduce.losses import Table


def draw(table: Table) -> str | None:
    """The figure as SVG; None: nothing is measured yet."""
    panels = _panels(_lines(table))
    return standalone(panels, legend_of(panels)) if panels else None


Lines = dict[str, dict[str, list[Point]]]
"""Spacing → method → its points by rising k."""


def _panels(lines: Lines) -> list[Curves]:
    """Online Δ CE of every method against k."""
    points = [p for methods in lines.values() for line in methods.values() for p in line]
    if not points:
        return []
    ends = [end for p in points for end in (p.low, p.high) if end is not None]
    x = steps_axis(K_LABEL, [point.x for point in points])
    y = linear_axis("online Δ CE, nats per token", ends)
    styles = styles_of(name for methods in lines.values() for name in methods)
    titles = {"far": "layers far apart"}
    return [
        Curves(
            titles.get(spacing, "layers near each other"),
            x,
            y,
            [Series(LABELS[name], styles[name], line) for name, line in methods.items()],
        )
        for spacing, methods in lines.items()
    ]


def _lines(table: Table) -> Lines:
    lines: Lines = {}
    for setting, row in sorted(table.items(), key=lambda item: item[0].k):
        for method, measured in row.items():
            loss = measured.loss(Mode.ONLINE)
            if loss is not None:
                of_method = lines.setdefault(setting.spacing, {}).setdefault(method, [])
                of_method.append(Point(setting.k, *interval(loss)))
    return lines
