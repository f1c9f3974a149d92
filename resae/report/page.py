"""`report.json` → figures and one self-contained HTML page, for people who would rather look.

Reads what `resae demo` and `resae eval` write; draws what is there and leaves out what is not.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resae.storage import load_json, require_writable, write_atomically

Row = dict[str, Any]

LABELS = {
    "raw": "raw SAEs",
    "raw_equal_total": "raw SAEs, equal total latents",
    "identity": "identity residual",
    "resae": "ReSAE",
    "all_previous": "all previous layers",
    **{
        f"{kind}_{form}": f"{label}, {form.replace('_', ' ')}"
        for kind, label in (("resae", "ReSAE"), ("all_previous", "all previous layers"))
        for form in ("scalar", "diagonal", "low_rank")
    },
    "mlsae": "MLSAE, one dictionary",
    "hierarchical": "HierarchicalTopK",
    "raw_truncated": "raw SAEs, truncated",
    "boost_base": "raw SAEs, one domain unseen",
    "boost": "SAE Boost",
    "resae_closed": "ReSAE trained in closed loop",
    "affine_only": "affine maps alone",
    "raw_matched": "raw SAEs, equal total and dictionary",
    "raw_wide": "raw SAEs, equal total, all latents in every layer",
    "resae_k_first": "ReSAE, k mostly in the first layer",
    "resae_k_falling": "ReSAE, k falling",
    "resae_k_rising": "ReSAE, k rising",
}
COMPARED = ("raw", "raw_equal_total", "raw_matched", "raw_wide", "identity", "resae")
LABELS |= {
    f"{name}_{suffix}": f"{LABELS[name]}, {text}"
    for name in COMPARED
    for suffix, text in (("best_lr", "best learning rate"), ("long", "more tokens"))
}
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
    *(f"all_previous_{form}" for form in ("scalar", "diagonal", "low_rank")),
}
"""Methods of one k, or of a comparison of their own: left out where lines run over k."""
FAIR_TABLE_ONLY = re.compile(r"_best_lr$|_long$|_lr_[\d.]+$|^resae_k_")
"""Names of fair rows of one k: left out of the figures, too."""
MODES = {
    "online": "online",
    "teacher_forced": "teacher-forced",
    "error_added": "error added (teacher-forced codes)",
}


def label(row: Row) -> str:
    name: str = LABELS.get(row["method"]) or row["method"]
    return f"{name}, {row['loop']} loop" if row.get("loop") else name


def whole_selection(rows: Sequence[Row]) -> list[Row]:
    """The rows in which every selected layer is replaced."""
    most = max((len(row["layers"]) for row in rows), default=0)
    return [row for row in rows if len(row["layers"]) == most]


# -- figures ---------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the remedy, unless figures can be drawn."""
    if not find_spec("matplotlib"):
        raise ModuleNotFoundError('figures need matplotlib; pip install "resae[plots]"')


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _against_k(axis: Any, rows: Sequence[Row], column: str) -> None:
    """One line per method and loop over k; methods without k as a level."""
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row["method"], row["loop"] or ""), []).append(row)
    ks = sorted({row["k"] for row in rows if row["k"] is not None})
    for (method, loop), points in series.items():
        color = COLORS.get(method, "#000000")
        if points[0]["k"] is None:
            axis.axhline(points[0][column], color=color, linestyle=":", label=label(points[0]))
            continue
        points = sorted(points, key=lambda row: row["k"])
        axis.plot(
            [row["k"] for row in points],
            [row[column] for row in points],
            color=color,
            linestyle="--" if loop == "open" else "-",
            marker="o" if loop != "open" else "s",
            markersize=4,
            label=label(points[0]),
        )
    if ks:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
    axis.set_xlabel("k, active latents per layer")


def _drawn(rows: Sequence[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if row["method"] not in TABLES_ONLY and not FAIR_TABLE_ONLY.search(row["method"])
    ]


def _per_mode(rows: Sequence[Row], column: str, title: str) -> Any:
    figure, axes = _figure(11, 4.1, columns=3)
    for axis, (mode, name) in zip(axes, MODES.items(), strict=True):
        _against_k(axis, [row for row in rows if row["mode"] == mode], column)
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel(title)
    if column == "delta_ce":
        for axis in axes:
            axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _delta_ce(report: Row) -> Any:
    rows = _drawn(whole_selection(report["replacement"]))
    return _per_mode(rows, "delta_ce", "Δ CE, nats per token")


def _ce_recovered(report: Row) -> Any:
    rows = _drawn(whole_selection(report["replacement"]))
    return _per_mode(rows, "ce_recovered_mean", "CE recovered against mean ablation")


def _redundancy(report: Row) -> Any:
    rows = _drawn(report["redundancy_histogram"])
    ks = sorted({row["k"] for row in rows})
    figure, axes = _figure(11, 3.2, columns=len(ks))
    floor = report["redundancy"][0]["random_floor"]
    for axis, k in zip(axes, ks, strict=True):
        for row in rows:
            if row["k"] != k:
                continue
            total = sum(row["counts"])
            axis.stairs(
                [count / total for count in row["counts"]],
                row["edges"],
                color=COLORS.get(row["method"], "#000000"),
                linewidth=1.4,
                label=LABELS.get(row["method"], row["method"]),
            )
        axis.axvline(floor, color="#999999", linestyle=":", label="mean of random directions")
        axis.set_title(f"k = {k}", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("largest cosine with another layer's latent")
    axes[0].set_ylabel("share of latents")
    axes[-1].legend(fontsize=7, frameon=False)
    return figure


def _r2(report: Row) -> Any:
    rows = report["affine"]
    hops = list(dict.fromkeys(row["hop"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, (axis,) = _figure(2.5 + 1.5 * len(methods), 3.2)
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        values = [
            next(r["r2"] for r in rows if (r["hop"], r["method"]) == (hop, method)) for hop in hops
        ]
        bars = axis.bar(
            [x + i * width for x in range(len(hops))],
            values,
            width,
            color=COLORS.get(method, "#aaaaaa"),
            hatch={0: "", 1: "//", 2: "..", 3: "xx"}[(i - 2) % 4] if method in TABLES_ONLY else "",
            label=LABELS.get(method, method),
        )
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(hops))], [_short(hop) for hop in hops])
    axis.set_ylabel("R², held-out tokens")
    axis.set_ylim(0, 1.12)
    figure.legend(loc="outside lower center", ncols=min(3, len(methods)), fontsize=8, frameon=False)
    return figure


def _short(text: str) -> str:
    """Hook point names as people say them."""
    return text.replace("blocks.", "block ").replace(".hook_resid_post", "").replace(".hook_", " ")


def _training(report: Row) -> Any:
    runs = _drawn(report["training"])
    layers = len(runs[0]["log"][0]["layers"])
    figure, axes = _figure(11, 3.4, columns=layers)
    for run in runs:
        for layer, axis in enumerate(axes):
            axis.plot(
                [entry["tokens"] / 1e3 for entry in run["log"]],
                [entry["layers"][layer]["fvu"] for entry in run["log"]],
                color=COLORS.get(run["method"], "#000000"),
                alpha=0.85,
                linewidth=1.2,
                linestyle={0: "-", 1: "--", 2: ":"}[run.get("rank", 0) % 3],
            )
            axis.set_title(_short(report["config"]["layers"][layer]), fontsize=9)
            axis.set_yscale("log")
            axis.set_xlabel("thousand tokens")
    axes[0].set_ylabel("FVU of the training target")
    return figure


FIGURES: list[tuple[str, str, str, Callable[[Row], Any]]] = [
    # report key · file name · caption · drawing
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


def draw(report: Row) -> dict[str, tuple[str, str]]:
    """File name → (SVG, caption), of every figure that the report has data for."""
    import matplotlib

    drawn = {}
    for key, name, caption, function in FIGURES:
        if not report.get(key):
            continue
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9}):
            function(report).savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        drawn[name] = (svg[svg.index("<svg") :], caption)
    return drawn


# -- page ------------------------------------------------------------------------------------------

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
        "FVU of the stream, from clean activations, beside an autoencoder trained at that k, and "
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
    parts.append(
        _table(
            _labelled(report["reconstruction"]),
            {
                "name": "method",
                "k": "k",
                "layer": "layer",
                "fvu_stream": "FVU, stream",
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
