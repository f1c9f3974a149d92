"""`report.json` → figures and one self-contained HTML page, for people who would rather look.

Reads the report.json of `resae demo` or `resae eval`; sections without rows are omitted.
"""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resae.evaluation.labels import LABELS, MODES, label, whole_selection
from resae.evaluation.rows import ReconstructionRow, RedundancyRow, ReplacementRow
from resae.report.content import Report, load_report
from resae.report.figures import draw, require_matplotlib
from resae.storage import require_writable, write_atomically

RowOfK = TypeVar("RowOfK", ReplacementRow, ReconstructionRow, RedundancyRow)

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 68rem;
       color: #1b1b1b; background: #fff }
h1 { line-height: 1.2 } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap
} th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #999 } tr.first td { border-top: 2px solid #999 }
tr.resae td { background: #eef5fb }
.wide { overflow-x: auto } figure { margin: 1.5rem 0 } figure svg { max-width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .9rem }
pre { background: #f6f6f6; padding: .8rem; white-space: pre-wrap; font-size: .86rem }
li { margin: .35rem 0 }
"""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    return html.escape(str(value))


def _name(row: Any) -> str:
    return label(row.method, getattr(row, "loop", None))


def _table(
    rows: Sequence[Any],
    columns: dict[str, str],
    *,
    name: Callable[[Any], str] = _name,
    marked: bool = True,
) -> str:
    """A table of rows; a rule is drawn where k changes.

    Args:
        columns: column of the rows → heading, of which those in percent end in %; `name` is that of
            the method.
        marked: colour rows by their method.
    """
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    body = []
    previous: Any = object()
    for row in rows:
        k = getattr(row, "k", None)
        classes = [row.method if marked else ""] + (["first"] if k != previous else [])
        previous = k
        values = {key: name(row) if key == "name" else getattr(row, key) for key in columns}
        shown = [
            _cell(f"{value:+.1%}" if columns[key].endswith("%") else value)
            for key, value in values.items()
        ]
        cells = "".join(f"<td>{text}</td>" for text in shown)
        body.append(f'<tr class="{" ".join(classes)}">{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


FURTHER: dict[str, tuple[str, str, dict[str, str]]] = {
    # table of the report → heading, note, columns
    "hierarchical": (
        "HierarchicalTopK: one autoencoder at every k",
        "FVU of the stream, from clean activations, next to an autoencoder trained at that k, and "
        "an ordinary one of the largest k truncated to it.",
        {
            "k": "k",
            "layer": "layer",
            "fvu": "FVU",
            "single": "trained at this k",
            "over_single": "over it, %",
            "truncated": "ordinary, truncated",
        },
    ),
    "mlsae": (
        "MLSAE: one dictionary for all layers",
        "FVU of the stream, from clean activations, beside a dictionary of this size per layer.",
        {
            "k": "k",
            "layer": "layer",
            "fvu": "FVU",
            "single": "a dictionary each",
            "over_single": "over it, %",
        },
    ),
    "boost": (
        "SAE Boost: one domain added to autoencoders that never saw it",
        "Held-out text of the domain and of the rest. TopK alone: without the threshold that keeps "
        "the boost silent elsewhere.",
        {
            "which": "autoencoders",
            "text": "text",
            "layer": "layer",
            "fvu": "FVU",
            "change": "change, %",
            "l0": "L0",
            "delta_ce": "Δ CE online, all layers",
        },
    ),
    "fair": (
        "The same comparison without an advantage for ReSAE",
        "All layers replaced, residual methods in closed loop. Latents by layer are those of its "
        "own dictionary; a ReSAE reconstruction also draws on those of the layers before.",
        {
            "name": "method",
            "k": "k",
            "k_per_layer": "active latents by layer",
            "d_sae": "latents by layer",
            "train_tokens": "tokens",
            "lr": "peak learning rate by layer",
            "online": "Δ CE online",
            "teacher_forced": "teacher-forced",
        },
    ),
    "elsewhere": (
        "The comparison at other hook points",
        "All of the points replaced. Above 1, a method loses more than raw SAEs of the same k.",
        {
            "name": "method",
            "where": "where",
            "loop": "loop",
            "mode": "mode",
            "k": "k",
            "delta_ce": "Δ CE",
            "of_raw": "raw SAEs = 1",
        },
    ),
    "routing": (
        "Where the predictions from all previous layers come from",
        "Share of each source in the summed energy of what the sources contribute.",
        {"name": "method", "layer": "layer", "source": "from", "share": "share"},
    ),
}


def _by_k(rows: Sequence[RowOfK]) -> list[RowOfK]:
    """Rows ordered by k, those without k last."""
    return sorted(rows, key=lambda row: (row.k is None, row.k or 0))


class _Page:
    """Parts of the page, in the order of the methods."""

    def __init__(self, report: Report, figures: dict[str, tuple[str, str]]) -> None:
        self.report = report
        self.figures = figures
        """Name → SVG and caption."""

    def text(self) -> str:
        title = html.escape(self.report.title)
        parts = (
            self._summary(),
            self._findings(),
            self._replacement(),
            self._redundancy(),
            self._maps(),
            self._reconstruction(),
            self._further(),
            self._training(),
            self._samples(),
            self._configuration(),
        )
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{STYLE}</style>"
            f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
        )

    def _figure(self, name: str) -> str:
        if name not in self.figures:
            return ""
        svg, caption = self.figures[name]
        return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"

    def _summary(self) -> str:
        config, first = self.report.config, self.report.replacement[0]
        return (
            f"<p>Model <b>{html.escape(config['model'])}</b>, data "
            f"<b>{html.escape(config['data'])}</b>, layers {', '.join(config['layers'])}, "
            f"{config['d_sae']} latents per layer, {config['train_tokens']:,} training tokens, "
            f"{first.tokens:,} evaluated positions. "
            f"CE of the unchanged model: {first.ce_clean:.4f} nats per token.</p>"
        )

    def _findings(self) -> str:
        if not self.report.findings:
            return ""
        items = "".join(f"<li>{html.escape(text)}</li>" for text in self.report.findings)
        return f"<h2>What was found</h2><ul>{items}</ul>"

    def _replacement(self) -> str:
        columns = {
            "name": "method",
            "k": "k",
            "active_total": "latents in the last x̂",
            "delta_ce": "Δ CE",
            "ce_recovered_mean": "recovered (mean)",
            "ce_recovered_zero": "recovered (zero)",
            "kl": "KL",
        }
        rows = _by_k(whole_selection(self.report.replacement))
        tables = [
            f"<h3>{name}</h3>{_table([row for row in rows if row.mode == mode], columns)}"
            for mode, name in MODES.items()
        ]
        return (
            f"<h2>All selected layers replaced at once</h2>{self._figure('delta_ce')}"
            f"{self._figure('ce_recovered')}{''.join(tables)}"
            "<p class=note>Nats per token. Special tokens are neither replaced nor counted. "
            "Teacher-forced, replacing all layers is the same as replacing the last one: the "
            "stream put in last overwrites what came before. Online and error-added see every "
            "layer.</p>"
        )

    def _redundancy(self) -> str:
        columns = {
            "name": "method",
            "k": "k",
            "mean_max_cos": "mean of largest cosine",
            "random_floor": "random directions",
            "share_over_0_5": "> 0.5",
            "share_over_0_7": "> 0.7",
            "share_over_0_9": "> 0.9",
        }
        table = _table(_by_k(self.report.redundancy), columns)
        return f"<h2>Redundancy between layers</h2>{self._figure('redundancy')}{table}"

    def _maps(self) -> str:
        figure = self._figure("r2")
        return figure and f"<h2>What the affine maps predict</h2>{figure}"

    def _reconstruction(self) -> str:
        rows = self.report.reconstruction
        sinks = max((row.sinks for row in rows), default=0)
        with_sinks = {"fvu_with_sinks": "FVU, stream with sinks"} if sinks else {}
        columns = {
            "name": "method",
            "k": "k",
            "layer": "layer",
            "fvu_stream": "FVU, stream",
            **with_sinks,
            "fvu_target": "FVU, target",
            "l0": "L0",
            "dead_fraction": "never fired",
        }
        note = (
            f"<p class=note>{sinks} tokens are attention sinks, many times as long as the others: "
            f"they are left alone in replacement, and only in the column with sinks.</p>"
        )
        return (
            f"<h2>Reconstruction from clean activations</h2>{_table(_by_k(rows), columns)}"
            "<p class=note>Stream: the residual stream itself. Target: what the autoencoder reads, "
            "for residual methods what the prediction left.</p>" + (note if sinks else "")
        )

    def _further(self) -> str:
        parts: list[str] = []
        for key, (heading, note, columns) in FURTHER.items():
            rows = getattr(self.report, key)
            if rows:
                table = _table(
                    rows, columns, name=lambda row: LABELS.get(row.method, ""), marked=False
                )
                parts.append(f"<h2>{html.escape(heading)}</h2>{table}")
                parts.append(f"<p class=note>{html.escape(note)}</p>")
        return "".join(parts)

    def _training(self) -> str:
        figure = self._figure("training")
        return figure and f"<h2>Training</h2>{figure}"

    def _samples(self) -> str:
        samples = [
            f"<p class=note>{html.escape(sample.how)}</p>"
            f"<pre><b>{html.escape(sample.prompt)}</b>{html.escape(sample.text)}</pre>"
            for sample in self.report.samples
        ]
        heading = "<h2>Text written with the layers replaced</h2>"
        return heading + "".join(samples) if samples else ""

    def _configuration(self) -> str:
        facts = {**self.report.config, **self.report.environment}
        lines = "\n".join(f"{key}: {value}" for key, value in facts.items())
        return f"<h2>Configuration</h2><pre>{html.escape(lines)}</pre>"


def write_report(folder: str | Path) -> Path:
    """Draw `folder/report.json` into `folder/figures/*.svg` and `folder/report.html`; returns the
    path of the page.

    Raises:
        FileNotFoundError, ValueError: as of `load_report`. ModuleNotFoundError: no matplotlib.
        OSError: the folder cannot be written into.
    """
    require_matplotlib()
    folder = Path(folder)
    report = load_report(folder / "report.json")
    require_writable(folder)
    figures = draw(report)
    for name, (svg, _) in figures.items():
        target = folder / "figures" / f"{name}.svg"
        write_atomically(target, lambda temporary, svg=svg: temporary.write_text(svg))
    page = folder / "report.html"
    text = _Page(report, figures).text()
    write_atomically(page, lambda temporary: temporary.write_text(text))
    return page
