"""Faithfulness of feature graphs: the predicted against the true change when nodes are ablated.

    python bench/faithfulness.py RUN [RUN …] --out DIR

Per prompt, a held-out row of the embedded corpus, the metric is the logit of the most likely next
token minus the mean logit. The n latents of the graph with the strongest effects are set to 0 at
their tokens, whatever the running code holds. Predicted: by the graph, over all paths through its
nodes with the ablated ones fixed. True: with the errors of the clean pass, as the graph has it, and
in the model itself, where errors respond too (the stream plus the change of x̂). Beside it as many
random latents: for each of the n one of the same layer with the closest act, none of the graph's;
predicted by the sum of their effects. All of it with the denominators of norms frozen, as graphs
are made by default, and by true gradients. Correlation and slope (true = slope · predicted, through
0) over prompts, with 95 % intervals by a bootstrap over prompts. Writes `faithfulness.md`.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ops import commit
from torch import Tensor

from resae import HookedLM, ReSAE, feature_graph, latent_gradients
from resae.data.rows import train_and_held_out
from resae.environment import environment
from resae.evaluation.attribution import left_alone
from resae.evaluation.graphs import FeatureGraph, logit_metric
from resae.evaluation.intervals import Bootstrap, Quantity, interval
from resae.models.hooked import EMBEDDED
from resae.models.norms import frozen_norms
from resae.storage import write_atomically
from resae.training.runs import model_of, open_run

SIZES = (1, 4, 16, 64)
PROMPTS, TOKENS = 50, 32
BATCH = 4
NORMS = ("frozen", "true")
HEADING = (
    "| norms | n | latents | mean abs. predicted | true change | mean abs. true | correlation "
    "| slope |",
    "|---|---|---|---|---|---|---|---|",
)
Place = tuple[int, int, int]
"""Layer, token, latent."""


class Row(NamedTuple):
    """Changes of the metric of one prompt by one set of latents."""

    predicted: float
    errors_fixed: float
    in_model: float


class Model:
    """The model with the errors of a clean pass kept, in which latents are ablated."""

    @torch.no_grad()
    def __init__(self, lm: HookedLM, stack: ReSAE, ids: Tensor, token: int):
        self.lm, self.stack, self.ids, self.metric = lm, stack, ids, logit_metric(token)
        self.points = lm.hook_points(stack.hook_points)
        clean = lm.capture(ids, self.points)
        streams = [clean[point] for point in self.points]
        self.left = left_alone(lm, stack, ids, streams)
        x_hats = stack([x.to(stack.sae(0).b_dec) for x in streams], loop="closed").x_hats
        self.errors = [x - x_hat for x, x_hat in zip(streams, x_hats, strict=True)]
        self.clean = self.value([], errors_fixed=False)

    @torch.no_grad()
    def value(self, ablated: list[Place], *, errors_fixed: bool) -> float:
        chain: list[Tensor] = []

        def at(layer: int, stream: Tensor) -> Tensor:
            sae = self.stack.sae(layer)
            x = stream.to(sae.b_dec)
            prediction = self.stack.predictor(layer, chain)
            acts, indices = sae.encode(x, prediction=prediction)
            unchanged = sae.decode(acts, indices, prediction=prediction)
            edited = acts.clone()
            for _, token, latent in (place for place in ablated if place[0] == layer):
                edited[0, token] = edited[0, token].masked_fill(indices[0, token] == latent, 0)
            chain.append(sae.decode(edited, indices, prediction=prediction))
            error = self.errors[layer] if errors_fixed else x - unchanged
            alone = self.left[layer].unsqueeze(-1)
            return torch.where(alone, x, chain[-1] + error).to(stream)

        with self.lm.hooked({p: partial(at, layer) for layer, p in enumerate(self.points)}):
            logits = self.lm.model(input_ids=self.ids, use_cache=False).logits
        return float(self.metric(logits))

    def row(self, ablated: list[Place], predicted: float) -> Row:
        changes = [self.value(ablated, errors_fixed=fixed) - self.clean for fixed in (True, False)]
        return Row(predicted, *changes)


def matched(graph: FeatureGraph, chosen: list[int], effects: dict[Place, tuple[float, float]]):
    """For each chosen node a latent that is none of the graph's: of its layer, not yet taken, with
    the closest act."""
    free = set(effects) - {place_of(graph, i) for i in range(graph.n_targets - 1)}
    found = []
    for i in chosen:
        node = graph.nodes[i]
        others = [place for place in free if place[0] == node.layer]
        if not others:
            continue
        closest = min(others, key=lambda place: abs(effects[place][0] - (node.value or 0)))  # noqa: B023
        free.remove(closest)
        found.append(closest)
    return found


def place_of(graph: FeatureGraph, i: int) -> Place:
    node = graph.nodes[i]
    assert node.layer is not None
    assert node.latent is not None
    return node.layer, node.token, node.latent


def measure(
    lm: HookedLM, stack: ReSAE, ids: Tensor, *, freeze_norms: bool
) -> dict[tuple[int, str], Row]:
    """Per number of nodes and choice of them, the changes of one prompt."""
    token = int(lm.logits(ids)[0, -1].argmax())
    metric = logit_metric(token)
    model = Model(lm, stack, ids, token)
    graph = feature_graph(
        lm, stack, ids, metric, max_nodes=max(SIZES), freeze_norms=freeze_norms, batch=BATCH
    )
    with frozen_norms(lm.model) if freeze_norms else nullcontext():
        of_layers = latent_gradients(lm, stack, ids, metric)
    effects: dict[Place, tuple[float, float]] = {}
    for layer, of_layer in enumerate(of_layers):
        acts, indices = (part[0] for part in of_layer.code)
        usable = (acts > 0) & ~model.left[layer][0].unsqueeze(-1)
        for t, slot in usable.nonzero().tolist():
            place = (layer, t, int(indices[t, slot]))
            effects[place] = float(acts[t, slot]), float(of_layer.attribution[0, t, slot])
    order = sorted(range(graph.n_targets - 1), key=lambda i: -abs(graph.nodes[i].effect))
    rows = {}
    for n in SIZES:
        chosen = order[:n]
        places = [place_of(graph, i) for i in chosen]
        rows[n, "strongest"] = model.row(places, graph.predicted_change(chosen))
        places = matched(graph, chosen, effects)
        rows[n, "random"] = model.row(places, -sum(effects[place][1] for place in places))
    return rows


def fit(bootstrap: Bootstrap, predicted: list[float], true: list[float]) -> str:
    """Cells of correlation and slope."""
    p, t = np.array(predicted), np.array(true)

    def mean(values: np.ndarray) -> Quantity:
        return bootstrap.per_token(values.tolist(), [1] * len(values))

    covariance = mean(p * t) - mean(p) * mean(t)
    spread = (mean(p * p) - mean(p) ** 2) * (mean(t * t) - mean(t) ** 2)
    correlation, slope = covariance / np.sqrt(spread), mean(p * t) / mean(p * p)
    return f"{interval(correlation)} | {interval(slope)}"


def table(rows: list[dict[tuple[int, str], Row]], norms: str) -> list[str]:
    """Lines of the table, without its heading."""
    bootstrap = Bootstrap(len(rows))
    lines = []
    for n, choice in product(SIZES, ("strongest", "random")):
        of = [row[n, choice] for row in rows]
        predicted = [row.predicted for row in of]
        ones = [1] * len(of)
        of_predicted = interval(bootstrap.per_token([abs(p) for p in predicted], ones))
        for truth, name in (("errors_fixed", "errors fixed"), ("in_model", "in the model")):
            true = [getattr(row, truth) for row in of]
            size = interval(bootstrap.per_token([abs(t) for t in true], ones))
            cells = f"{of_predicted} | {name} | {size} | {fit(bootstrap, predicted, true)}"
            lines.append(f"| {norms} | {n} | {choice} | {cells} |")
    return lines


def _section(
    name: str, stack: ReSAE, tokens: int, rows: dict[str, list[dict[tuple[int, str], Row]]]
) -> list[str]:
    """Lines of one stack."""
    k = [stack.sae(layer).config.k for layer in range(stack.n_layers)]
    lines = ["", f"## {name}: D = {stack.d_in}, k = {k}", ""]
    prompts = len(next(iter(rows.values())))
    lines += [f"{', '.join(stack.hook_points)}; {prompts} prompts of {tokens} tokens", "", *HEADING]
    for norms, of in rows.items():
        lines += table(of, norms)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a stack")
    parser.add_argument("--model", help="another path of the model")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each prompt")
    parser.add_argument("--norms", default=",".join(NORMS), help="frozen, true, or both")
    parser.add_argument("--out", type=Path, required=True, help="directory of the result")
    options = parser.parse_args()
    asked = options.norms.split(",")
    facts = environment() | {"commit": commit()}
    lines = ["# Faithfulness of feature graphs", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    for run in options.runs:
        record, stack = open_run(run, "cpu")
        lm = HookedLM.from_pretrained(model_of(record, stack, options.model)[0])
        _, held_out = train_and_held_out(
            EMBEDDED, lm, context_tokens=options.tokens, held_out_rows=options.prompts, seed=0
        )
        began, rows = time.perf_counter(), {name: [] for name in asked}
        section: list[str] = []
        for done, ids in enumerate(held_out.batches(1), start=1):
            for name, of in rows.items():
                of.append(measure(lm, stack, ids, freeze_norms=name == "frozen"))
            print(f"{done} of {options.prompts}, {time.perf_counter() - began:.0f} s", flush=True)
            if done % 10 == 0 or done == options.prompts:
                section = _section(run.name, stack, options.tokens, rows)
                text = "\n".join([*lines, *section]) + "\n"
                write_atomically(
                    options.out / "faithfulness.md", lambda to, text=text: to.write_text(text)
                )
        lines += section
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
