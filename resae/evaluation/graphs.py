"""Direct effects between latents of selected layers: a graph that ends in a metric of the logits.

The model is written as in `resae.evaluation.attribution`: at every selected layer the stream is
x̂_l + e_l, the errors e_l constant, in closed loop. A direct effect reaches a later latent without
passing another latent:

    act_j = ⟨E_j, F(x̂_{m-1} + e_{m-1}) − pred_m(x̂_{<m})⟩ + b    F: the blocks between the layers
    effect i → j = act_i · (⟨E_j, J_F d_i⟩ − W_dec_i A_{l+1} … A_m · E_j)    E_j: encoder row

J_F is the Jacobian of the blocks at the activations as they are; only the denominators of norms are
constants in it, on request not even these. d_i is the direction W_dec_i A_{l+1} … A_{m-1} of latent
i in x̂_{m-1}. The second term is the part through the affine chain. Effects add up: act_j is the
sum of all that arrive plus an intercept, which holds biases and what the linearisation leaves out.
(After attribution graphs, Ameisen et al. 2025, which freeze attention patterns too.)
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resae.evaluation.attribution import left_alone, scalar_metric
from resae.models.hooked import HookedLM
from resae.models.norms import frozen_norms
from resae.stack.stack import ReSAE
from resae_kernels import SparseCode


class GraphNode(NamedTuple):
    """A node; the token is a position in the prompt."""

    kind: str
    """`latent`; `metric`; `error`, of the reconstruction at one layer and token; `stream`, all of
    the stream of a token that is left alone there; `embedding`, the stream that the first block
    reads."""
    layer: int | None
    """Position among the selected layers; None for the metric and embeddings."""
    token: int
    latent: int | None
    value: float | None
    """Act of a latent, value of the metric; None: a vector."""
    effect: float
    """First-order effect on the metric over all paths, also through latents that are no nodes;
    of the metric its value."""


class GraphEdge(NamedTuple):
    """A direct effect between two nodes, by their positions."""

    source: int
    target: int
    effect: float
    """Part of the target's value, to first order."""
    chain: float
    """Part of `effect` through the affine maps; the rest passes through the model."""
    through: float
    """Effect on the metric that passes along this edge."""


@dataclass(frozen=True)
class FeatureGraph:
    """Nodes and direct effects: first the latents, by layer, then the metric, and then nodes that
    nothing has an effect on. Targets are the latents and the metric."""

    model: str
    hook_points: list[str]
    tokens: list[int]
    """Token ids of the prompt, T."""
    token_texts: list[str]
    """The same as text; as numbers, of a model without tokenizer."""
    nodes: list[GraphNode]
    effects: Tensor
    """`[targets, nodes]`, in units of the target's value."""
    chain: Tensor
    """`[targets, nodes]`, part of `effects` through the affine maps."""
    other_latents: Tensor
    """`[targets]`, sum of the effects of active latents that are no nodes."""

    @property
    def n_targets(self) -> int:
        return len(self.effects)

    @property
    def incoming(self) -> Tensor:
        """`[targets]`, sum of the effects of all latents, errors and embeddings on each."""
        return self.effects.sum(1) + self.other_latents

    @property
    def intercept(self) -> Tensor:
        """`[targets]`, values without `incoming`: biases, and what the linearisation leaves out."""
        return self._values() - self.incoming

    def _values(self) -> Tensor:
        return self.effects.new_tensor([node.value or 0.0 for node in self.nodes[: self.n_targets]])

    def gradients(self) -> Tensor:
        """`[targets]`, of the metric with respect to each value, over all paths."""
        effects = self.effects.new_tensor([node.effect for node in self.nodes[: self.n_targets]])
        gradients = effects / self._values().where(effects != 0, 1)
        gradients[-1] = 1
        return gradients

    def edges(self, most: int | None = None) -> list[GraphEdge]:
        """The edges along which the most effect on the metric passes, strongest first.

        Args:
            most: number of edges; None: all that are not 0.
        """
        through = self.effects * self.gradients().unsqueeze(1)
        strength = through.abs().flatten()
        n = int(strength.count_nonzero())
        order = strength.argsort(descending=True, stable=True)[
            : n if most is None else min(n, most)
        ]
        targets, sources = order // len(self.nodes), order % len(self.nodes)
        parts = (
            sources,
            targets,
            *(m[targets, sources] for m in (self.effects, self.chain, through)),
        )
        return [GraphEdge(*row) for row in zip(*(part.tolist() for part in parts), strict=True)]

    def predicted_change(self, latents: Sequence[int]) -> float:
        """First-order change of the metric if latents were ablated at their tokens: over all paths
        through nodes of the graph, errors constant.

        Args:
            latents: positions of latents in `nodes`.
        """
        n = self.n_targets
        values = self._values()
        gradients = self.effects[:, :n] / values.where(values != 0, 1)
        ablated = torch.zeros(n, dtype=torch.bool, device=values.device)
        ablated[list(latents)] = True
        # Solve changes = gradients @ changes, strictly lower triangular, with the ablated ones set.
        gradients = gradients.masked_fill(ablated.unsqueeze(1), 0)
        given = torch.where(ablated, -values, 0).unsqueeze(1)
        system = torch.eye(n, dtype=values.dtype, device=values.device) - gradients
        changes = torch.linalg.solve_triangular(system, given, upper=False)
        return float(changes[n - 1])


def logit_metric(token: int, against: int | None = None) -> Callable[[Tensor], Tensor]:
    """Metric: the logit of a token as the next one, minus that of another or the mean of all.

    Args:
        token, against: token ids.

    Raises:
        ValueError: by the metric, for a token that the vocabulary does not have.
    """

    def metric(logits: Tensor) -> Tensor:
        last = logits[0, -1]
        if unknown := [t for t in (token, against) if t is not None and not 0 <= t < len(last)]:
            raise ValueError(
                f"logit_metric: no token {unknown[0]} in a vocabulary of {len(last):,}"
            )
        return last[token] - (last.mean() if against is None else last[against])

    return metric


def feature_graph(
    lm: HookedLM,
    stack: ReSAE,
    input_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    max_nodes: int | None = 64,
    freeze_norms: bool = True,
    batch: int = 16,
) -> FeatureGraph:
    """Direct effects between the latents with the strongest effect on `metric(logits)`, and of all
    errors and embeddings on them.

    A row of a batch of `batch` copies of the prompt serves one target at a time: a graph costs
    about `max_nodes` backward passes between two selected layers.

    Args:
        input_ids: `[1, T]`, one prompt.
        metric: logits `[1, T, V]` → scalar, for example a difference of two logits.
        max_nodes: number of latents; None: all that are active.
        freeze_norms: whether gradients take the denominators of norms for constants
            (`resae.models.norms`). False: true gradients, products of which along all paths are
            those of `latent_gradients`.
        batch: number of targets per backward pass.

    Raises:
        TypeError: a metric that is no scalar tensor.
        ValueError: several prompts, another model's stack, or numbers below 1.
    """
    for name, value in (("max_nodes", max_nodes), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"feature_graph: {name}={value}, expected at least 1")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(
            f"feature_graph: input_ids of shape {list(input_ids.shape)}, expected one prompt [1, T]"
        )
    stack.require_model(lm)
    input_ids = input_ids.to(lm.device)
    lm.require_context(input_ids.shape[1])
    norms = frozen_norms(lm.model) if freeze_norms else nullcontext()
    with torch.enable_grad(), norms:
        value, streams, gradient = _metric_gradient(lm, stack, input_ids, metric)
        left = left_alone(lm, stack, input_ids, streams)
        batch = batch if max_nodes is None else min(batch, max_nodes)
        copies = input_ids.expand(batch, -1)
        latents, others = _nodes_of(
            _run(lm, stack, copies, left, cut=False), left, gradient, max_nodes
        )
        direct = _run(lm, stack, copies, left, cut=True)
        effects = _Effects(direct, latents, batch)
        effects.add_metric(gradient)
    metric_node = GraphNode("metric", None, input_ids.shape[1] - 1, None, value, value)
    tokens = input_ids[0].tolist()
    return FeatureGraph(
        model=lm.name,
        hook_points=list(stack.hook_points),
        tokens=tokens,
        token_texts=[lm.tokenizer.decode([t]) if lm.tokenizer else str(t) for t in tokens],
        nodes=[*(node for node, _ in latents), metric_node, *others],
        effects=torch.cat(effects.rows),
        chain=torch.cat(effects.chain),
        other_latents=torch.cat(effects.other_latents),
    )


def _metric_gradient(
    lm: HookedLM, stack: ReSAE, input_ids: Tensor, metric: Callable[[Tensor], Tensor]
) -> tuple[float, list[Tensor], Tensor]:
    """Value of the metric, the streams `[1, T, D]` of all selected layers, and the gradient with
    respect to the last."""
    streams: list[Tensor] = []

    def keep(stream: Tensor) -> Tensor:
        streams.append(stream.detach().requires_grad_())
        return streams[-1]

    with lm.hooked(dict.fromkeys(lm.hook_points(stack.hook_points), keep)):
        logits = lm.model(input_ids=input_ids, use_cache=False).logits
    value = scalar_metric(metric, logits, "feature_graph")
    (gradient,) = torch.autograd.grad(value, streams[-1:], materialize_grads=True)
    return value.item(), [stream.detach() for stream in streams], gradient


@dataclass
class _Pass:
    """Tensors of a pass over `[B, T]` tokens, per selected layer."""

    first: list[Tensor] = field(default_factory=list)
    """One `[B, T, D]`, the stream that the first block reads; a leaf."""
    codes: list[SparseCode] = field(default_factory=list)
    """Codes as encoded."""
    acts: list[Tensor] = field(default_factory=list)
    """Acts as decoded: those of `codes`, or leaves of the same values."""
    errors: list[Tensor] = field(default_factory=list)
    """`[B, T, D]`, leaves: stream − x̂; all of the stream at tokens that are left alone."""
    predictions: list[Tensor | None] = field(default_factory=list)
    x_hats: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)
    """`[B, T, D]`, as they continue."""


class _Ended(Exception):
    """Raised at the last selected layer: no later block is needed."""


def _run(
    lm: HookedLM, stack: ReSAE, input_ids: Tensor, left: Sequence[Tensor], *, cut: bool
) -> _Pass:
    """A pass up to the last selected layer, in which errors are constants.

    Args:
        left: per layer `[1, T]` bool, tokens that are left alone.
        cut: whether acts are constants too, so that gradients are those of direct effects.
    """
    points = lm.hook_points(stack.hook_points)
    kept = _Pass()

    def begin(stream: Tensor) -> Tensor:
        kept.first.append(stream.detach().requires_grad_())
        return kept.first[0]

    def at(layer: int, stream: Tensor) -> Tensor:
        sae = stack.sae(layer)
        x = stream.to(sae.b_dec)
        prediction = stack.predictor(layer, kept.x_hats)
        code = sae.encode(x, prediction=prediction)
        acts = code.acts.detach().requires_grad_() if cut else code.acts
        x_hat = sae.decode(acts, code.indices, prediction=prediction)
        written = x_hat.masked_fill(left[layer].to(x.device).unsqueeze(-1), 0)
        error = (x - written).detach().requires_grad_()
        kept.codes.append(code)
        kept.acts.append(acts)
        kept.errors.append(error)
        kept.predictions.append(prediction)
        kept.x_hats.append(x_hat)
        kept.streams.append((written + error).to(stream))
        if layer == len(points) - 1:
            raise _Ended
        return kept.streams[-1]

    start = lm.hook_point("blocks.0.hook_resid_pre")
    try:
        with (
            lm.hooked({start: begin}),
            lm.hooked({point: partial(at, layer) for layer, point in enumerate(points)}),
        ):
            lm.model(input_ids=input_ids, use_cache=False)
    except _Ended:
        pass
    return kept


def _nodes_of(
    whole: _Pass, left: Sequence[Tensor], gradient: Tensor, max_nodes: int | None
) -> tuple[list[tuple[GraphNode, int]], list[GraphNode]]:
    """The latents with the strongest effects, in the order of layers and tokens, each with its slot
    in the code; and the nodes of errors and embeddings."""
    leaves = [*whole.acts, *whole.errors, *whole.first]
    last = whole.streams[-1][:1]
    found = torch.autograd.grad(last, leaves, gradient.to(last), materialize_grads=True)
    effects = [(leaf[0] * g[0]).detach() for leaf, g in zip(leaves, found, strict=True)]
    L = len(whole.acts)
    latents = []
    for layer, effect in enumerate(effects[:L]):
        acts, indices = (part[0].detach() for part in whole.codes[layer])
        usable = (acts > 0) & ~left[layer][0].to(acts.device).unsqueeze(-1)
        for token, slot in usable.nonzero().tolist():
            latent, act = int(indices[token, slot]), float(acts[token, slot])
            node = GraphNode("latent", layer, token, latent, act, float(effect[token, slot]))
            latents.append((node, slot))
    latents.sort(key=lambda pair: -abs(pair[0].effect))
    latents = sorted(latents[:max_nodes], key=lambda pair: pair[0][1:4])
    others = []
    for layer, effect in enumerate(effects[L : 2 * L]):
        alone = left[layer][0].tolist()
        for token, total in enumerate(effect.sum(-1).tolist()):
            kind = "stream" if alone[token] else "error"
            others.append(GraphNode(kind, layer, token, None, None, total))
    for token, total in enumerate(effects[-1].sum(-1).tolist()):
        others.append(GraphNode("embedding", None, token, None, None, total))
    return latents, others


class _Effects:
    """Rows of a graph's matrices, by the gradients of a pass whose acts are constants."""

    def __init__(self, direct: _Pass, latents: Sequence[tuple[GraphNode, int]], batch: int):
        self._direct = direct
        self._n_tokens = direct.first[0].shape[1]
        self._n_latents = len(latents)
        self._columns: list[list[int]] = [[] for _ in direct.acts]
        """Per layer, columns of its latents."""
        self._places: list[list[tuple[int, int]]] = [[] for _ in direct.acts]
        """Per layer, tokens and slots of its latents."""
        for column, (node, slot) in enumerate(latents):
            assert node.layer is not None
            self._columns[node.layer].append(column)
            self._places[node.layer].append((node.token, slot))
        self.rows: list[Tensor] = []
        self.chain: list[Tensor] = []
        self.other_latents: list[Tensor] = []
        for layer, places in enumerate(self._places):
            for begin in range(0, len(places), batch):
                self._add_latents(layer, places[begin : begin + batch])

    def _add_latents(self, layer: int, places: Sequence[tuple[int, int]]) -> None:
        """Add the rows of latents of one layer, each by a row of the pass."""
        direct, n = self._direct, len(places)
        tokens, slots = torch.tensor(places, device=direct.acts[layer].device).T
        rows = torch.arange(n, device=tokens.device)
        values = direct.codes[layer].acts[rows, tokens, slots].sum()
        acts, prediction = direct.acts[:layer], direct.predictions[layer]
        source = direct.errors[layer - 1] if layer else direct.first[0]
        predictions = [] if prediction is None else [prediction]
        *found, of_source = _gradients(values, [*acts, *predictions, source])
        chain = [torch.zeros_like(a) for a in acts]
        if prediction is not None:
            # Acts are constants: a prediction depends on them through the maps alone.
            chain = _gradients(prediction, acts, found.pop())
        self._add(n, found, chain, source, of_source, layer)

    def add_metric(self, gradient: Tensor) -> None:
        """Add the row of the metric, by its gradient with respect to the last stream."""
        direct = self._direct
        last, source = direct.streams[-1][:1], direct.errors[-1]
        *found, of_source = _gradients(last, [*direct.acts, source], gradient.to(last))
        chain = [torch.zeros_like(a) for a in direct.acts]
        self._add(1, found, chain, source, of_source, len(direct.acts))

    def _add(
        self,
        n: int,
        of_acts: Sequence[Tensor],
        of_chain: Sequence[Tensor],
        source: Tensor,
        of_source: Tensor,
        layer: int,
    ) -> None:
        """Add n rows from gradients with respect to the acts of the layers before `layer`, and to
        the last error before it (or the first stream)."""
        L, T = len(self._direct.acts), self._n_tokens
        row = source.new_zeros(n, self._n_latents + 1 + (L + 1) * T)
        chain, other = torch.zeros_like(row), row.new_zeros(n)
        for j, (g, g_chain) in enumerate(zip(of_acts, of_chain, strict=True)):
            acts = self._direct.acts[j].detach()[:n]
            effects, through_maps = (acts * part[:n] for part in (g, g_chain))
            other += effects.sum((1, 2)).to(other)
            if self._places[j]:
                tokens, slots = torch.tensor(self._places[j], device=acts.device).T
                row[:, self._columns[j]] = effects[:, tokens, slots].to(row)
                chain[:, self._columns[j]] = through_maps[:, tokens, slots].to(row)
        other -= row[:, : self._n_latents].sum(1)
        begin = self._n_latents + 1 + (layer - 1 if layer else L) * T
        row[:, begin : begin + T] = (source.detach()[:n] * of_source[:n]).sum(-1)
        self.rows.append(row)
        self.chain.append(chain)
        self.other_latents.append(other)


def _gradients(of: Tensor, to: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """Gradients of `of` (times weights) with respect to `to`, 0 where there is no path; the graph
    stays."""
    if not to:
        return []
    return list(torch.autograd.grad(of, to, weights, retain_graph=True, materialize_grads=True))
