"""`report.json` → figures and one self-contained HTML page, for people who would rather look.

Reads the report.json of `resae demo` or `resae eval`; sections without rows are omitted.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resae.evaluation.labels import LABELS, MODES, Row, label, whole_selection
from resae.report.figures import draw, require_matplotlib
from resae.storage import load_json, require_writable, write_atomically

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


def _table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """`columns`: row key → heading. A rule is drawn where the first cell's k changes."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    body = []
    previous: Any = object()
    for row in rows:
        classes = [row.get("method", "")] + (["first"] if row.get("k") != previous else [])
        previous = row.get("k")
        cells = "".join(f"<td>{_cell(row.get(key))}</td>" for key in columns)
        body.append(f'<tr class="{" ".join(classes)}">{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


FURTHER: dict[str, tuple[str, str, dict[str, str]]] = {
    # report key → heading, note, columns; those in percent end in %
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


def _further(report: Row) -> list[str]:
    parts = []
    for key, (heading, note, columns) in FURTHER.items():
        if not report.get(key):
            continue
        rows = []
        for row in report[key]:
            percent = {c: f"{row[c]:+.1%}" for c, text in columns.items() if text.endswith("%")}
            name = LABELS.get(row.get("method", ""), "")
            rows.append({**row, **percent, "method": "", "name": name})
        parts += [f"<h2>{html.escape(heading)}</h2>", _table(rows, columns)]
        parts.append(f"<p class=note>{html.escape(note)}</p>")
    return parts


def _labelled(rows: Sequence[Row]) -> list[Row]:
    """Rows with `name`, ordered by k (those without k last)."""
    named = [{**row, "name": label(row)} for row in rows]
    return sorted(named, key=lambda row: (row["k"] is None, row["k"] or 0))


def _page(report: Row, figures: dict[str, tuple[str, str]]) -> str:
    config = report["config"]
    parts = [f"<h1>{html.escape(report['title'])}</h1>"]
    parts.append(
        f"<p>Model <b>{html.escape(str(config['model']))}</b>, data "
        f"<b>{html.escape(str(config['data']))}</b>, layers {', '.join(config['layers'])}, "
        f"{config['d_sae']} latents per layer, {config['train_tokens']:,} training tokens, "
        f"{report['replacement'][0]['tokens']:,} evaluated positions. "
        f"CE of the unchanged model: {report['replacement'][0]['ce_clean']:.4f} nats per token.</p>"
    )
    if report.get("findings"):
        items = "".join(f"<li>{html.escape(text)}</li>" for text in report["findings"])
        parts.append(f"<h2>What was found</h2><ul>{items}</ul>")

    def figure(name: str) -> str:
        if name not in figures:
            return ""
        svg, caption = figures[name]
        return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"

    parts += ["<h2>All selected layers replaced at once</h2>", figure("delta_ce")]
    parts.append(figure("ce_recovered"))
    columns = {
        "name": "method",
        "k": "k",
        "active_total": "latents in the last x̂",
        "delta_ce": "Δ CE",
        "ce_recovered_mean": "recovered (mean)",
        "ce_recovered_zero": "recovered (zero)",
        "kl": "KL",
    }
    rows = _labelled(whole_selection(report["replacement"]))
    for mode, name in MODES.items():
        parts.append(f"<h3>{name}</h3>")
        parts.append(_table([row for row in rows if row["mode"] == mode], columns))
    parts.append(
        "<p class=note>Nats per token. Special tokens are neither replaced nor counted. "
        "Teacher-forced, replacing all layers is the same as replacing the last one: the stream "
        "put in last overwrites what came before. Online and error-added see every layer.</p>"
    )
    parts += ["<h2>Redundancy between layers</h2>", figure("redundancy")]
    parts.append(
        _table(
            _labelled([{"loop": None, **row} for row in report["redundancy"]]),
            {
                "name": "method",
                "k": "k",
                "mean_max_cos": "mean of largest cosine",
                "random_floor": "random directions",
                "share_over_0_5": "> 0.5",
                "share_over_0_7": "> 0.7",
                "share_over_0_9": "> 0.9",
            },
        )
    )
    if "r2" in figures:
        parts += ["<h2>What the affine maps predict</h2>", figure("r2")]
    parts.append("<h2>Reconstruction from clean activations</h2>")
    sinks = max((row.get("sinks", 0) for row in report["reconstruction"]), default=0)
    with_sinks = {"fvu_with_sinks": "FVU, stream with sinks"} if sinks else {}
    parts.append(
        _table(
            _labelled(report["reconstruction"]),
            {
                "name": "method",
                "k": "k",
                "layer": "layer",
                "fvu_stream": "FVU, stream",
                **with_sinks,
                "fvu_target": "FVU, target",
                "l0": "L0",
                "dead_fraction": "never fired",
            },
        )
    )
    parts.append(
        "<p class=note>Stream: the residual stream itself. Target: what the autoencoder reads, for "
        "residual methods what the prediction left.</p>"
    )
    if sinks:
        parts.append(
            f"<p class=note>{sinks} tokens are attention sinks, many times as long as the others: "
            f"they are left alone in replacement, and only in the column with sinks.</p>"
        )
    parts += _further(report)
    if "training" in figures:
        parts += ["<h2>Training</h2>", figure("training")]
    if report.get("samples"):
        parts.append("<h2>Text written with the layers replaced</h2>")
        for sample in report["samples"]:
            parts.append(
                f"<p class=note>{html.escape(sample['how'])}</p>"
                f"<pre><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}</pre>"
            )
    facts = {**config, **report["environment"]}
    lines = "\n".join(f"{key}: {value}" for key, value in facts.items())
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(lines)}</pre>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(report['title'])}</title><style>{STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def write_report(folder: str | Path) -> Path:
    """Draw `folder/report.json` into `folder/figures/*.svg` and `folder/report.html`; returns the
    path of the page.

    Raises:
        FileNotFoundError: no report.json. ModuleNotFoundError: no matplotlib.
        ValueError: another file than resae's. OSError: the folder cannot be written into.
    """
    require_matplotlib()
    folder = Path(folder)
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; write it first with `resae eval {folder}` or `resae demo --out {folder}`"
        )
    report = load_json(path, "report")
    absent = sorted({"title", "config", "replacement", "environment"} - set(report))
    if absent:
        raise ValueError(f"{path} is no report of resae: it has no {', '.join(absent)}")
    require_writable(folder)
    figures = draw(report)
    for name, (svg, _) in figures.items():
        target = folder / "figures" / f"{name}.svg"
        write_atomically(target, lambda temporary, svg=svg: temporary.write_text(svg))
    page = folder / "report.html"
    text = _page(report, figures)
    write_atomically(page, lambda temporary: temporary.write_text(text))
    return page
