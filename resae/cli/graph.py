"""Draw the direct effects between latents that lead to a prediction."""

from dataclasses import dataclass
from typing import Annotated

from resae.arguments import filled, whole
from resae.cli.terminal import TerminalConsole
from resae.data.config import Machine
from resae.settings import Shown

EPILOG = (
    "The graph is of the replaced model with its errors kept constant, in closed loop: which "
    "latents of earlier layers, errors and embeddings the strongest latents are made of."
)


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """Graph."""

    run_directory: Annotated[str, filled, Shown("RUN", positional=True)]
    """A run directory, or a stack on the hub, owner/name or owner/name@revision."""
    prompt: Annotated[str, filled]
    """Text whose next token is explained."""
    target: Annotated[str | None, filled, Shown("TOKEN")] = None
    """Next token whose logit is the metric; None: the most likely one."""
    against: Annotated[str | None, filled, Shown("TOKEN")] = None
    """Token whose logit is subtracted; None: the mean of all logits is."""
    max_nodes: Annotated[int, whole(1)] = 64
    """Number of latents, those with the strongest effect on the metric."""
    max_edges: Annotated[int, whole(1)] = 100
    """Number of edges, those along which most effect passes."""
    true_gradients: bool = False
    """Take gradients through the denominators of norms too, which by default are constants."""
    out: Annotated[str | None, filled] = None
    """Folder for graph.json and graph.html; None: RUN/graph."""
    model: Annotated[str | None, filled] = None
    """Another path of the same model."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: the commit that the run was trained
    on."""


def run(options: Options, console: TerminalConsole) -> int:
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.environment import describe_device, find_device
    from resae.evaluation.graphs import feature_graph, logit_metric
    from resae.models.hooked import HookedLM
    from resae.replacements.generation import prompt_ids, token_id
    from resae.report.graph_page import write_graph
    from resae.storage import require_writable
    from resae.training.pipeline import load_model
    from resae.training.runs import folder_beside, model_of, open_run

    device = find_device(options.device)
    console.log(f"device: {describe_device(device)}")
    folder = folder_beside(options.run_directory, options.out, "graph")
    record, stack = open_run(options.run_directory, device)
    require_writable(folder)
    quiet_libraries()
    name, revision = model_of(record, stack, options.model, options.revision)
    shapes = HookedLM.described(name, tokenizer=True, revision=revision)
    stack.require_model(shapes)
    ids = torch.tensor([prompt_ids(shapes, options.prompt, 1)], device=device)
    target, against = (
        None if text is None else token_id(shapes, text)
        for text in (options.target, options.against)
    )
    lm = load_model(name, options.dtype, device, revision)
    if target is None:
        target = int(lm.logits(ids)[0, -1].argmax())
    other = "the mean logit" if against is None else f"that of {lm.tokenizer.decode([against])!r}"
    label = f"logit of {lm.tokenizer.decode([target])!r} − {other}"
    graph = feature_graph(
        lm,
        stack,
        ids,
        logit_metric(target, against),
        max_nodes=options.max_nodes,
        freeze_norms=not options.true_gradients,
    )
    errors = sum(abs(node.effect) for node in graph.nodes if node.kind == "error")
    latents = sum(abs(node.effect) for node in graph.nodes if node.kind == "latent")
    console.log(
        f"{label} = {graph.nodes[graph.n_targets - 1].value:.3f}; {graph.n_targets - 1} latents "
        f"with summed |effect| {latents:.3f}, errors with {errors:.3f}"
    )
    for path in write_graph(graph, folder, label=label, max_edges=options.max_edges):
        console.result(str(path))
    return 0
