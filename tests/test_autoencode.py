"""Encode and decode with one backward: the bits of the two ops, from one sort of the code."""

from typing import Any

import pytest
import torch
from measured import random_code
from torch import Tensor

from resae_kernels import (
    ScreenedEncoder,
    autoencode,
    autoencoder_error,
    reconstruction_error,
    sparse_decode,
    topk_encode,
)
from resae_kernels.cpu import native, sums
from resae_kernels.gradients import autoencoder_gradients, encoder_gradients, scatter_outer
from resae_kernels.triton import decode as triton_decode

either = pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
NAMES = ("x", "weight", "bias", "W_dec", "b_dec", "prediction")


def inputs_of(N=13, D=6, M=11, dtype=torch.float32, leading=()) -> dict[str, Tensor]:
    shapes = (*leading, N, D), (M, D), (M,), (M, D), (D,), (*leading, N, D)
    return {
        name: torch.randn(shape).to(dtype).requires_grad_()
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def joined(x, weight, bias, W_dec, b_dec, prediction, *, k=3, target=None, **options):
    """Output, acts and indices of `autoencode`, or `autoencoder_error` with a target."""
    offsets = {"b_dec": b_dec, "prediction": prediction}
    given = x, weight, bias, k, W_dec
    if target is None:
        x_hat, code = autoencode(*given, **offsets, **options)
        return [x_hat, *code]
    error, code = autoencoder_error(*given, target=target, **offsets, **options)
    return [*error, *code]


def apart(x, weight, bias, W_dec, b_dec, prediction, *, k=3, target=None, **options):
    """The same by the two ops."""
    sorted = options.pop("sorted", True)
    code = topk_encode(
        x, weight, bias, k, pre_bias=b_dec, prediction=prediction, sorted=sorted, **options
    )
    offsets = {"bias": b_dec, "prediction": prediction}
    if target is None:
        return [sparse_decode(*code, W_dec, **offsets, **options), *code]
    return [*reconstruction_error(*code, W_dec, target, **offsets, **options), *code]


def with_gradients(op, inputs: dict[str, Tensor], seed: int = 1, **options) -> list[Tensor]:
    """Outputs, and the gradients of a loss on all of them."""
    *outputs, indices = op(**inputs, **options)
    generator = torch.Generator(indices.device).manual_seed(seed)
    loss = sum(
        (o * torch.randn(o.shape, generator=generator, device=o.device)).sum() for o in outputs
    )
    wanted = [t for t in inputs.values() if t is not None and t.requires_grad]
    return [*outputs, indices, *torch.autograd.grad(loss, wanted)]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [False, True], ids=["x_hat", "error"])
def test_results_and_gradients_are_those_of_the_two_ops_to_the_bit(
    implementation, dtype, target, monkeypatch
):
    monkeypatch.setattr(triton_decode, "PIECE", 4)  # latents are summed in several pieces
    inputs, options = inputs_of(dtype=dtype), {"implementation": implementation}
    if target:
        options["target"] = torch.randn_like(inputs["x"])
    for more in ({}, {"sorted": False}):
        ours, theirs = (with_gradients(op, inputs, **options, **more) for op in (joined, apart))
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("frozen", [*NAMES, "weight bias b_dec", "weight W_dec"])
def test_frozen_inputs_change_no_other_gradient(frozen):
    inputs = inputs_of()
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    assert_same_bits(*(with_gradients(op, inputs) for op in (joined, apart)))


@pytest.mark.parametrize("shape", [(2, 3), (0,), ()], ids=str)
def test_leading_shapes_and_absent_inputs(shape):
    N, leading = (shape[-1], shape[:-1]) if shape else (1, ())
    inputs: dict[str, Any] = inputs_of(N=N, leading=leading)
    if not shape:
        inputs = {
            n: t[0].detach().requires_grad_() if n in ("x", "prediction") else t
            for n, t in inputs.items()
        }
    assert_same_bits(*(with_gradients(op, inputs) for op in (joined, apart)))
    inputs |= {"bias": None, "b_dec": None, "prediction": None}
    assert_same_bits(*(with_gradients(op, inputs) for op in (joined, apart)))


def test_under_autocast_dtypes_and_gradients_are_those_of_the_two_ops():
    inputs = inputs_of()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (with_gradients(op, inputs) for op in (joined, apart))
    assert_same_bits(ours, theirs)


@either
def test_a_backward_sorts_the_code_once_and_sums_in_one_launch(implementation, monkeypatch):
    sorts, launches = [], []
    sort, launch = sums.sort_stably, triton_decode.launch_scatter_outer
    monkeypatch.setattr(sums, "sort_stably", lambda keys: sorts.append(keys) or sort(keys))
    monkeypatch.setattr(
        triton_decode, "launch_scatter_outer", lambda *a: launches.append(a) or launch(*a)
    )
    inputs = inputs_of(dtype=torch.float64)  # the compiled library takes no float64
    with_gradients(joined, inputs, implementation=implementation)
    assert len(sorts) == 1
    assert len(launches) == (implementation == "triton")
    with_gradients(apart, inputs, implementation=implementation)
    assert len(sorts) == 3


def test_the_compiled_library_sums_both_in_one_call(monkeypatch):
    if native.unavailable():
        pytest.skip(str(native.unavailable()))
    calls, scatter = [], native.scatter_outer
    monkeypatch.setattr(native, "scatter_outer", lambda *a: calls.append(a) or scatter(*a))
    with_gradients(joined, inputs_of())
    assert [len(weights) for weights, *_ in calls] == [2]


def test_gradients_and_their_gradients_are_the_derivatives():
    inputs = inputs_of(4, 3, 5, torch.float64)

    def outputs(*leaves):
        out = joined(**dict(zip(NAMES, leaves, strict=True)), k=2)
        return out[0], out[1]

    leaves = tuple(inputs.values())
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@either
def test_ops_pass_opcheck(implementation):
    named = {"implementation": implementation}
    inputs = inputs_of(5, 4, 8, torch.float64)
    acts, indices = random_code(5, 3, 8)
    x, weight, bias, W_dec, b_dec, prediction = inputs.values()
    for target in (None, torch.randn_like(x).requires_grad_()):
        torch.library.opcheck(
            torch.ops.resae.autoencoder.default,
            (
                *(acts, indices, x, weight, bias, b_dec, prediction),
                *(W_dec, b_dec, prediction, target),
            ),
            named,
        )
    gate = torch.randn_like(acts).requires_grad_()
    torch.library.opcheck(
        torch.ops.resae.autoencoder_gradients.default,
        (acts.requires_grad_(), indices, x, gate, prediction, 8),
        named,
    )


@either
def test_gradients_of_a_gate_with_zeros(implementation, monkeypatch):
    """Entries that count for the dictionary alone add nothing to the encoder's sums."""
    monkeypatch.setattr(triton_decode, "PIECE", 4)
    N, k = 40, 3
    acts, indices = random_code(N, k, 8)
    gate = torch.where(torch.rand_like(acts) < 0.5, 0.0, torch.randn_like(acts)) * (acts > 0)
    grad, rows = torch.randn(N, 4).double(), torch.randn(N, 4).double()
    ours = autoencoder_gradients(acts, indices, grad, gate, rows, 8, implementation)
    dictionary = scatter_outer(acts, indices, grad, 8, implementation)
    assert torch.equal(ours[0], dictionary)
    for mine, its in zip(
        ours[1:], encoder_gradients(gate, indices, rows, 8, implementation), strict=True
    ):
        torch.testing.assert_close(mine, its)


def test_compiles_as_one_graph():
    inputs = inputs_of()
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    assert_same_bits(*(with_gradients(op, inputs) for op in (compiled, joined)))


def test_a_screened_encoder_finds_the_code(screened_at_any_size):
    del screened_at_any_size
    inputs = inputs_of(40, 64, 512)
    encoder = ScreenedEncoder(inputs["weight"], inputs["bias"])
    ours = with_gradients(joined, inputs, encoder=encoder, k=4)
    with torch.no_grad():
        code = encoder.encode_with_info(
            inputs["x"], 4, pre_bias=inputs["b_dec"], prediction=inputs["prediction"]
        )
    assert code.rows_screened == 40
    theirs = with_gradients(apart, inputs, k=4)
    assert torch.equal(ours[2], theirs[2])
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named():
    inputs = inputs_of()
    other = ScreenedEncoder(torch.randn(11, 6))
    with pytest.raises(ValueError, match="autoencode: encoder was made of another weight"):
        joined(**inputs, encoder=other)
    wrong = inputs | {"W_dec": torch.randn(11, 5, requires_grad=True)}
    with pytest.raises(ValueError, match=r"autoencode: bias has shape \[6\], expected \[5\]"):
        joined(**wrong)
    with pytest.raises(ValueError, match="topk_encode: k=12 exceeds"):
        joined(**inputs, k=12)
    with pytest.raises(ValueError, match=r"autoencoder_error: target has shape \[6\]"):
        joined(**inputs, target=torch.randn(6))


def test_without_gradients_it_is_encode_and_decode():
    inputs = inputs_of()
    with torch.no_grad():
        assert_same_bits(joined(**inputs), apart(**inputs))
        assert joined(**inputs)[0].grad_fn is None
