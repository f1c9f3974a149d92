"""Figure of a study: cross-entropy lost online against k, one panel per spacing."""

from functools import partial
from typing import Any

from resae.choices import Mode
from resae.evaluation.intervals import interval
from resae.evaluation.labels import LABELS
from resae.report.figures import COLORS, new_figure, svg_of
from resae.reproduce.losses import Table

SPREAD = 0.02
"""Distance between methods at one k, in parts of it, so that intervals do not hide each other."""


def draw(table: Table) -> str | None:
    """The figure as SVG; None: nothing is measured yet."""
    return svg_of(partial(_online, table), "reproduce") if table else None


def _online(table: Table) -> Any:
    """Online Δ CE of every method against k."""
    spacings = list(dict.fromkeys(setting.spacing for setting in table))
    ks = sorted({setting.k for setting in table})
    methods = list(dict.fromkeys(name for row in table.values() for name in row))
    figure, axes = new_figure(1.5 + 4.2 * len(spacings), 4.4, columns=len(spacings))
    for axis, spacing in zip(axes, spacings, strict=True):
        for place, method in enumerate(methods):
            points = [
                (setting.k * (1 + SPREAD * (place - (len(methods) - 1) / 2)), interval(loss))
                for setting, row in table.items()
                if setting.spacing == spacing and method in row
                if (loss := row[method].loss(Mode.ONLINE)) is not None
            ]
            if points:
                axis.errorbar(
                    [k for k, _ in points],
                    [i.value for _, i in points],
                    [[i.value - i.low for _, i in points], [i.high - i.value for _, i in points]],
                    color=COLORS.get(method, "#000000"),
                    marker="o",
                    markersize=4,
                    capsize=2,
                    linewidth=1.2,
                    label=LABELS[method],
                )
        axis.set_title(f"layers {spacing} apart" if spacing == "far" else "layers near each other")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xlim(ks[0] / 1.25, ks[-1] * 1.25)  # also around a single k
        axis.minorticks_off()
        axis.set_xlabel("k, active latents per layer")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("online Δ CE, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
