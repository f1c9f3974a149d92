"""A feature graph as one self-contained page: a picture, and tables of nodes and edges."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from resae.evaluation.graphs import FeatureGraph, GraphEdge, GraphNode
from resae.report.graph_record import describe_node, graph_record, shown_nodes
from resae.report.page import page_style
from resae.storage import require_writable, save_json, write_atomically

NODE, ROW, TOP, MARGIN = 50, 190, 30, 100
STACKED = 4
"""Width of a node with its number, height of a layer, height of the middle of the first row, and
width of the names of layers, in px; nodes of one layer and token that are stacked."""
LONGEST_WORD = 16
TABLE_ROWS = 40
"""Rows of the tables of nodes and of edges."""


def write_graph(
    graph: FeatureGraph, folder: str | Path, *, label: str = "metric", max_edges: int = 100
) -> tuple[Path, Path]:
    """Write `graph.json` (`graph_record`) and `graph.html` into a folder; returns their paths.

    Args:
        label: name of the metric.
        max_edges: number of edges, the strongest; nodes without any are left out, but for
            embeddings and the metric.

    Raises:
        OSError: the folder cannot be written into.
    """
    folder = Path(folder)
    require_writable(folder)
    record, page = folder / "graph.json", folder / "graph.html"
    text = graph_page(graph, label=label, max_edges=max_edges)
    save_json(record, graph_record(graph, label=label, max_edges=max_edges))
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return record, page


def graph_page(graph: FeatureGraph, *, label: str = "metric", max_edges: int = 100) -> str:
    """The page of `write_graph`."""
    edges = graph.edges(max_edges)
    value = graph.nodes[graph.n_targets - 1].value
    title = f"Feature graph of {graph.model}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{page_style()}
figure svg {{ max-width: none; color: var(--ink) }}
svg text {{ font-size: 11px; fill: var(--ink); paint-order: stroke; stroke: var(--ground);
  stroke-width: 3px }}
tbody th:first-child {{ white-space: nowrap; max-width: none }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Prompt: <q>{html.escape("".join(graph.token_texts))}</q></p>
<p>Metric: {html.escape(label)} = {value:.4f}. Layers replaced online in closed loop, errors kept
constant.</p>
<figure><div class="wide">{_picture(graph, edges, label)}</div>
<figcaption>Direct effects: the {len(edges)} edges along which most effect on the metric passes.
Wider: more of it; dashed: negative. Circles: latents by their number, more filled for
more effect on the metric over all paths. Squares: reconstruction errors. Triangles: streams of
tokens that are left alone. Point at a node or an edge for its numbers.</figcaption></figure>
<h2>Nodes</h2>
<p class="note">Effect: first-order change of the metric if the node were removed, with the opposite
sign, over all paths. Value = incoming + intercept: incoming is the sum of all direct effects on
the node, those of latents that are not drawn included; the intercept holds biases and what the
linearisation leaves out.</p>
{_node_table(graph, label)}
<h2>Edges</h2>
<p class="note">Effect: part of the target's value, to first order. Through the maps: part of it
that arrives through the prediction from earlier layers; the rest passes through the model.</p>
{_edge_table(graph, edges, label)}
</body></html>
"""


def _tag(name: str, *content: str, **attributes: object) -> str:
    """An element of markup; `_` in names of attributes is `-`. Content is markup, values are
    not."""
    shown = "".join(
        f' {key.replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{shown}>{''.join(content)}</{name}>"


def _text(x: float, y: float, text: str, **attributes: object) -> str:
    return _tag("text", html.escape(text), x=round(x, 1), y=round(y, 1), **attributes)


def _picture(graph: FeatureGraph, edges: Sequence[GraphEdge], label: str) -> str:
    shown = shown_nodes(graph, edges)
    places, width = _places(graph, shown)
    L = len(graph.hook_points)
    height = _height(-1, L) + 40
    parts = []
    for layer, name in [*enumerate(graph.hook_points), (-1, "embeddings")]:
        y = _height(layer, L)
        place = name.removesuffix(".hook_resid_post").replace(".hook_", " ")
        parts.append(_text(4, y + 4, place.replace("blocks.", "block ")))
        parts.append(_tag("path", d=f"M{MARGIN} {y}H{width}", stroke="var(--rule)"))
    most = max((abs(edge.through) for edge in edges), default=0.0)
    parts += [_line(graph, edge, places, label, most) for edge in reversed(edges)]
    latents = (abs(node.effect) for node in graph.nodes if node.kind == "latent")
    strongest = max(latents, default=0.0)
    parts += [_mark(graph, graph.nodes[i], places[i], label, strongest) for i in shown]
    return _tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label="Feature graph",
    )


def _height(layer: int, L: int) -> int:
    """Middle of a row: of a selected layer, -1 of the embeddings, L of the metric."""
    return TOP + ROW * (L - layer) - (ROW // 2 if layer < L else 0)


def _places(graph: FeatureGraph, shown: Sequence[int]) -> tuple[dict[int, tuple[int, int]], int]:
    """Centres of the nodes, a column per token, and the width of the picture."""
    L = len(graph.hook_points)
    cells: dict[int, dict[int, list[int]]] = {}
    for i in shown:
        node = graph.nodes[i]
        row = {"embedding": -1, "metric": L}.get(node.kind, node.layer)
        assert row is not None
        cells.setdefault(node.token, {}).setdefault(row, []).append(i)
    places, left = {}, MARGIN
    for token, rows in sorted(cells.items()):
        columns = max(-(-len(nodes) // STACKED) for nodes in rows.values())
        wide = max(NODE * columns, 7 * len(_word(graph, token)) + 10)
        for row, nodes in rows.items():
            columns = -(-len(nodes) // STACKED)
            for place, i in enumerate(nodes):
                column, above = divmod(place, STACKED)
                in_column = min(STACKED, len(nodes) - column * STACKED)
                x = left + wide / 2 + NODE * (column + 0.5 - columns / 2)
                if graph.nodes[i].kind == "latent":
                    x -= NODE / 4  # its number stands on its right
                places[i] = (round(x), _height(row, L) + 26 * above - 13 * (in_column - 1))
        left += wide
    return places, left + 10


def _word(graph: FeatureGraph, token: int) -> str:
    text = repr(graph.token_texts[token])
    return text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 1]}…"


def _line(
    graph: FeatureGraph,
    edge: GraphEdge,
    places: Mapping[int, tuple[int, int]],
    label: str,
    most: float,
) -> str:
    (x, y), (x2, y2) = places[edge.source], places[edge.target]
    middle = (y + y2) / 2
    ends = _ends(graph, edge, label)
    tip = f"{ends}: effect {edge.effect:.4g}, through the maps {edge.chain:.4g}"
    return _tag(
        "path",
        _tag("title", html.escape(tip)),
        d=f"M{x} {y}C{x} {middle} {x2} {middle} {x2} {y2}",
        fill="none",
        stroke="currentColor",
        stroke_opacity=0.5,
        stroke_width=round(0.6 + 4.4 * abs(edge.through) / most, 2),
        stroke_dasharray="5 4" if edge.through < 0 else "none",
    )


def _ends(graph: FeatureGraph, edge: GraphEdge, label: str) -> str:
    nodes = (graph.nodes[i] for i in (edge.source, edge.target))
    return " → ".join(describe_node(graph, node, label) for node in nodes)


def _mark(
    graph: FeatureGraph, node: GraphNode, place: tuple[int, int], label: str, strongest: float
) -> str:
    """A node: shape, number or text, and a tooltip."""
    x, y = place
    value = "" if node.value is None else f", value {node.value:.4g}"
    tip = f"{describe_node(graph, node, label)}: effect {node.effect:.4g}{value}"
    outline = {"fill": "var(--ground)", "stroke": "currentColor"}
    text = ""
    if node.kind == "latent":
        shade = round(0.8 * abs(node.effect) / (strongest or 1), 3)
        shape = _tag("circle", cx=x, cy=y, r=8, **outline)
        shape += _tag("circle", cx=x, cy=y, r=8, fill="currentColor", fill_opacity=shade)
        text = _text(x + 10, y + 4, str(node.latent))
    elif node.kind == "metric":
        shape = _tag("circle", cx=x, cy=y, r=9, stroke_width=3, **outline)
        text = _text(x - 16, y + 4, label, text_anchor="end")
    elif node.kind == "embedding":
        shape = _tag("circle", cx=x, cy=y, r=3, **outline)
        text = _text(x, y + 19, _word(graph, node.token), text_anchor="middle")
    elif node.kind == "error":
        shape = _tag("rect", x=x - 6, y=y - 6, width=12, height=12, **outline)
    else:
        shape = _tag("path", d=f"M{x - 7} {y + 6}h14l-7-13z", **outline)
    return _tag("g", _tag("title", html.escape(tip)), shape, text)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = _tag("tr", *(_tag("th", html.escape(text), scope="col") for text in headings))
    body = [
        _tag(
            "tr",
            _tag("th", html.escape(name), scope="row"),
            *(_tag("td", html.escape(text)) for text in cells),
        )
        for name, *cells in rows
    ]
    table = _tag("table", _tag("thead", head), _tag("tbody", *body))
    return _tag("div", table, **{"class": "wide"})


def _node_table(graph: FeatureGraph, label: str) -> str:
    incoming, intercept = graph.incoming.tolist(), graph.intercept.tolist()
    order = sorted(range(len(graph.nodes)), key=lambda i: -abs(graph.nodes[i].effect))
    rows = []
    for i in order[:TABLE_ROWS]:
        node, sums = graph.nodes[i], ["–"] * 3
        if node.value is not None:
            sums = [f"{number:.4f}" for number in (node.value, incoming[i], intercept[i])]
        rows.append([describe_node(graph, node, label), f"{node.effect:+.4f}", *sums])
    return _table(["node", "effect on the metric", "value", "incoming", "intercept"], rows)


def _edge_table(graph: FeatureGraph, edges: Sequence[GraphEdge], label: str) -> str:
    rows = []
    for edge in edges[:TABLE_ROWS]:
        rows.append([_ends(graph, edge, label), *(f"{number:+.4f}" for number in edge[2:])])
    return _table(["edge", "effect", "through the maps", "effect on the metric along it"], rows)
