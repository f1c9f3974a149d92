from copy import deepcopy

import pytest
import tiny
import torch

from resae import HookedLM, latent_gradients, replacement
from resae.models.sinks import SinkRule
from resae_kernels import SparseCode


@pytest.fixture(scope="module")
def neox():
    lm = HookedLM(tiny.pythia().model.double())
    ids = tiny.ids(2, 8)
    ids[0, 3] = lm.special_ids[0]
    return lm, tiny.stack(lm).double(), ids


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 9]).sum()


def scaled_loss(lm, stack, ids, factors, errors, loop):
    """The metric with the acts of each layer times a factor and the errors given."""
    before, chain = [], []

    def at(layer):
        def function(h):
            sae = stack.sae(layer)
            code = sae.encode(
                h, prediction=stack.predictor(layer, chain if loop == "closed" else before)
            )
            acts = code.acts * factors[layer]
            x_hat = sae.decode(acts, code.indices, prediction=stack.predictor(layer, chain))
            before.append(h)
            chain.append(x_hat)
            if len(errors) == layer:
                errors.append(h - x_hat)
            return torch.where(lm.is_special(ids).unsqueeze(-1), h, x_hat + errors[layer])

        return function

    points = lm.hook_points(tiny.LAYERS)
    with torch.no_grad(), lm.hooked({p: at(i) for i, p in enumerate(points)}):
        return float(metric(lm.model(ids, use_cache=False).logits))


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_attributions_sum_to_the_true_change_of_small_edits(neox, loop):
    lm, stack, ids = neox
    found = latent_gradients(lm, stack, ids, metric, loop=loop)
    errors = []
    scaled_loss(lm, stack, ids, [1.0] * 3, errors, loop)
    for layer, gradients in enumerate(found):
        values = []
        for step in (1e-5, -1e-5):
            factors = [1.0 + step * (i == layer) for i in range(3)]
            values.append(scaled_loss(lm, stack, ids, factors, errors, loop))
        change = (values[0] - values[1]) / 2e-5
        assert float(gradients.attribution.sum()) == pytest.approx(change, rel=1e-4)
        assert abs(change) > 1e-3
        values = []
        for step in (1e-5, -1e-5):
            moved = [e * (1 + step * (i == layer)) for i, e in enumerate(errors)]
            values.append(scaled_loss(lm, stack, ids, [1.0] * 3, moved, loop))
        change = (values[0] - values[1]) / 2e-5
        assert float(gradients.error_attribution.sum()) == pytest.approx(change, rel=1e-4)


def test_passed_through_a_latent_has_the_gradient_of_its_direction(neox):
    lm, stack, ids = neox
    found = latent_gradients(lm, stack, ids, metric, keep_error="pass_through")
    streams = []

    def keep(h):
        streams.append(h.detach().requires_grad_())
        return streams[-1]

    for layer, point in enumerate(lm.hook_points(tiny.LAYERS)):
        streams.clear()
        with lm.hooked({point: keep}):
            (gradient,) = torch.autograd.grad(metric(lm.model(ids).logits), streams)
        directions = stack.sae(layer).W_dec[found[layer].code.indices]
        expected = (directions @ gradient.unsqueeze(-1)).squeeze(-1)
        expected[lm.is_special(ids)] = 0
        torch.testing.assert_close(found[layer].gradient, expected)


def test_frozen_weights_change_nothing_and_nothing_is_left_behind(neox):
    lm, stack, ids = neox
    expected = latent_gradients(lm, stack, ids, metric)
    for module in (lm.model, stack):
        module.requires_grad_(False)
    with torch.no_grad():
        found = latent_gradients(lm, stack, ids, metric)
    for module in (lm.model, stack):
        module.requires_grad_()
    for one, other in zip(found, expected, strict=True):
        assert one.hook_point == other.hook_point
        assert torch.equal(one.code.indices, other.code.indices)
        torch.testing.assert_close(one.gradient, other.gradient)
        torch.testing.assert_close(one.error_attribution, other.error_attribution)
        assert not one.code.acts.requires_grad
    assert all(p.grad is None for p in (*lm.model.parameters(), *stack.parameters()))
    codes = {}
    with replacement(lm, stack, keep_error=True, on_codes=codes.__setitem__):
        lm.logits(ids)
    for layer in found:
        assert isinstance(layer.code, SparseCode)
        torch.testing.assert_close(layer.code.acts, codes[layer.hook_point].acts)


def test_sink_tokens_that_are_left_alone_have_no_share(neox):
    lm, stack, ids = neox
    captured = lm.capture(ids, points := lm.hook_points(tiny.LAYERS))
    norms = [captured[point].norm(dim=-1) for point in points]
    ruled = deepcopy(stack)
    largest = float(norms[1][1].max())
    ruled.sinks = SinkRule((1e9, largest * 0.999, 1e9), 1.0)
    token = int(norms[1][1].argmax())
    ruled_gradients = latent_gradients(lm, ruled, ids, metric)
    for layer, gradients in enumerate(ruled_gradients):
        zero = [bool((t[1, token] == 0).all()) for t in (gradients[2], gradients[3])]
        assert zero == [layer > 0 or token == 0] * 2
        assert not gradients.error_attribution[:, 0].any()
        assert gradients.error_attribution.any()


def test_what_is_no_scalar_is_refused(neox):
    lm, stack, ids = neox
    with pytest.raises(TypeError, match=r"metric returned \[2, 8, 2048\], expected a scalar"):
        latent_gradients(lm, stack, ids, lambda logits: logits)
    with pytest.raises(ValueError, match="keep_error='attached', expected 'detached'"):
        latent_gradients(lm, stack, ids, metric, keep_error="attached")
