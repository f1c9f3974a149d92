"""Gradients through replaced layers, against finite differences of the logits in float64."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resae import DecodeLoop, HookedLM, replacement
from resae_kernels import SparseCode

LOOPS = ("open", "closed")


@pytest.fixture(scope="module")
def neox():
    """A model and a stack in float64, every parameter and map with a gradient; ids, one special."""
    lm = HookedLM(deepcopy(tiny.pythia().model).double())
    stack = tiny.stack(lm).double()
    for tensor in stack.buffers():
        tensor.requires_grad_()
    ids = tiny.ids(2, 8)
    ids[0, 3] = lm.special_ids[0]
    return lm, stack, ids


def loss_of(lm, ids):
    logits = lm.model(ids, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum()


def replaced_loss(lm, stack, ids, **options):
    with replacement(lm, stack, gradient=True, **options) as active:
        loss = loss_of(lm, ids)
    active.assert_replaced()
    return loss


def directions_of(tensors):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]


def difference(function, tensor, direction, step=1e-6):
    """Central difference of `function()` along a direction of a tensor."""
    before = tensor.detach().clone()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            tensor.copy_(before + sign * step * direction)
            values.append(float(function()))
        tensor.copy_(before)
    return (values[0] - values[1]) / (2 * step)


def assert_gradients_are_differences(loss, function, named):
    tensors = list(named.values())
    gradients = torch.autograd.grad(loss, tensors)
    for (name, tensor), gradient, direction in zip(
        named.items(), gradients, directions_of(tensors), strict=True
    ):
        along = float((gradient * direction).sum())
        expected = difference(function, tensor, direction)
        assert along == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        assert float(gradient.abs().max()) > 1e-9, name


def parameters_of(lm, stack):
    """All of the stack, its maps among them, and all of the model that logits depend on."""
    return {
        **dict(stack.named_parameters()),
        **dict(stack.named_buffers()),
        **dict(lm.model.named_parameters()),
    }


@pytest.mark.parametrize("loop", LOOPS)
def test_gradients_of_every_parameter_are_finite_differences(neox, loop):
    lm, stack, ids = neox

    def loss():
        return replaced_loss(lm, stack, ids, loop=loop)

    assert_gradients_are_differences(loss(), loss, parameters_of(lm, stack))


@pytest.mark.parametrize("loop", LOOPS)
def test_with_edits_too(neox, loop):
    lm, stack, ids = neox
    codes = []
    with replacement(lm, stack, loop=loop, on_codes=lambda _, code: codes.append(code)):
        lm.logits(ids)
    latents = [int(code.indices[1, 4, 0]) for code in codes]
    edits = [
        {"layer": 0, "action": "scale", "latents": latents[0], "value": 2.5},
        {"layer": 1, "action": "ablate", "latents": latents[1]},
    ]

    def loss():
        return replaced_loss(lm, stack, ids, loop=loop, interventions=edits)

    assert_gradients_are_differences(loss(), loss, dict(stack.named_parameters()))


@pytest.mark.parametrize("loop", LOOPS)
def test_gradients_of_the_codes_of_every_layer_are_finite_differences(neox, loop):
    """Of codes that `on_codes` puts in the place of the encoders'."""
    lm, stack, ids = neox
    codes = {}

    def put(name, code):
        if name not in codes:
            codes[name] = SparseCode(code.acts.detach().clone().requires_grad_(), code.indices)
        return codes[name]

    def loss():
        return replaced_loss(lm, stack, ids, loop=loop, on_codes=put)

    first = loss()
    assert_gradients_are_differences(first, loss, {name: c.acts for name, c in codes.items()})


@pytest.mark.parametrize("loop", LOOPS)
def test_a_detached_error_is_a_constant_in_finite_differences(neox, loop):
    lm, stack, ids = neox
    points = lm.hook_points(tiny.LAYERS)
    errors = []

    def loss_with(errors):
        """The loss with the error of each layer: the one given, or, recorded, its own."""
        before, chain = [], []

        def at(layer):
            def function(h):
                x_hat, _ = stack.step(layer, h, chain if loop == "closed" else before, chain)
                before.append(h)
                chain.append(x_hat)
                if len(errors) == layer:
                    errors.append((h - x_hat).detach())
                new = x_hat + errors[layer]
                return torch.where(lm.is_special(ids).unsqueeze(-1), h, new)

            return function

        with lm.hooked({point: at(layer) for layer, point in enumerate(points)}):
            return loss_of(lm, ids)

    loss_with(errors)
    loss = replaced_loss(lm, stack, ids, loop=loop, keep_error="detached")
    assert_gradients_are_differences(loss, lambda: loss_with(errors), parameters_of(lm, stack))
    of_true = replaced_loss(lm, stack, ids, loop=loop, keep_error=True)
    parameters = list(stack.parameters())
    for one, other in zip(
        torch.autograd.grad(of_true, parameters),
        torch.autograd.grad(
            replaced_loss(lm, stack, ids, loop=loop, keep_error="detached"), parameters
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loop", LOOPS)
def test_passed_through_the_stream_has_the_plain_gradient_and_latents_that_of_their_direction(
    neox, loop
):
    lm, stack, ids = neox
    codes = []
    loss = replaced_loss(
        lm,
        stack,
        ids,
        loop=loop,
        keep_error="pass_through",
        on_codes=lambda _, code: codes.append(code),
    )
    assert torch.equal(loss, loss_of(lm, ids))
    of_model = torch.autograd.grad(loss, list(lm.model.parameters()), retain_graph=True)
    plain = torch.autograd.grad(loss_of(lm, ids), list(lm.model.parameters()))
    for found, expected in zip(of_model, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    of_acts = torch.autograd.grad(loss, [code.acts for code in codes])
    row, token = 1, 4
    shift = torch.zeros(*ids.shape, lm.d_model, dtype=torch.float64)
    for layer, (point, code) in enumerate(zip(lm.hook_points(tiny.LAYERS), codes, strict=True)):
        for slot in range(2):
            direction = torch.zeros_like(shift)
            direction[row, token] = stack.sae(layer).W_dec[code.indices[row, token, slot]]
            with lm.hooked({point: lambda h: h + shift}):
                expected = difference(lambda: loss_of(lm, ids), shift, direction)
            found = float(of_acts[layer][row, token, slot])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("keep_error", ["detached", "pass_through"])
@pytest.mark.parametrize("family", ["pythia", "gemma2"])
def test_kept_errors_leave_the_logits_alone(family, keep_error):
    lm = tiny.FAMILIES[family]()
    ids, stack = tiny.ids(), tiny.stack(lm)
    with replacement(lm, stack, keep_error=keep_error):
        kept = lm.logits(ids)
    clean = lm.logits(ids)
    assert float((kept - clean).norm() / clean.norm()) < 1e-5


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_backward_holds_no_tensor_of_tokens_by_latents():
    lm = tiny.pythia()
    lm.model.requires_grad_(False)
    stack, ids = tiny.stack(lm, d_sae=4096), tiny.ids(4, 48)
    codes = []
    with replacement(lm, stack, gradient=True, on_codes=lambda _, code: codes.append(code)):
        loss = lm.model(ids, use_cache=False).logits.logsumexp(-1).mean()
    with Shapes() as shapes:
        loss.backward()
    largest = max(4096 * 32, ids.numel() * 2048)  # a dictionary; logits
    assert shapes.largest <= largest < ids.numel() * 4096


def gradients_of(lm, stack, ids, run=None):
    for parameter in (*lm.model.parameters(), *stack.parameters()):
        parameter.grad = None
    with replacement(lm, stack, gradient=True):
        logits = (lm.model if run is None else run)(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
    return [p.grad.clone() for p in (*lm.model.parameters(), *stack.parameters())]


@pytest.mark.parametrize("family", ["pythia", "llama"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family, use_reentrant):
    lm = tiny.FAMILIES[family]()
    stack, ids = tiny.stack(lm), tiny.ids()
    expected = gradients_of(lm, stack, ids)
    lm.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    lm.model.train()
    lm.model.enable_input_require_grads()
    for found, wanted in zip(gradients_of(lm, stack, ids), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_blocks_are_recomputed_in_the_backward_on_request():
    lm = tiny.pythia()
    stack, ids = tiny.stack(lm), tiny.ids()
    expected = gradients_of(lm, stack, ids)
    runs = []
    handle = lm.blocks[2].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with lm.recomputed():
        found = gradients_of(lm, stack, ids)
    handle.remove()
    assert len(runs) == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    inside = tiny.stack(lm, layers=("blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"))
    with lm.recomputed(), pytest.raises(RuntimeError, match="gradient checkpointing .* resid_pre"):
        gradients_of(lm, inside, ids)


def test_compiled_the_gradients_are_the_same_in_one_graph():
    lm = tiny.pythia()
    stack, ids = tiny.stack(lm), tiny.ids()
    expected = gradients_of(lm, stack, ids)
    compiled = torch.compile(lm.model, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(gradients_of(lm, stack, ids, compiled), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_the_default_has_no_gradient_and_the_mode_is_left_afterwards():
    lm = tiny.pythia()
    stack, ids = tiny.stack(lm), tiny.ids()
    with replacement(lm, stack):
        assert not lm.model(ids, use_cache=False).logits.requires_grad
    with replacement(lm, stack, gradient=True):
        assert lm.model(ids, use_cache=False).logits.requires_grad
        with torch.no_grad():
            assert not lm.model(ids, use_cache=False).logits.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "teacher_forced"}, "gradient=True with mode='teacher_forced'.*use mode='online'"),
        ({"transport_bytes": 10**6}, "transport_bytes with gradient=True; .*leave one"),
        ({"keep_error": "attached"}, "keep_error='attached', expected 'detached', 'pass_through'"),
        ({"keep_error": ""}, "keep_error='', expected 'detached'"),
    ],
)
def test_what_has_no_gradient_is_refused(options, message):
    lm = tiny.pythia()
    with pytest.raises(ValueError, match=message):
        replacement(lm, tiny.stack(lm), gradient=True, **options)
    with replacement(lm, tiny.stack(lm)):  # the layers are free
        pass


@pytest.mark.parametrize("inside", [True, False])
def test_a_decode_loop_refuses_gradients(inside):
    lm = tiny.pythia()
    write = DecodeLoop(lm, max_length=16)
    active = replacement(lm, tiny.stack(lm), gradient=True)
    with (
        active if inside else nullcontext(),
        pytest.raises(ValueError, match="DecodeLoop: .* gradient=True.*leave gradient out"),
    ):
        write(tiny.ids(1, 4), max_new_tokens=4)
    active.remove()
