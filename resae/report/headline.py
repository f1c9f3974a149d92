"""Top of the page: what replacing the layers costs, in a sentence, a figure and a small table."""

from collections.abc import Sequence
from dataclasses import dataclass

from resae.evaluation.labels import base_name, label, mode_label, modes_of, whole_selection
from resae.evaluation.rows import ReplacementRow
from resae.report.content import Report
from resae.report.figures import Figure, drawn, headline_figure
from resae.report.tables import Cell, Column, Row, Table, interval_of, shown_number

CORE = ("raw", "raw_equal_total", "identity", "resae", "resae_online", "affine_only")
"""Methods at the top where there are more than `MOST`."""
MOST = 8


@dataclass(frozen=True)
class Headline:
    """Top of the page."""

    sentence: str
    methods: Sequence[str]
    """Names of the methods in the sentence."""
    mode: str
    """Name of the mode in it."""
    figure: Figure
    table: Table


def headline(report: Report) -> Headline:
    """The top of the page, from rows in which all selected layers are replaced: online where that
    was measured, methods with two loops in closed loop."""
    whole = whole_selection(report.replacement)
    rows = [row for row in whole if row.loop != "open"] or whole
    mode = modes_of(rows)[0]
    if len({row.method for row in rows}) > MOST:
        rows = [row for row in drawn(rows) if base_name(row.method) in CORE] or rows
    of_mode = [row for row in rows if row.mode == mode]
    ks = sorted({row.k for row in of_mode if row.k is not None})
    ours, other = _compared(of_mode, ks)
    return Headline(
        _sentence(ours, other),
        list(dict.fromkeys(base_name(row.method) for row in (ours, other))),
        mode,
        headline_figure(of_mode, mode),
        _table_of_ks(of_mode, ks, mode) if len(ks) > 1 else _table_of_modes(rows),
    )


def _compared(
    rows: Sequence[ReplacementRow], ks: Sequence[int]
) -> tuple[ReplacementRow, ReplacementRow]:
    """At the middle k: ReSAE and raw SAEs, or ReSAE in different runs; without these, the methods
    that lose least and most."""
    coded = {row.method: row for row in rows if ks and row.k == ks[len(ks) // 2]}
    coded = coded or {row.method: row for row in rows}
    ours = [row for name, row in coded.items() if base_name(name) == "resae"]
    if {"raw", "resae"} <= set(coded):
        return coded["resae"], coded["raw"]
    ordered = sorted(ours if len(ours) > 1 else coded.values(), key=lambda row: row.delta_ce)
    return ordered[0], ordered[-1]


def _sentence(ours: ReplacementRow, other: ReplacementRow) -> str:
    layers = len(ours.layers)
    where = f"all {layers} selected layers" if layers > 1 else "the selected layer"
    by = f"codes of {ours.k} active latents per layer" if ours.k else "predictions"
    against = "" if ours is other else f", and by {_nats(other)} with {label(other.method)}"
    return (
        f"With {where} replaced at once ({mode_label(ours.mode)}) by {by}, the model's next-token "
        f"loss rises by {_nats(ours)} nats per token with {label(ours.method)}{against}."
    )


def _nats(row: ReplacementRow) -> str:
    interval = interval_of(row, "delta_ce")
    between = (
        "" if interval is None else " [{}, {}]".format(*(shown_number(x, 2) for x in interval))
    )
    return shown_number(row.delta_ce, 2) + between


def _table_of_ks(rows: Sequence[ReplacementRow], ks: Sequence[int], mode: str) -> Table:
    """A row per method, a column per k; a method without k has the same loss at every k."""
    cells = {
        method: [
            next((row for row in rows if row.method == method and row.k in (k, None)), None)
            for k in ks
        ]
        for method in dict.fromkeys(row.method for row in rows)
    }
    return _small_table(
        f"Δ CE {mode_label(mode)}, nats per token; lower is better.",
        [f"k = {k}" for k in ks],
        cells,
    )


def _table_of_modes(rows: Sequence[ReplacementRow]) -> Table:
    """A row per method, a column per mode."""
    modes = modes_of(rows)
    cells = {
        method: [
            next((row for row in rows if (row.method, row.mode) == (method, mode)), None)
            for mode in modes
        ]
        for method in dict.fromkeys(row.method for row in rows)
    }
    return _small_table(
        "Δ CE, nats per token; lower is better.", [mode_label(mode) for mode in modes], cells
    )


def _small_table(
    caption: str, headings: Sequence[str], rows: dict[str, list[ReplacementRow | None]]
) -> Table:
    """The best autoencoder of each column is marked where there are several."""
    coded = [cells for cells in rows.values() if any(row and row.k is not None for row in cells)]
    best: list[str | None] = []
    for column in zip(*coded, strict=True):
        losses = [row.delta_ce for row in column if row is not None]
        best.append(shown_number(min(losses), 2) if len(losses) > 1 else None)
    if any(value is not None for value in best):
        caption += " ★ the least with autoencoders."
    if any(row and row.loop for row_cells in rows.values() for row in row_cells):
        caption += " Methods with maps run in closed loop."
    if any(row and interval_of(row, "delta_ce") for cells in rows.values() for row in cells):
        caption += " Brackets: 95 % intervals."
    made: list[Row] = []
    for method, row_cells in rows.items():
        row_best = best if row_cells in coded else [None] * len(headings)
        cells = [_loss(row, least) for row, least in zip(row_cells, row_best, strict=True)]
        name = label(method)
        made.append(Row([Cell(name, name), *cells], marked=base_name(method) == "resae"))
    columns = [Column("method", numeric=False), *map(Column, headings)]
    return Table("headline", caption, columns, made)


def _loss(row: ReplacementRow | None, best: str | None) -> Cell:
    """Cell of a loss; the best of its column, as far as the digits shown tell."""
    if row is None:
        return Cell("–")
    interval = interval_of(row, "delta_ce")
    ends = "" if interval is None else "[{}, {}]".format(*(shown_number(x, 2) for x in interval))
    shown = shown_number(row.delta_ce, 2)
    return Cell(shown, row.delta_ce, ends, best=shown == best)
