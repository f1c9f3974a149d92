import gc
import math
import weakref
from importlib import import_module

import pytest
import torch
from measured import DTYPES, assert_error_as_torch, largest_allocation, scatter
from torch import Tensor

from resae_kernels import (
    OnlineStep,
    ScreenedEncoder,
    SparseCode,
    StepWorkspace,
    online_step,
    reference,
    transport,
)
from resae_kernels.cpu import native
from resae_kernels.triton import decode as triton_decode
from resae_kernels.triton import encode_few
from resae_kernels.triton import step as triton_step

online_step_module = import_module("resae_kernels.step")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

either = pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
# (leading shape of x, D, M, k)
SHAPES = [
    pytest.param((1,), 8, 32, 4, id="one-token"),
    pytest.param((2,), 67, 53, 7, id="two-tokens-primes"),
    pytest.param((16,), 17, 200, 5, id="sixteen-tokens"),
    pytest.param((), 8, 32, 4, id="a-vector"),
    pytest.param((2, 3), 5, 8, 2, id="batch-of-sequences"),
    pytest.param((3,), 1, 8, 3, id="D-1"),
    pytest.param((3,), 12, 40, 1, id="k-1"),
    pytest.param((3,), 12, 8, 8, id="k-M"),
    pytest.param((2,), 40, 300, 70, id="more-active-than-rows-of-a-tile"),
    pytest.param((0,), 4, 8, 3, id="no-tokens"),
]


def whole(*shape: int) -> Tensor:
    """Numbers so small and whole that no product or sum of a step is ever rounded."""
    return torch.randint(-1, 2, shape).float()


def step_inputs(leading, D, M, draw=torch.randn, dtype=torch.float32, device="cpu"):
    shapes = {"x": (*leading, D), "weight": (M, D), "bias": (M,), "W_dec": (M, D)}
    shapes |= {"b_dec": (D,), "prediction": (*leading, D)}
    return {name: draw(*shape).to(device, dtype) for name, shape in shapes.items()}


def step(op, k: int, **inputs) -> OnlineStep:
    x, weight, bias, W_dec = (inputs.pop(name) for name in ("x", "weight", "bias", "W_dec"))
    return op(x, weight, bias, k, W_dec, **inputs)


def assert_same_step(ours: OnlineStep, theirs: OnlineStep) -> None:
    for a, b in zip((ours.x_hat, *ours.code), (theirs.x_hat, *theirs.code), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def three_layers(leading, D, draw, dtype=torch.float32, device="cpu"):
    """Sizes that differ from layer to layer; layer 2 is predicted from both before it."""
    sizes = [(24, 3), (40, 5), (32, 4)]
    layers = [step_inputs(leading, D, M, draw, dtype, device) for M, _ in sizes]
    A = [draw(rows, D).to(device, dtype) / 4 for rows in (D, 2 * D)]
    c = [draw(D).to(device, dtype) for _ in range(2)]
    return layers, [k for _, k in sizes], A, c


# -- equals the reference --------------------------------------------------------------------------


@either
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("leading", "D", "M", "k"), SHAPES)
def test_step_equals_the_reference_to_the_bit_where_nothing_is_rounded(
    leading, D, M, k, dtype, implementation, device
):
    # Whole scores of few levels: ties in every row.
    inputs = step_inputs(leading, D, M, whole, dtype, device)
    ours = step(online_step, k, **inputs, implementation=implementation)
    assert isinstance(ours, OnlineStep)
    assert isinstance(ours.code, SparseCode)
    assert_same_step(ours, step(reference.online_step, k, **inputs))


@either
@pytest.mark.parametrize(
    "absent", [("bias",), ("b_dec",), ("prediction",), ("bias", "b_dec", "prediction")]
)
def test_step_equals_the_reference_without_an_optional_input(absent, implementation, device):
    inputs = step_inputs((3,), 7, 40, whole, device=device)
    inputs |= dict.fromkeys(absent)
    ours = step(online_step, 4, **inputs, implementation=implementation)
    assert_same_step(ours, step(reference.online_step, 4, **inputs))


@either
@pytest.mark.parametrize("dtype", DTYPES)
def test_acts_and_reconstruction_are_as_close_to_fp64_as_plain_torch(dtype, implementation, device):
    if dtype == torch.bfloat16 and implementation == "triton" and device.type == "cpu":
        pytest.skip("the interpreter cuts fp32 off to bf16 instead of rounding it")
    inputs = step_inputs((16,), 67, 120, dtype=dtype, device=device)
    ours = step(online_step, 6, **inputs, implementation=implementation)
    indices = ours.code.indices

    def plain(x, weight, bias, W_dec, b_dec, prediction):
        acts = ((x - prediction - b_dec) @ weight.T + bias).relu().gather(-1, indices)
        return acts, (acts.unsqueeze(-1) * W_dec[indices]).sum(-2) + b_dec + prediction

    truth = plain(**{name: t.double() for name, t in inputs.items()})
    results = zip((ours.code.acts, ours.x_hat), plain(**inputs), truth, strict=True)
    for name, (result, rival, exact) in zip(("acts", "x_hat"), results, strict=True):
        assert_error_as_torch(name, result, rival, exact)


@either
def test_row_without_positive_scores_is_its_prediction(implementation, device):
    inputs = step_inputs((3,), 7, 40, whole, device=device)
    inputs["bias"][:] = -1000
    ours = step(online_step, 4, **inputs, implementation=implementation)
    assert torch.equal(ours.x_hat, inputs["prediction"] + inputs["b_dec"])
    assert not ours.code.acts.any()
    assert not ours.code.indices.any()


@either
def test_nan_stays_in_its_row_and_comes_first_in_the_selection(implementation, device):
    inputs = step_inputs((3,), 7, 40, whole, device=device)
    inputs["x"][1, 2] = math.nan
    ours = step(online_step, 4, **inputs, implementation=implementation)
    assert_same_step(ours, step(reference.online_step, 4, **inputs))
    assert ours.code.acts[1].isnan().all()
    assert ours.code.indices[1].tolist() == [0, 1, 2, 3]
    assert ours.x_hat[1].isnan().all()
    assert not ours.x_hat[[0, 2]].isnan().any()


@either
def test_non_contiguous_inputs_change_nothing(implementation, device):
    inputs = step_inputs((3,), 7, 40, whole, device=device)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    ours = step(online_step, 4, **strided, implementation=implementation)
    assert_same_step(ours, step(reference.online_step, 4, **inputs))


def test_fp64_steps_in_torch_alone(device):
    inputs = step_inputs((3,), 7, 40, whole, torch.float64, device)
    ours = step(online_step, 4, **inputs, implementation="torch")
    assert_same_step(ours, step(reference.online_step, 4, **inputs))
    with pytest.raises(ValueError, match="does not select k=4 of M=40 in torch.float64"):
        step(online_step, 4, **inputs, implementation="triton")


def test_more_latents_than_a_program_selects_from_step_in_torch_alone(device):
    inputs = step_inputs((1,), 1, 2**20, whole, device=device)
    ours = step(online_step, 3, **inputs, implementation="torch")
    assert_same_step(ours, step(reference.online_step, 3, **inputs))
    with pytest.raises(ValueError, match="does not select k=3 of M=1048576.*pass implementation="):
        step(online_step, 3, **inputs, implementation="triton")


# -- a chain, layer by layer -----------------------------------------------------------------------


def run_chain(op, layers, ks, A, c, **options) -> list[OnlineStep]:
    transported = transport(
        [layer["W_dec"] for layer in layers], A, c, b_dec=[layer["b_dec"] for layer in layers]
    )
    steps: list[OnlineStep] = []
    for layer, k in zip(layers, ks, strict=True):
        encoder = {name: layer[name] for name in ("x", "weight", "bias", "W_dec")}
        codes = [one.code for one in steps]
        steps.append(step(op, k, **encoder, codes=codes, transported=transported, **options))
    return steps


@either
@pytest.mark.parametrize("leading", [(1,), (2, 3)], ids=["one-token", "batch-of-sequences"])
def test_layers_step_by_step_are_the_closed_loop_of_the_chain(leading, implementation, device):
    layers, ks, A, c = three_layers(leading, 11, torch.randn, device=device)
    steps = run_chain(online_step, layers, ks, A, c, implementation=implementation)
    rivals = closed_loop(layers, ks, A, c, torch.float32)
    truths = closed_loop(layers, ks, A, c, torch.float64)
    for ours, rival, truth in zip(steps, rivals, truths, strict=True):
        dense, rival_dense, true_dense = (scatter(*one.code, 40) for one in (ours, rival, truth))
        assert torch.equal(dense > 0, true_dense > 0)
        assert torch.equal(dense > 0, rival_dense > 0)
        assert_error_as_torch("acts", dense, rival_dense, true_dense)
        assert_error_as_torch("x_hat", ours.x_hat, rival.x_hat, truth.x_hat)


def closed_loop(layers, ks, A, c, dtype) -> list[OnlineStep]:
    layers = [{name: t.to(dtype) for name, t in layer.items()} for layer in layers]
    fields = ("x", "weight", "bias", "W_dec", "b_dec")
    x, weight, bias, W_dec, b_dec = ([layer[name] for layer in layers] for name in fields)
    A, c = ([t.to(dtype) for t in tensors] for tensors in (A, c))
    codes, x_hats = reference.encode_chain(
        x, weight, bias, ks, W_dec, A, c, b_dec=b_dec, loop="closed"
    )
    return [OnlineStep(*pair) for pair in zip(x_hats, codes, strict=True)]


@either
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_step_by_step_equal_the_reference_where_nothing_is_rounded(
    dtype, implementation, device
):
    # Identity maps: the transported dictionaries are whole numbers as well.
    layers, ks, _, c = three_layers((2,), 5, whole, dtype, device)
    eye = torch.eye(5, dtype=dtype, device=device)
    A = [eye, torch.cat([torch.zeros_like(eye), eye])]
    for layer in layers:  # the same scale at every layer: sums stay below 2⁸
        layer["weight"] *= (torch.rand_like(layer["weight"].float()) < 0.5).to(dtype)
    ours = run_chain(online_step, layers, ks, A, c, implementation=implementation)
    theirs = run_chain(reference.online_step, layers, ks, A, c)
    assert max(float(one.x_hat.abs().max()) for one in theirs) <= 256
    for one, other in zip(ours, theirs, strict=True):
        assert_same_step(one, other)


# -- launches and memory ---------------------------------------------------------------------------


def test_step_is_two_launches_and_a_third_for_earlier_codes(monkeypatch, device):
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    layers, ks, A, c = three_layers((2,), 5, whole, device=device)
    run_chain(online_step, layers, ks, A, c, implementation="triton")  # loads the kernels
    for module, name in (
        (encode_few, "gemv_kernel"),
        (triton_step, "select_decode_kernel"),
        (triton_decode, "decode_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    run_chain(online_step, layers, ks, A, c, implementation="triton")
    two = ["gemv_kernel", "select_decode_kernel"]
    assert launched == [*two, "decode_kernel", *two, "decode_kernel", *two]


def test_step_with_a_workspace_allocates_nothing(device):
    layers, ks, A, c = three_layers((2,), 67, whole, device=device)
    first, *_ = run_chain(online_step, layers, ks, A, c, implementation="triton")
    transported = transport([one["W_dec"] for one in layers], A, c, b_dec=c[:1] * 3)
    encoder = {name: layers[1][name] for name in ("x", "weight", "bias", "W_dec")}
    encoder |= {"codes": [first.code], "transported": transported, "implementation": "triton"}
    out = StepWorkspace.allocate(2, 40, 5, 67, dtype=torch.float32, device=device)
    assert allocates(lambda: step(online_step, 5, **encoder), device)
    assert not allocates(lambda: step(online_step, 5, **encoder, out=out), device)


def allocates(function, device) -> bool:
    if device.type != "cuda":
        return largest_allocation(function) > 0
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    function()
    return torch.cuda.memory_stats()["allocation.all.allocated"] > before


@either
@pytest.mark.parametrize("dtype", DTYPES)
def test_workspace_holds_the_result_and_gives_the_same_bits_again(dtype, implementation, device):
    inputs, others = (step_inputs((2, 3), 67, 90, torch.randn, dtype, device) for _ in range(2))
    free = step(online_step, 6, **inputs, implementation=implementation)
    out = StepWorkspace.allocate(6, 90, 6, 67, dtype=dtype, device=device)
    for tensor in out:
        tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    for _ in range(2):
        ours = step(online_step, 6, **inputs, out=out, implementation=implementation)
        assert_same_step(ours, free)
        for result, memory in zip((ours.x_hat, *ours.code), out, strict=False):
            assert result.data_ptr() == memory.data_ptr()
        step(online_step, 6, **others, out=out, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_step_runs_in_a_cuda_graph(device):
    inputs = step_inputs((2,), 67, 90, device=device)
    out = StepWorkspace.allocate(2, 90, 6, 67, dtype=torch.float32, device=device)
    expected = OnlineStep(*map(_cloned, step(online_step, 6, **inputs, out=out)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = step(online_step, 6, **inputs, out=out)
    for tensor in out:
        tensor.fill_(0)
    graph.replay()
    assert_same_step(ours, expected)


def _cloned(part):
    return part.clone() if isinstance(part, Tensor) else SparseCode(*(t.clone() for t in part))


# -- op --------------------------------------------------------------------------------------------


@either
def test_op_passes_opcheck(implementation, device):
    inputs = step_inputs((2,), 5, 24, whole, device=device)
    code = step(online_step, 3, **inputs).code
    tables = [inputs["W_dec"]], inputs["b_dec"]
    for b_dec, prediction, codes, (dictionaries, constant) in (
        (inputs["b_dec"], inputs["prediction"], ([], []), ([], None)),
        (None, None, ([code.acts], [code.indices]), tables),
    ):
        encoder = [inputs[name] for name in ("x", "weight", "bias", "W_dec")]
        out = StepWorkspace.allocate(2, 24, 3, 5, dtype=torch.float32, device=device)
        for tensor in out:
            tensor.zero_()
        torch.library.opcheck(
            torch.ops.resae.online_step.default,
            (*encoder, b_dec, prediction, *codes, dictionaries, constant, list(out)),
            {"implementation": implementation},
        )


@either
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "out"])
def test_compiled_equals_eager(given, implementation, device):
    inputs = step_inputs((2,), 5, 24, whole, device=device)
    out = StepWorkspace.allocate(2, 24, 3, 5, dtype=torch.float32, device=device) if given else None

    def twice(**tensors):
        first = step(online_step, 3, **tensors, out=out, implementation=implementation)
        return first.x_hat * 2, first.code.acts + 1, first.code.indices

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(**inputs), twice(**inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_refused():
    inputs = step_inputs((2,), 5, 24)
    inputs["W_dec"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"W_dec requires its gradient.*torch\.no_grad\(\)"):
        step(online_step, 3, **inputs)
    with torch.no_grad():
        assert not step(online_step, 3, **inputs).x_hat.requires_grad


# -- errors ----------------------------------------------------------------------------------------


def errors():
    x, W, v = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(4)
    code = SparseCode(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    two = transport([W, W], [torch.eye(4)], [v], b_dec=[v, v])
    small = StepWorkspace.allocate(1, 8, 3, 4, dtype=torch.float32, device="cpu")
    half = StepWorkspace.allocate(2, 8, 3, 4, dtype=torch.float16, device="cpu")
    return [
        pytest.param(
            {"x": torch.zeros(17, 4)},
            ValueError,
            "17 tokens, expected at most 16; use topk_encode and sparse_decode",
            id="too-many-tokens",
        ),
        pytest.param({"x": torch.zeros(2, 5)}, ValueError, r"expected \[..., 4\]", id="width-of-x"),
        pytest.param({"x": x.int()}, TypeError, "x has dtype torch.int32", id="integers"),
        pytest.param({"k": 0}, ValueError, "k=0, expected 1 ≤ k ≤ M=8", id="k-0"),
        pytest.param({"k": 9}, ValueError, "k=9, expected 1 ≤ k ≤ M=8", id="k-beyond-M"),
        pytest.param({"W_dec": W.half()}, TypeError, "W_dec has dtype torch.float16", id="dtype"),
        pytest.param({"W_dec": W[:7]}, ValueError, "the shape of weight", id="W_dec"),
        pytest.param(
            {"prediction": v}, ValueError, "prediction has shape.*the shape of x", id="prediction"
        ),
        pytest.param({"codes": [code]}, ValueError, "1 codes without transported", id="codes"),
        pytest.param(
            {"codes": [code] * 2, "transported": two},
            ValueError,
            "2 codes, but transported covers 2 layers",
            id="too-many-codes",
        ),
        pytest.param(
            {"transported": two, "b_dec": v}, ValueError, "b_dec together with", id="b_dec-twice"
        ),
        pytest.param(
            {"transported": two, "prediction": x},
            ValueError,
            "prediction together with",
            id="prediction-twice",
        ),
        pytest.param(
            {"codes": [SparseCode(*(t[:1] for t in code))], "transported": two},
            ValueError,
            r"codes\[0\] has shape \[1, 3\], expected \[2, 3\] \(the tokens of x\)",
            id="tokens-of-codes",
        ),
        pytest.param(
            {"out": small},
            ValueError,
            r"out\.x_hat is \[1, 4\].*expected \[2, 4\].*use StepWorkspace\.allocate\(2, 8, 3, 4",
            id="workspace-of-fewer-tokens",
        ),
        pytest.param({"out": half}, ValueError, "expected.*torch.float32", id="workspace-dtype"),
    ]


@pytest.mark.parametrize(("given", "error", "message"), errors())
def test_what_does_not_fit_is_an_error_that_says_so(given, error, message):
    inputs = {"x": torch.zeros(2, 4), "bias": None, "k": 3}
    inputs |= {"weight": torch.zeros(8, 4), "W_dec": torch.zeros(8, 4)} | given
    with pytest.raises(error, match=f"^online_step: .*{message}"):
        step(online_step, **inputs)


# -- on a CPU --------------------------------------------------------------------------------------


def large_step(dtype=torch.float32) -> dict[str, Tensor]:
    """Inputs of a step whose weight is large enough for screening."""
    return step_inputs((4,), 128, 1024, dtype=dtype)


needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_screens_in_one_call_and_follows_the_weight(dtype, monkeypatch):
    inputs = large_step(dtype)
    calls = []
    monkeypatch.setattr(
        native, "exact_encode", lambda *_: pytest.fail("the whole GEMM was computed")
    )
    compiled = native.online_step
    monkeypatch.setattr(native, "online_step", lambda *a: calls.append(a) or compiled(*a))
    for _ in range(3):
        with torch.no_grad():
            step(online_step, 6, **inputs)  # makes the copy
            calls.clear()
            ours = step(online_step, 6, **inputs)
        assert len(calls) == 1
        wide = {name: t.double() for name, t in inputs.items()}
        theirs = step(reference.online_step, 6, **wide)
        if dtype == torch.float32:  # in 16 bit other latents of equal score may be taken
            assert torch.equal(ours.code.indices, theirs.code.indices)
        loose = 1e-5 if dtype == torch.float32 else 0.02
        top = [code.acts.double().sort(-1).values for code in (ours.code, theirs.code)]
        torch.testing.assert_close(*top, atol=0, rtol=loose)
        inputs["weight"].mul_(-1.0)  # in place: the next step must see it
        inputs["x"] = torch.randn_like(inputs["x"])


@needs_native
def test_what_is_kept_for_a_weight_goes_with_it():
    inputs = large_step()
    step(online_step, 6, **inputs)
    kept = weakref.ref(online_step_module._ENCODERS[inputs["weight"]])
    again = step(online_step, 6, **inputs)
    assert online_step_module._ENCODERS[inputs["weight"]] is kept()
    del inputs["weight"], again
    gc.collect()
    assert kept() is None


def test_an_encoder_of_another_weight_is_refused():
    inputs = large_step()
    encoder = ScreenedEncoder(inputs["weight"].clone(), inputs["bias"])
    with pytest.raises(ValueError, match="encoder was made of another weight or bias"):
        step(online_step, 6, **inputs, encoder=encoder)


@needs_native
def test_a_written_sample_makes_the_copy_anew():
    """A write that torch does not count, to every latent."""
    inputs = large_step()
    encoder = ScreenedEncoder(inputs["weight"], inputs["bias"])
    with torch.no_grad():
        step(online_step, 6, **inputs, encoder=encoder)
        inputs["weight"].numpy()[:] *= 1.0001
        assert encoder.online_step(inputs["x"], 6, None, None, inputs["W_dec"]) is None
        inputs["weight"].numpy()[:] /= 1.0001
        ours = step(online_step, 6, **inputs, encoder=encoder)
    assert torch.equal(ours.code.indices, step(reference.online_step, 6, **inputs).code.indices)


def test_a_bias_of_the_same_address_and_another_layout_is_another_bias():
    """The encoder kept for a weight knew the address of its bias alone."""
    weight, biases = torch.randn(512, 64) / 8, torch.randn(512, 512)
    x = torch.randn(2, 64)
    for bias in (biases[0], biases[:, 0], biases[0, :1].expand(512)):
        code = online_step(x, weight, bias, 8, weight).code
        expected = reference.topk_encode(x.double(), weight.double(), bias.double(), 8)
        acts = code.acts.sort(descending=True).values
        torch.testing.assert_close(acts.double(), expected.acts, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="implementation='tritn', expected 'torch', 'triton' or"):
        online_step(x, weight, None, 8, weight, implementation="tritn")
