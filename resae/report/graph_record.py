"""A feature graph as JSON, in the keys of circuit-tracer's graph files (its schema_version 1).

Latents are written as its "cross layer transcoder" nodes, errors and streams as its "mlp
reconstruction error", so that its viewer can draw them; what it does not know stands beside: of
nodes `kind`, `hook_point`, `effect`, `incoming`, `intercept`, of links `chain` and `through`. A
layer is a block's number; where two hook points belong to one block, the position among the
selected layers.
"""

from collections.abc import Sequence
from typing import Any

from resae.evaluation.graphs import FeatureGraph, GraphEdge, GraphNode

FEATURE_TYPES = {
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "stream": "mlp reconstruction error",
    "embedding": "embedding",
    "metric": "logit",
}
"""Kind of a node → circuit-tracer's name."""


def shown_nodes(graph: FeatureGraph, edges: Sequence[GraphEdge]) -> list[int]:
    """Nodes that have edges, the metric and all embeddings."""
    connected = {i for edge in edges for i in (edge.source, edge.target)}
    kinds = ("metric", "embedding")
    return [i for i, node in enumerate(graph.nodes) if i in connected or node.kind in kinds]


def describe_node(graph: FeatureGraph, node: GraphNode, label: str) -> str:
    """Name of a node for readers."""
    token = f"{graph.token_texts[node.token]!r} (token {node.token})"
    if node.kind == "metric":
        return label
    if node.kind == "embedding":
        return f"embedding of {token}"
    assert node.layer is not None
    names = {"latent": f"latent {node.latent}", "error": "error", "stream": "stream left alone"}
    return f"{names[node.kind]} of {graph.hook_points[node.layer]} at {token}"


def graph_record(
    graph: FeatureGraph, *, label: str = "metric", max_edges: int = 100
) -> dict[str, Any]:
    """The graph as JSON.

    Args:
        label: name of the metric.
        max_edges: number of edges, the strongest; nodes without any are left out, but for
            embeddings and the metric.
    """
    edges = graph.edges(max_edges)
    rows = _rows(graph)
    ids = [_node_id(graph, node, rows) for node in graph.nodes]
    nodes = []
    shares, incoming, intercept = _influence(graph), graph.incoming, graph.intercept
    for i in shown_nodes(graph, edges):
        node = _node_record(graph, graph.nodes[i], ids[i], label)
        nodes.append(node | {"influence": shares[i]})
        if i < graph.n_targets:
            nodes[-1] |= {"incoming": float(incoming[i]), "intercept": float(intercept[i])}
    return {
        "metadata": {
            "slug": "graph",
            "scan": graph.model,
            "transcoder_list": graph.hook_points,
            "prompt_tokens": graph.token_texts,
            "prompt": "".join(graph.token_texts),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {
                "source": ids[edge.source],
                "target": ids[edge.target],
                "weight": edge.effect,
                "chain": edge.chain,
                "through": edge.through,
            }
            for edge in edges
        ],
    }


def _rows(graph: FeatureGraph) -> list[int]:
    """Numbers of the selected layers in node names."""
    blocks = [int(name.split(".")[1]) for name in graph.hook_points]
    return blocks if len(set(blocks)) == len(blocks) else list(range(len(blocks)))


def _influence(graph: FeatureGraph) -> list[float | None]:
    """Per node the share of all |effect| that it and all stronger ones have; None of the metric."""
    sources = [i for i, node in enumerate(graph.nodes) if node.kind != "metric"]
    sources.sort(key=lambda i: -abs(graph.nodes[i].effect))
    total = sum(abs(graph.nodes[i].effect) for i in sources) or 1.0
    shares: list[float | None] = [None] * len(graph.nodes)
    so_far = 0.0
    for i in sources:
        so_far += abs(graph.nodes[i].effect)
        shares[i] = so_far / total
    return shares


def _node_id(graph: FeatureGraph, node: GraphNode, rows: Sequence[int]) -> str:
    if node.kind == "embedding":
        return f"E_{graph.tokens[node.token]}_{node.token}"
    if node.kind == "metric":
        return f"{rows[-1] + 1}_0_{node.token}"
    assert node.layer is not None
    return f"{rows[node.layer]}_{-1 if node.latent is None else node.latent}_{node.token}"


def _node_record(graph: FeatureGraph, node: GraphNode, node_id: str, label: str) -> dict[str, Any]:
    layer, latent, _ = node_id.split("_")
    feature, group = -1, node.token
    if node.kind == "latent":  # one group of all tokens, and Cantor's number of the pair
        x, y = int(layer), int(latent)
        feature, group = (x + y) * (x + y + 1) // 2 + y, 0
    elif node.kind == "embedding":
        feature = node.token
    elif node.kind == "metric":
        feature = 0
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.token,
        "feature_type": FEATURE_TYPES[node.kind],
        "token_prob": 0.0,
        "is_target_logit": node.kind == "metric",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if node.kind == 'metric' else layer}_{latent}-{group}",
        "clerp": describe_node(graph, node, label),
        "activation": node.value if node.kind == "latent" else None,
        "kind": node.kind,
        "hook_point": None if node.layer is None else graph.hook_points[node.layer],
        "effect": node.effect,
    }
