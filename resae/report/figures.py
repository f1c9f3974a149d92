"""Figures of a report: panels of `resae.report.charts` made of its rows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from resae.evaluation.labels import base_name, label, mode_label, modes_of, whole_selection
from resae.evaluation.rows import GenerationRow, HistogramRow, ReplacementRow
from resae.report.charts import (
    Axis,
    Curves,
    Dot,
    Dots,
    Panel,
    Point,
    Series,
    Style,
    linear_axis,
    log_axis,
    standalone,
    steps_axis,
)
from resae.report.content import Report
from resae.report.rows import TrainingRow
from resae.report.styles import styles_of
from resae.report.tables import interval_of, short_name

AnyRow = TypeVar("AnyRow", ReplacementRow, HistogramRow, TrainingRow, GenerationRow)

TABLES_ONLY = {
    *("raw_truncated", "boost_base", "boost"),
    *(f"all_previous_{map_type}" for map_type in ("scalar", "diagonal", "low_rank")),
}
"""Methods of one k, or of a comparison of their own: left out where lines run over k."""


FAIR_TABLE_ONLY = re.compile(r"_best_lr$|_long$|_lr_[\d.]+$|^resae_k_")
"""Names of fair rows of one k: left out of the figures, too."""

K_LABEL = "k, active latents per layer"


@dataclass(frozen=True)
class Figure:
    """Panels with one legend."""

    name: str
    """Name of its file, and of its place in the page."""
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[Series] = ()
    """One per style that appears in the panels; empty where the panels name their rows."""

    def to_svg(self) -> str:
        """The figure as one SVG file; the same bytes for the same figure."""
        return standalone(self.panels, self.legend)


def draw(report: Report) -> dict[str, Figure]:
    """Name → figure, of every figure that the report has data for."""
    figures = (function(report) for table, function in FIGURES if getattr(report, table))
    return {figure.name: figure for figure in figures if figure.panels}


def headline_figure(rows: Sequence[ReplacementRow], mode: str) -> Figure:
    """Δ CE of these rows in one mode."""
    panels = _against_k(rows, "delta_ce", mode)
    return Figure("headline", "", panels, legend_of(panels))


def drawn(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The rows of methods that are in the figures."""
    return [
        row
        for row in rows
        if base_name(row.method) not in TABLES_ONLY
        and not FAIR_TABLE_ONLY.search(base_name(row.method))
    ]


def _style(styles: dict[str, Style], method: str, loop: str | None) -> Style:
    return styles[method]._replace(hollow=loop == "open")


def _against_k(rows: Sequence[ReplacementRow], column: str, mode: str) -> list[Panel]:
    """A panel of one line per method and loop over k; of dots where there is but one k. No panel
    without rows of this mode."""
    rows = [row for row in rows if row.mode == mode]
    if not rows:
        return []
    styles = styles_of(row.method for row in rows)
    unit = UNITS[column]
    values = [v for row in rows for v in _interval(row, column) if v is not None]
    axis = linear_axis(unit, values, zero=column == "delta_ce")
    ks = sorted({row.k for row in rows if row.k is not None})
    if len(ks) < 2:
        dots = [
            Dot(
                label(row.method, row.loop),
                _style(styles, row.method, row.loop),
                *_interval(row, column),
            )
            for row in rows
        ]
        title = mode_label(mode) + (f", k = {ks[0]}" if ks else "")
        return [Dots(title, axis, dots)]
    groups: dict[tuple[str, str | None], list[ReplacementRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.loop), []).append(row)
    series = [
        Series(
            label(method, loop),
            _style(styles, method, loop),
            [
                Point(row.k or ks[0], *_interval(row, column))
                for row in sorted(points, key=lambda row: row.k or 0)
            ],
            level=points[0].k is None,
        )
        for (method, loop), points in groups.items()
    ]
    return [Curves(mode_label(mode), steps_axis(K_LABEL, ks), axis, series)]


def _interval(row: ReplacementRow, column: str) -> tuple[float, float | None, float | None]:
    """A value and its interval, where the row has one."""
    low, high = interval_of(row, column) or (None, None)
    return getattr(row, column), low, high


UNITS = {"delta_ce": "Δ CE, nats per token", "ce_recovered_mean": "share of the loss recovered"}


def legend_of(panels: Sequence[Panel]) -> list[Series]:
    """The series of curves, each once."""
    curves = [panel for panel in panels if isinstance(panel, Curves)]
    return list({one.label: one for panel in curves for one in panel.series}.values())


def _per_mode(report: Report, column: str, caption: str, name: str) -> Figure:
    rows = drawn(whole_selection(report.replacement))
    panels = [panel for mode in modes_of(rows) for panel in _against_k(rows, column, mode)]
    return Figure(name, caption, panels, legend_of(panels))


def _delta_ce(report: Report) -> Figure:
    return _per_mode(
        report,
        "delta_ce",
        "Cross-entropy lost when all selected layers are replaced at once. Lower is better. Filled "
        "markers: closed loop, or where there is only one; hollow: open loop.",
        "delta_ce",
    )


def _ce_recovered(report: Report) -> Figure:
    return _per_mode(
        report,
        "ce_recovered_mean",
        "The same as the share of the cross-entropy that mean ablation of these layers loses. "
        "Higher is better; a strong ablation pushes everything towards 1, so read Δ CE first.",
        "ce_recovered",
    )


def _redundancy(report: Report) -> Figure:
    rows = drawn(report.redundancy_histogram)
    styles = styles_of(row.method for row in rows)
    floor = report.redundancy[0].random_floor if report.redundancy else None
    ks = sorted({row.k for row in rows}, key=lambda k: (k is None, k or 0))
    share = linear_axis("share of latents", [p.y for row in rows for p in _bins(row)])
    x = Axis("largest cosine with another layer's latent", 0, 1, [i / 5 for i in range(6)])
    panels: list[Panel] = []
    for k in ks:
        series = [
            Series(label(row.method), styles[row.method], points, marked=[_peak(points)])
            for row in rows
            if row.k == k and (points := _bins(row))
        ]
        mean = "" if floor is None else f" (random directions: {floor:.2f})"
        title = f"k = {k}{mean}" if k is not None else f"all{mean}"
        panels.append(Curves(title, x, share, series))
    return Figure(
        "redundancy",
        "How alike the dictionaries of different layers are: for each latent, the largest cosine "
        "with a latent of another layer. Further left is better; the mean of random directions "
        "stands above each panel.",
        panels,
        legend_of(panels),
    )


def _bins(row: HistogramRow) -> list[Point]:
    """Share of latents in the middle of each bin from zero on."""
    total = sum(row.counts) or 1
    bins = zip(row.edges, row.edges[1:], row.counts, strict=False)
    return [Point((a + b) / 2, count / total) for a, b, count in bins if a + b >= 0]


def _peak(points: Sequence[Point]) -> int:
    return max(range(len(points)), key=lambda i: points[i].y)


def _r2(report: Report) -> Figure:
    styles = styles_of(row.method for row in report.affine)
    axis = Axis("R², held-out tokens", 0, 1, [i / 5 for i in range(6)])
    panels = [
        Dots(
            short_name(pair),
            axis,
            [
                Dot(label(row.method), styles[row.method], row.r2)
                for row in report.affine
                if row.hop == pair
            ],
        )
        for pair in dict.fromkeys(row.hop for row in report.affine)
    ]
    return Figure(
        "r2",
        "Variance of a layer that the prediction from the layer before explains, before any "
        "autoencoder. Higher is better.",
        panels,
    )


def _generation(report: Report) -> Figure:
    rows = drawn(report.generation)
    styles = styles_of(row.method for row in rows)
    axis = linear_axis("KL, nats per token", [v for row in rows for v in row.kl_by_position])
    longest = max((len(row.kl_by_position) for row in rows), default=1)
    position = linear_axis("token after the prompt", [1, longest], tight=True)
    panels: list[Panel] = []
    for k in sorted({row.k for row in rows if row.k is not None}):
        of_k = [row for row in rows if row.k in (k, None)]
        series = [
            Series(
                label(row.method, row.loop),
                _style(styles, row.method, row.loop),
                [Point(i, kl) for i, kl in enumerate(row.kl_by_position, start=1)],
                marked=_spread(len(row.kl_by_position), place / len(of_k)),
            )
            for place, row in enumerate(of_k)
        ]
        panels.append(Curves(f"k = {k}", position, axis, series))
    return Figure(
        "generation",
        "How far the next-token predictions move from those of the unchanged model, by position in "
        "its text. Lower is better; a line that rises shows errors that add up.",
        panels,
        legend_of(panels),
    )


def _training(report: Report) -> Figure:
    runs = [run for run in drawn(report.training) if run.log]
    styles = styles_of(run.method for run in runs)
    panels = [
        panel
        for layer in range(max((len(run.log[0].layers) for run in runs), default=0))
        for k in sorted({run.k for run in runs})
        for panel in _training_panel(report, runs, styles, layer, k)
    ]
    return Figure(
        "training",
        "Training curves: fraction of the target's variance that is unexplained (FVU), by layer "
        "and k. Targets differ between methods, so heights do not compare.",
        panels,
        legend_of(panels),
    )


def _training_panel(
    report: Report, runs: Sequence[TrainingRow], styles: dict[str, Style], layer: int, k: int
) -> list[Panel]:
    """The runs of this k at one layer; nothing where none is."""
    of_k = [run for run in runs if run.k == k and layer < len(run.log[0].layers)]
    series = [
        Series(
            label(run.method),
            styles[run.method],
            [Point(entry.tokens / 1e3, entry.layers[layer].fvu) for entry in run.log],
            marked=_spread(len(run.log), place / len(of_k)),
        )
        for place, run in enumerate(of_k)
    ]
    if not series:
        return []
    points = [point for one in series for point in one.points]
    names = report.config["layers"]
    name = short_name(names[layer]) if layer < len(names) else f"layer {layer + 1}"
    tokens = linear_axis("thousand tokens", [point.x for point in points], tight=True)
    fvu = log_axis("FVU of the training target", [point.y for point in points])
    return [Curves(f"{name}, k = {k}", tokens, fvu, series)]


def _spread(points: int, offset: float) -> range:
    """Numbers of about four points, apart from those of curves with another offset, 0 to 1."""
    every = max(1, points // 4)
    return range(int(offset * every), points, every)


FIGURES: list[tuple[str, Callable[[Report], Figure]]] = [
    # table that it is made of · drawing
    ("replacement", _delta_ce),
    ("replacement", _ce_recovered),
    ("redundancy_histogram", _redundancy),
    ("affine", _r2),
    ("generation", _generation),
    ("training", _training),
]
