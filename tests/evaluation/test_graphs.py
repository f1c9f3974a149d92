import pytest
import tiny
import torch

from resae import HookedLM, feature_graph, latent_gradients
from resae_kernels import SparseCode

STEP = 1e-6


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 9]


class Frozen:
    """The model with the codes and errors of a clean pass, at which some may be changed."""

    def __init__(self, lm, stack, ids):
        self.lm, self.stack, self.ids = lm, stack, ids
        self.points = lm.hook_points(stack.hook_points)
        self.special = lm.is_special(ids).unsqueeze(-1)
        self.codes, self.errors = None, None
        _, self.codes, self.errors = self.run()

    def run(self, changed=None, encoded=frozenset(), error_scale=(1.0, 1.0, 1.0), scale=1.0):
        """Metric, codes as encoded, errors. Of layers in `encoded` the acts are those encoded now,
        of the others the clean ones.

        Args:
            changed: (layer, token, slot) → act.
            scale: of all acts.
        """
        chain, codes, errors = [], [], []

        def at(layer, h):
            sae = self.stack.sae(layer)
            prediction = self.stack.predictor(layer, chain)
            code = sae.encode(h, prediction=prediction)
            codes.append(code)
            acts, indices = code if self.codes is None else self.codes[layer]
            if self.codes is not None and layer in encoded:
                assert torch.equal(code.indices, indices)
                acts = code.acts
            acts = acts * scale
            for (of, token, slot), act in (changed or {}).items():
                if of == layer:
                    acts[0, token, slot] = act
            x_hat = sae.decode(acts, indices, prediction=prediction)
            chain.append(x_hat)
            written = x_hat.masked_fill(self.special, 0)
            error = h - written if self.errors is None else self.errors[layer]
            errors.append(error)
            return written + error * error_scale[layer]

        hooks = {p: lambda h, layer=i: at(layer, h) for i, p in enumerate(self.points)}
        with torch.no_grad(), self.lm.hooked(hooks):
            value = float(metric(self.lm.model(self.ids, use_cache=False).logits))
        return value, codes, errors

    def slot(self, node):
        indices, acts = self.codes[node.layer].indices[0], self.codes[node.layer].acts[0]
        (slot,) = ((indices[node.token] == node.latent) & (acts[node.token] > 0)).nonzero().tolist()
        return node.layer, node.token, slot[0]

    def value(self, node, found):
        value, codes, _ = found
        if node.kind == "metric":
            return value
        layer, token, slot = self.slot(node)
        return float(codes[layer].acts[0, token, slot])

    def derivative(self, node, **options):
        """Of a node's value by a central difference; options: step → arguments of `run`."""
        high, low = (
            self.value(node, self.run(**{name: of(step) for name, of in options.items()}))
            for step in (STEP, -STEP)
        )
        return (high - low) / (2 * STEP)


@pytest.fixture(scope="module")
def whole():
    """A graph of all active latents, the first token special."""
    lm = HookedLM(tiny.pythia().model.double())
    ids = tiny.ids(1, 5)
    ids[0, 0] = lm.special_ids[0]
    stack = tiny.stack(lm).double()
    return (
        lm,
        stack,
        ids,
        feature_graph(lm, stack, ids, metric, max_nodes=None, freeze_norms=False, batch=8),
    )


def test_effects_over_all_paths_are_the_gradients_of_the_replaced_model(whole):
    lm, stack, ids, graph = whole
    n = graph.n_targets
    values = torch.tensor([node.value for node in graph.nodes[:n]], dtype=torch.float64)
    paths = torch.linalg.inv(torch.eye(n) - graph.effects[:, :n] / values)[-1]
    expected = latent_gradients(lm, stack, ids, metric)
    assert n == 4 * 4 * 3 + 1
    for node, gradient, direct in zip(graph.nodes[: n - 1], paths, graph.effects[-1], strict=False):
        acts, indices = (part[0, node.token] for part in expected[node.layer].code)
        slot = int((indices == node.latent).nonzero())
        attribution = float(expected[node.layer].attribution[0, node.token, slot])
        assert float(acts[slot]) == pytest.approx(node.value, rel=1e-9)
        assert float(gradient) * node.value == pytest.approx(attribution, rel=1e-6, abs=1e-9)
        assert node.effect == pytest.approx(attribution, rel=1e-6, abs=1e-9)
        if node.layer == 2:
            assert float(direct) == pytest.approx(attribution, rel=1e-6, abs=1e-9)
    for node in graph.nodes[n:]:
        if node.kind == "error":
            shares = expected[node.layer].error_attribution
            assert node.effect == pytest.approx(float(shares[0, node.token]), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(graph.gradients(), paths, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "kind"), [("gemma3", "previous"), ("gpt2", "all_previous"), ("llama", "identity")]
)
def test_with_norms_frozen_too_paths_lead_to_the_same_effects(family, kind):
    lm = HookedLM(tiny.FAMILIES[family]().model.double())
    graph = feature_graph(
        lm, tiny.stack(lm, kind).double(), tiny.ids(1, 3), metric, max_nodes=None, batch=12
    )
    n = graph.n_targets
    values = torch.tensor([node.value for node in graph.nodes[:n]], dtype=torch.float64)
    paths = torch.linalg.inv(torch.eye(n) - graph.effects[:, :n] / values)[-1]
    effects = torch.tensor([node.effect for node in graph.nodes[:n]], dtype=torch.float64)
    assert (effects.abs() > 1e-6).sum() > 10
    torch.testing.assert_close(paths * values, effects, rtol=1e-6, atol=1e-9)
    embeddings = graph.effects[:, -3:].T @ (effects / values)
    expected = [node.effect for node in graph.nodes if node.kind == "embedding"]
    torch.testing.assert_close(embeddings, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


def test_direct_effects_are_derivatives_with_all_other_latents_and_errors_fixed(whole):
    lm, stack, ids, graph = whole
    frozen = Frozen(lm, stack, ids)
    n = graph.n_targets
    strongest = graph.effects[:, : n - 1].abs().argsort(dim=1, descending=True)
    checked = set()
    for target in (n - 1, n - 2, n - 7, 20):
        for source in strongest[target, :3].tolist():
            i, j = graph.nodes[source], graph.nodes[target]
            place = frozen.slot(i)
            scaled = frozen.derivative(j, changed=lambda s: {place: i.value * (1 + s)})  # noqa: B023
            assert float(graph.effects[target, source]) == pytest.approx(scaled, rel=1e-4)
            assert abs(scaled) > 1e-4
            checked.add((i.layer, j.layer))
    assert {(1, 2), (0, 1), (2, None)} <= checked


def test_all_that_arrives_is_the_derivative_by_all_sources_at_once(whole):
    lm, stack, ids, graph = whole
    frozen = Frozen(lm, stack, ids)
    for target in (graph.n_targets - 1, graph.n_targets - 2, 25):
        node = graph.nodes[target]
        scaled = frozen.derivative(
            node, scale=lambda s: 1 + s, error_scale=lambda s: (1 + s, 1 + s, 1 + s)
        )
        assert float(graph.incoming[target]) == pytest.approx(scaled, rel=1e-5)
        assert float(graph.incoming[target] + graph.intercept[target]) == pytest.approx(node.value)
    assert not graph.other_latents.abs().gt(1e-9).any()


@pytest.mark.parametrize("kind", ["previous", "all_previous", "none"])
@torch.no_grad()
def test_of_a_linear_model_effects_and_biases_sum_to_the_pre_activation(kind):
    lm = HookedLM(tiny.pythia().model.double())
    with torch.no_grad():  # blocks that add nothing
        for name, parameter in lm.model.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                parameter.zero_()
    ids = tiny.ids(1, 4)
    stack = tiny.stack(lm, kind).double()
    for bias in (*stack.predictor.buffers(), *(p for p in stack.parameters() if p.ndim == 1)):
        bias += 0.1 * torch.randn_like(bias)
    graph = feature_graph(lm, stack, ids, metric, max_nodes=6)
    zero = SparseCode(torch.zeros(1, 1).double(), torch.zeros(1, 1, dtype=torch.int64))
    constants = stack.decode([zero] * 3)
    assert len({node.layer for node in graph.nodes[:6]}) > 1
    for j, node in enumerate(graph.nodes[:6]):
        sae = stack.sae(node.layer)
        E = sae.encoder.weight[node.latent]
        if node.layer == 0:
            x, prediction = torch.zeros(32, dtype=torch.float64), 0
        else:
            x = constants[node.layer - 1][0]
            prediction = stack.predictor(node.layer, constants)
            prediction = 0 if prediction is None else prediction[0]
        bias = (x - prediction - sae.b_dec) @ E + sae.encoder.bias[node.latent]
        assert float(graph.incoming[j] + bias) == pytest.approx(node.value, rel=1e-9)
        assert (float(graph.other_latents[j]) != 0) == (node.layer > 0)


@pytest.mark.parametrize("kind", ["previous", "all_previous"])
@torch.no_grad()
def test_the_part_through_the_maps_is_the_product_of_dictionary_maps_and_encoder(kind, whole):
    lm, _, ids, _ = whole
    stack = tiny.stack(lm, kind).double()
    graph = feature_graph(lm, stack, ids, metric, max_nodes=24)
    maps = [None, *stack.predictor.A]
    reached = 0
    for j, target in enumerate(graph.nodes[:24]):
        for i, source in enumerate(graph.nodes[:24]):
            expected = 0.0
            if source.layer < target.layer and source.token == target.token:
                d = {source.layer: stack.sae(source.layer).W_dec[source.latent]}
                for layer in range(source.layer + 1, target.layer + 1):
                    A, D = maps[layer], 32
                    first = layer - len(A) // D
                    d[layer] = sum(
                        d[of] @ A[(of - first) * D : (of - first + 1) * D]
                        for of in d
                        if of >= first
                    )
                E = stack.sae(target.layer).encoder.weight[target.latent]
                expected = -source.value * float(d[target.layer] @ E)
                reached += 1
            assert float(graph.chain[j, i]) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert reached > 10


def test_the_predicted_change_is_that_of_latents_held_fixed(whole):
    lm, stack, ids, graph = whole
    frozen = Frozen(lm, stack, ids)
    strongest = sorted(range(graph.n_targets - 1), key=lambda i: -abs(graph.nodes[i].effect))
    chosen = [next(i for i in strongest if graph.nodes[i].layer == layer) for layer in (0, 1, 2)]
    places = {frozen.slot(graph.nodes[i]): graph.nodes[i].value for i in chosen}
    slope = frozen.derivative(
        graph.nodes[graph.n_targets - 1],
        encoded=lambda _: {0, 1, 2},
        changed=lambda s: {place: act * (1 + s) for place, act in places.items()},
    )
    assert graph.predicted_change(chosen) == pytest.approx(-slope, rel=1e-4)
    separate = -sum(graph.nodes[i].effect for i in chosen)
    assert abs(graph.predicted_change(chosen) - separate) > 1e-3 * abs(separate)


def test_fewer_nodes_leave_the_sums_as_they_are(whole):
    lm, stack, ids, graph = whole
    pruned = feature_graph(lm, stack, ids, metric, max_nodes=10, freeze_norms=False, batch=3)
    for j, node in enumerate(pruned.nodes[:10]):
        i = [other[:4] for other in graph.nodes].index(node[:4])
        assert float(pruned.incoming[j]) == pytest.approx(float(graph.incoming[i]), rel=1e-9)
    edges = pruned.edges(12)
    assert len(edges) == 12
    assert [abs(e.through) for e in edges] == sorted((abs(e.through) for e in edges), reverse=True)
    kinds = {node.kind for node in pruned.nodes}
    assert kinds == {"latent", "metric", "error", "stream", "embedding"}
    edge = next(e for e in pruned.edges() if pruned.nodes[e.target].kind == "metric")
    assert edge.effect == edge.through == pytest.approx(float(pruned.effects[-1, edge.source]))


def test_bad_input_is_refused(whole):
    lm, stack, ids, _ = whole
    with pytest.raises(ValueError, match=r"shape \[2, 5\], expected one prompt \[1, T\]"):
        feature_graph(lm, stack, ids.expand(2, -1), metric)
    with pytest.raises(ValueError, match="max_nodes=0, expected at least 1"):
        feature_graph(lm, stack, ids, metric, max_nodes=0)
    with pytest.raises(TypeError, match=r"feature_graph: metric returned \[1, 5, 2048\]"):
        feature_graph(lm, stack, ids, lambda logits: logits)
    with pytest.raises(ValueError, match="feature_graph: the metric's value has no gradient"):
        feature_graph(lm, stack, ids, lambda logits: logits.detach().sum())


def test_with_norms_frozen_the_parts_of_the_last_stream_sum_to_the_logits():
    lm = HookedLM(tiny.pythia().model.double())
    stack, ids = tiny.stack(lm, "none").double(), tiny.ids(1, 4)  # no biases; the last block too
    graph = feature_graph(lm, stack, ids, metric)
    value = graph.nodes[graph.n_targets - 1].value
    assert float(graph.incoming[-1]) == pytest.approx(value, rel=1e-9)
    true = feature_graph(lm, stack, ids, metric, freeze_norms=False)
    assert float(true.incoming[-1]) == pytest.approx(0, abs=1e-3 * abs(value))
