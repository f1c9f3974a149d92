import json
import re
from xml.etree import ElementTree

import pytest
import tiny
import torch

from resae import feature_graph
from resae.cli import main
from resae.evaluation.graphs import logit_metric
from resae.report.graph_page import write_graph
from resae.report.graph_record import graph_record

LABEL = "logit of '<b>&' − the mean logit"


@pytest.fixture(scope="module")
def graph():
    lm = tiny.pythia()
    ids = tiny.ids(1, 6)
    ids[0, 0] = lm.special_ids[0]
    return feature_graph(lm, tiny.stack(lm), ids, logit_metric(5), max_nodes=12)


def test_the_record_has_the_keys_and_names_of_circuit_tracer(graph):
    record = graph_record(graph, label=LABEL, max_edges=20)
    assert record.keys() == {"metadata", "qParams", "nodes", "links"}
    names = {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold"}
    assert record["metadata"].keys() == names | {"schema_version"}
    nodes = {node["node_id"]: node for node in record["nodes"]}
    assert len(nodes) == len(record["nodes"]) == len({n["jsNodeId"] for n in nodes.values()})
    edges = graph.edges(20)
    assert len(edges) == len(record["links"]) == 20
    for link, edge in zip(record["links"], edges, strict=True):
        assert (link["weight"], link["chain"]) == (edge.effect, edge.chain)
        source, target = nodes[link["source"]], nodes[link["target"]]
        assert source["effect"] == graph.nodes[edge.source].effect
        assert target["ctx_idx"] == graph.nodes[edge.target].token >= source["ctx_idx"]
    blocks = {0: "0", 1: "1", 2: "3"}
    latent = next(i for i, node in enumerate(graph.nodes) if node.layer == 2)
    found = graph.nodes[latent]
    node = nodes[f"3_{found.latent}_{found.token}"]
    assert (node["layer"], node["feature_type"]) == (blocks[2], "cross layer transcoder")
    assert node["feature"] == (3 + found.latent) * (4 + found.latent) // 2 + found.latent
    assert node["activation"] == pytest.approx(node["incoming"] + node["intercept"], rel=1e-4)
    assert {n["feature_type"] for n in nodes.values()} == {
        *("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
    }
    metric = nodes["4_0_5"]
    assert metric["is_target_logit"]
    assert metric["clerp"] == LABEL
    assert metric["influence"] is None
    shares = [n["influence"] for n in nodes.values() if n["influence"] is not None]
    assert 0 < min(shares) < max(shares) <= 1 + 1e-9
    json.dumps(record, allow_nan=False)


def test_hook_points_of_one_block_keep_their_nodes_apart():
    lm = tiny.llama()
    layers = ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post")
    graph = feature_graph(lm, tiny.stack(lm, layers=layers), tiny.ids(1, 4), logit_metric(5))
    ids = [node["node_id"] for node in graph_record(graph)["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {i.split("_")[0] for i in ids} == {"E", "0", "1", "2"}


def test_the_page_shows_every_node_and_edge_with_text_escaped(graph, tmp_path):
    record, page = write_graph(graph, tmp_path / "new", label=LABEL, max_edges=20)
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "src=" not in text
    assert "href=" not in text
    picture = ElementTree.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL)[0])
    svg = "{http://www.w3.org/2000/svg}"
    nodes = json.loads(record.read_text())["nodes"]
    assert len(picture.findall(f"{svg}g")) == len(nodes)
    lines = [p for p in picture.findall(f"{svg}path") if p.find(f"{svg}title") is not None]
    assert len(lines) == 20
    assert {p.get("stroke-dasharray") for p in lines} == {"none", "5 4"}
    shown = {element.text for element in picture.iter(f"{svg}text")}
    assert {str(n.latent) for n in graph.nodes if n.kind == "latent"} & shown
    assert {"block 0", "block 3", "embeddings", LABEL} <= shown
    width, height = (int(picture.get(name)) for name in ("width", "height"))
    for circle in picture.iter(f"{svg}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height


def test_a_prompt_of_special_tokens_alone_has_no_latents(tmp_path):
    lm = tiny.pythia()
    ids = torch.full((1, 2), lm.special_ids[0])
    graph = feature_graph(lm, tiny.stack(lm), ids, logit_metric(5))
    assert {graph.nodes[edge.source].kind for edge in graph.edges()} == {"stream"}
    write_graph(graph, tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from resae import HookedLM

    folder = tmp_path_factory.mktemp("run")
    lm = HookedLM.from_pretrained("embedded")
    tiny.stack(lm, layers=(1, 3)).save_pretrained(folder)
    return folder


def test_the_command_writes_both_files(run, tmp_path, capsys):
    asked = ["graph", str(run), "--prompt", "The cat", "--max-nodes", "6", "--device", "cpu"]
    assert main([*asked, "--target", " the", "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.split()[-2:] == [
        str(tmp_path / "a" / name) for name in ("graph.json", "graph.html")
    ]
    record = json.loads((tmp_path / "a" / "graph.json").read_text())
    assert record["metadata"]["prompt"].endswith("The cat")
    assert any(node["clerp"] == "logit of ' the' − the mean logit" for node in record["nodes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "the cat sat"], "tokens ("),
        (["--target", ""], "--target"),
        (["--max-edges", "0"], "max-edges"),
        (["--out", "FILE/x"], "expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, options, message):
    (tmp_path / "file").write_text("")
    options = [o.replace("FILE", str(tmp_path / "file")) for o in options]
    try:
        code = main(["graph", str(run), "--prompt", "The cat", *options])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, message in error) == (2, True), error
    assert not (run / "graph").exists()


def test_a_metric_of_a_token_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no token 9 in a vocabulary of 7"):
        logit_metric(2, against=9)(torch.zeros(1, 3, 7))
