"""Figures of a report, drawn with matplotlib."""

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

from resae.evaluation.labels import MODES, label, whole_selection
from resae.evaluation.rows import HistogramRow, ReplacementRow
from resae.report.content import Report
from resae.report.rows import TrainingRow

AnyRow = TypeVar("AnyRow", ReplacementRow, HistogramRow, TrainingRow)

COLORS = {  # Okabe and Ito: told apart by colour-blind readers too
    "raw": "#d55e00",
    "raw_equal_total": "#e69f00",
    "identity": "#009e73",
    "resae": "#0072b2",
    "all_previous": "#cc79a7",
    "affine_only": "#666666",
    "mlsae": "#56b4e9",
    "hierarchical": "#000000",
    "resae_closed": "#7b3294",
    "raw_matched": "#f0e442",
    "raw_wide": "#8b4513",
}


TABLES_ONLY = {
    *("raw_truncated", "boost_base", "boost"),
    *(f"all_previous_{map_type}" for map_type in ("scalar", "diagonal", "low_rank")),
}
"""Methods of one k, or of a comparison of their own: left out where lines run over k."""


FAIR_TABLE_ONLY = re.compile(r"_best_lr$|_long$|_lr_[\d.]+$|^resae_k_")
"""Names of fair rows of one k: left out of the figures, too."""


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the remedy, unless figures can be drawn."""
    if not find_spec("matplotlib"):
        raise ModuleNotFoundError('figures need matplotlib; pip install "resae[plots]"')


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure of this size in inches, and its axes in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _against_k(axis: Any, rows: Sequence[ReplacementRow], column: str) -> None:
    """One line per method and loop over k; methods without k as a level."""
    series: dict[tuple[str, str | None], list[ReplacementRow]] = {}
    for row in rows:
        series.setdefault((row.method, row.loop), []).append(row)
    ks = sorted({row.k for row in rows if row.k is not None})
    for (method, loop), points in series.items():
        color = COLORS.get(method, "#000000")
        if points[0].k is None:
            level = getattr(points[0], column)
            axis.axhline(level, color=color, linestyle=":", label=label(method, loop))
            continue
        points = sorted(points, key=lambda row: row.k or 0)
        axis.plot(
            [row.k for row in points],
            [getattr(row, column) for row in points],
            color=color,
            linestyle="--" if loop == "open" else "-",
            marker="o" if loop != "open" else "s",
            markersize=4,
            label=label(method, loop),
        )
    if ks:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
    axis.set_xlabel("k, active latents per layer")


def _drawn(rows: Sequence[AnyRow]) -> list[AnyRow]:
    return [
        row
        for row in rows
        if row.method not in TABLES_ONLY and not FAIR_TABLE_ONLY.search(row.method)
    ]


def _per_mode(rows: Sequence[ReplacementRow], column: str, title: str) -> Any:
    figure, axes = new_figure(11, 4.1, columns=3)
    for axis, (mode, name) in zip(axes, MODES.items(), strict=True):
        _against_k(axis, [row for row in rows if row.mode == mode], column)
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel(title)
    if column == "delta_ce":
        for axis in axes:
            axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _delta_ce(report: Report) -> Any:
    rows = _drawn(whole_selection(report.replacement))
    return _per_mode(rows, "delta_ce", "Δ CE, nats per token")


def _ce_recovered(report: Report) -> Any:
    rows = _drawn(whole_selection(report.replacement))
    return _per_mode(rows, "ce_recovered_mean", "CE recovered against mean ablation")


def _redundancy(report: Report) -> Any:
    rows = _drawn(report.redundancy_histogram)
    ks = sorted({row.k for row in rows if row.k is not None})
    figure, axes = new_figure(11, 3.2, columns=len(ks))
    floor = report.redundancy[0].random_floor
    for axis, k in zip(axes, ks, strict=True):
        for row in rows:
            if row.k != k:
                continue
            total = sum(row.counts)
            axis.stairs(
                [count / total for count in row.counts],
                row.edges,
                color=COLORS.get(row.method, "#000000"),
                linewidth=1.4,
                label=label(row.method),
            )
        axis.axvline(floor, color="#999999", linestyle=":", label="mean of random directions")
        axis.set_title(f"k = {k}", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("largest cosine with another layer's latent")
    axes[0].set_ylabel("share of latents")
    axes[-1].legend(fontsize=7, frameon=False)
    return figure


def _r2(report: Report) -> Any:
    rows = report.affine
    pairs = list(dict.fromkeys(row.hop for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, (axis,) = new_figure(2.5 + 1.5 * len(methods), 3.2)
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        values = [
            next(row.r2 for row in rows if (row.hop, row.method) == (pair, method))
            for pair in pairs
        ]
        bars = axis.bar(
            [x + i * width for x in range(len(pairs))],
            values,
            width,
            color=COLORS.get(method, "#aaaaaa"),
            hatch={0: "", 1: "//", 2: "..", 3: "xx"}[(i - 2) % 4] if method in TABLES_ONLY else "",
            label=label(method),
        )
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
    axis.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(pairs))], [_short_name(pair) for pair in pairs]
    )
    axis.set_ylabel("R², held-out tokens")
    axis.set_ylim(0, 1.12)
    figure.legend(loc="outside lower center", ncols=min(3, len(methods)), fontsize=8, frameon=False)
    return figure


def _short_name(text: str) -> str:
    """Short form of a hook point name."""
    return text.replace("blocks.", "block ").replace(".hook_resid_post", "").replace(".hook_", " ")


def _training(report: Report) -> Any:
    runs = _drawn(report.training)
    layers = len(runs[0].log[0].layers)
    figure, axes = new_figure(11, 3.4, columns=layers)
    for run in runs:
        for layer, axis in enumerate(axes):
            axis.plot(
                [entry.tokens / 1e3 for entry in run.log],
                [entry.layers[layer].fvu for entry in run.log],
                color=COLORS.get(run.method, "#000000"),
                alpha=0.85,
                linewidth=1.2,
                linestyle={0: "-", 1: "--", 2: ":"}[run.rank % 3],
            )
            axis.set_title(_short_name(report.config["layers"][layer]), fontsize=9)
            axis.set_yscale("log")
            axis.set_xlabel("thousand tokens")
    axes[0].set_ylabel("FVU of the training target")
    return figure


FIGURES: list[tuple[str, str, str, Callable[[Report], Any]]] = [
    # table · file name · caption · drawing
    ("replacement", "delta_ce", "Cross-entropy lost when all selected layers are replaced at once. "
     "Lower is better. Dashed: open loop; solid: closed loop, or where there is only one.",
     _delta_ce),
    ("replacement", "ce_recovered", "The same as the share of the cross-entropy that mean ablation "
     "of these layers loses. Higher is better; a strong ablation pushes everything towards 1, so "
     "read Δ CE first.", _ce_recovered),
    ("redundancy_histogram", "redundancy", "How alike the dictionaries of different layers are: "
     "for each latent, the largest cosine with a latent of another layer.", _redundancy),
    ("affine", "r2", "Variance of a layer that the prediction from the layer before explains, "
     "before any autoencoder.", _r2),
    ("training", "training", "Training curves, colours as above; solid, dashed and dotted from the "
     "smallest to the largest k. Targets differ between methods, so heights do not compare.",
     _training),
]  # fmt: skip


def draw(report: Report) -> dict[str, tuple[str, str]]:
    """File name → (SVG, caption), of every figure that the report has data for."""
    return {
        name: (svg_of(partial(function, report), name), caption)
        for table, name, caption, function in FIGURES
        if getattr(report, table)
    }


def svg_of(drawing: Callable[[], Any], name: str) -> str:
    """A figure as SVG, drawn in the report's font size; the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9}):
        drawing().savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
