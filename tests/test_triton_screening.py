"""Screening in Triton finds the code of the exact path, bit by bit where all sums are exact."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from measured import DTYPES
from torch import Tensor

from resae_kernels import (
    ScreenedEncoder,
    SparseCode,
    StepWorkspace,
    online_step,
    threshold_encode,
    topk_encode,
    transport,
)
from resae_kernels import screened as screened_encode
from resae_kernels.screened import MARGINS
from resae_kernels.triton import screening
from resae_kernels.triton.selection import selection_layout

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
small = pytest.mark.usefixtures("screened_by_triton_at_any_size")
every_margin = pytest.mark.parametrize("margin", MARGINS)


def inputs(N: int, D: int, M: int, dtype=torch.float32) -> dict[str, Tensor]:
    """Eighths of small integers: every sum is exact in float32, in whatever order, and many scores
    are equal."""

    def draw(*shape: int) -> Tensor:
        return (torch.randint(-8, 9, shape) / 8).to(dtype)

    return {"x": draw(N, D), "weight": draw(M, D), "bias": draw(M)}


def screened(k: int, x, weight, bias=None, margin="statistical", **offsets) -> tuple:
    """Code and number of candidates of each row."""
    copy = screening.quantise(weight, bias, margin, seed=0)
    assert copy is not None
    options = {"pre_bias": None, "prediction": None, "sorted": True} | offsets
    rows = copy.encode(x, k, **options)
    assert isinstance(rows.candidates, Tensor)
    return SparseCode(rows.acts, rows.indices), rows.candidates.tolist()


def assert_exact(code: SparseCode, k: int, **arguments) -> None:
    """The code of the exact path by Triton, bit by bit."""
    exact = topk_encode(k=k, **arguments, implementation="triton")
    torch.testing.assert_close(code.acts, exact.acts, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(code.indices, exact.indices)


# -- the code --------------------------------------------------------------------------------------


@every_dtype
@every_margin
def test_random_rows_give_the_exact_code_from_few_candidates(device, margin, dtype):  # noqa: ARG001
    N, D, M, k = 3, 200, 2100, 9  # no multiples of tiles, groups or padding
    tensors = inputs(N, D, M, dtype)
    offsets = {"pre_bias": inputs(1, D, 1, dtype)["x"][0], "prediction": tensors["x"].flip(0)}
    for sorted in (True, False):
        code, candidates = screened(k, **tensors, margin=margin, **offsets, sorted=sorted)
        assert all(k <= n <= 120 for n in candidates), candidates
        assert_exact(code, k, **tensors, **offsets, sorted=sorted)


def test_the_most_rows_and_a_weight_stored_by_columns(device):  # noqa: ARG001
    tensors = inputs(16, 64, 1024, torch.bfloat16)
    tensors["weight"] = tensors["weight"].T.contiguous().T
    code, candidates = screened(5, **tensors)
    assert min(candidates) >= 5
    assert_exact(code, 5, **tensors)


@every_margin
def test_massive_activations_leave_few_candidates(device, margin):  # noqa: ARG001
    tensors = inputs(2, 128, 2048)
    tensors["x"][0, 5] = 3000.0
    tensors["x"][1, 7] = -4000.0
    code, candidates = screened(8, **tensors, margin=margin)
    assert all(8 <= n <= 256 for n in candidates), candidates
    assert_exact(code, 8, **tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_that_round_to_the_same_are_taken_by_index(device, dtype):  # noqa: ARG001
    # Both are less than half a unit in the last place above 1 + ULP: they are equal, and the first
    # wins, although the bounds of the second lie above those of the first.
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    x, weight = torch.ones(1, 64, dtype=dtype), torch.zeros(1024, 64, dtype=dtype)
    bias = torch.zeros(1024, dtype=dtype)
    bias[[3, 900]] = 1 + unit
    weight[3], weight[900] = unit / 16 / 64, unit * 7 / 16 / 64
    (acts, indices), candidates = screened(1, x, weight, bias)
    assert candidates == [2]
    assert (acts.item(), indices.item()) == (1 + unit, 3)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter's GEMM
def test_rows_that_cannot_be_screened_take_the_exact_path_alone(device):  # noqa: ARG001
    tensors = inputs(7, 96, 1024)
    x = tensors["x"]
    x[1, 3] = math.inf
    x[2, 4] = math.nan
    x[3] = 0.0
    x[4] *= 1e-30
    x[5] *= 2.0**70
    code, candidates = screened(4, **tensors)
    exact = [n < 0 for n in candidates]
    assert exact == [False, True, True, False, True, True, False]
    assert_exact(code, 4, **tensors)


def test_more_candidates_than_there_is_room_for_take_the_exact_path(device):  # noqa: ARG001
    tensors = inputs(2, 32, 1024)
    tensors["weight"][:] = tensors["weight"][:1]  # all scores are equal
    tensors["bias"][:] = 0.0
    tensors["x"][1] = -tensors["x"][0]  # and none is positive
    tensors["x"][0] *= torch.sign(tensors["x"][0] @ tensors["weight"][0])
    tensors["x"][1] = -tensors["x"][0]
    code, candidates = screened(4, **tensors)
    assert candidates == [-1, 0]
    assert_exact(code, 4, **tensors)
    assert code.indices[0].tolist() == [0, 1, 2, 3]
    assert code.acts[1].tolist() == [0.0] * 4


def test_a_score_outside_its_bounds_sends_its_row_to_the_exact_path(device):  # noqa: ARG001
    tensors = inputs(2, 64, 1024)
    copy = screening.quantise(tensors["weight"], tensors["bias"], "statistical", seed=0)
    assert copy is not None
    tensors["weight"].data.copy_(inputs(1, 64, 1024)["weight"])
    rows = copy.encode(tensors["x"], 6, None, None, True)
    assert isinstance(rows.candidates, Tensor)
    assert rows.candidates.tolist() == [-1, -1]
    assert_exact(SparseCode(rows.acts, rows.indices), 6, **tensors)


# -- thresholds ------------------------------------------------------------------------------------


def assert_exact_above(
    threshold: Tensor, k: int, margin="statistical", *, sorted=True, **arguments
) -> list[int]:
    """Screening finds the code and the count of the exact path by Triton, bit by bit. Returns the
    number of candidates of each row."""
    weight = arguments["weight"]
    copy = screening.quantise(weight, arguments["bias"], margin, seed=0)
    assert copy is not None
    offsets = {name: arguments.get(name) for name in ("pre_bias", "prediction")}
    levels = threshold.expand(len(weight))
    rows = copy.encode(arguments["x"], k, **offsets, sorted=sorted, threshold=levels)
    exact = threshold_encode(
        **arguments, threshold=threshold, max_active=k, sorted=sorted, implementation="triton"
    )
    torch.testing.assert_close(rows.acts, exact.acts, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows.indices, exact.indices)
    assert rows.n_active is not None
    assert torch.equal(rows.n_active, exact.n_active)
    assert isinstance(rows.candidates, Tensor)
    return rows.candidates.tolist()


def level_of(k: int, x, weight, bias, **_offsets) -> float:
    """The k-th largest score of the first row: a threshold that it reaches and does not pass."""
    return float((x[0].double() @ weight.double().T + bias.double()).sort().values[-k])


@pytest.mark.parametrize(
    ("margin", "dtype"),
    [
        pytest.param("statistical", torch.float32, id="fp32"),
        pytest.param("statistical", torch.bfloat16, id="bf16"),
        pytest.param("statistical", torch.float16, id="fp16"),
        pytest.param("certain", torch.float32, id="certain"),
    ],
)
def test_latents_above_their_thresholds_are_those_of_the_exact_path(device, margin, dtype):
    N, D, M, k = 2, 150, 1100, 9  # no multiples of tiles, groups or padding
    tensors = inputs(N, D, M, dtype)
    tensors["pre_bias"] = inputs(1, D, 1, dtype)["x"][0]
    tensors["prediction"] = tensors["x"].flip(0) / 2
    one = torch.tensor(level_of(6, **tensors), dtype=dtype, device=device)
    each = one + (torch.randint(-8, 9, (M,)) / 8).to(dtype)
    for threshold, sorted in ((one, True), (each, False)):
        candidates = assert_exact_above(threshold, k, margin, sorted=sorted, **tensors)
        assert all(0 <= n <= 200 for n in candidates), candidates


def test_a_score_equal_to_its_threshold_is_not_above_it(device):
    tensors = inputs(1, 64, 1024)
    level = torch.tensor(level_of(3, **tensors), device=device)
    assert_exact_above(level, 4, **tensors)
    code = threshold_encode(**tensors, threshold=level, max_active=4, implementation="triton")
    assert (code.acts[0, : int(code.n_active)] > level).all()
    assert int(code.n_active) < 3


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter's GEMM
def test_thresholds_of_every_kind_and_rows_of_the_exact_path(device):
    tensors = inputs(4, 96, 1024)
    each = torch.full((1024,), level_of(5, **tensors), device=device)
    each[::7], each[1::7], each[2::7] = math.nan, math.inf, -1.0  # −1: as 0
    tensors["bias"][2::7] = -100.0  # of which few are positive then
    tensors["x"][1, 3] = math.inf
    tensors["x"][2] = 0.0
    exact = [n < 0 for n in assert_exact_above(each, 6, **tensors)]
    assert exact == [False, True, False, False]


def test_more_active_latents_than_slots_are_counted(device):
    tensors = inputs(2, 64, 1024)
    level = torch.tensor(level_of(40, **tensors), device=device)
    candidates = assert_exact_above(level, 8, **tensors)
    assert max(candidates) > 8
    # With ReLU half of the latents are candidates, and there is no room for them.
    assert assert_exact_above(torch.zeros((), device=device), 8, **tensors) == [-1, -1]


# -- the bounds ------------------------------------------------------------------------------------


@every_margin
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_every_score_lies_within_its_bounds(device, margin, size):  # noqa: ARG001
    N, D, M = 4, 333, 1024
    x, weight, bias = torch.randn(N, D) * size, torch.randn(M, D), torch.randn(M) * size
    x[1, 2] *= 500
    weight[::3, 7] *= 50
    copy, layout = screening.quantise(weight, bias, margin, seed=0), selection_layout(M, 8)
    assert copy is not None
    assert layout is not None
    _, facts, upper, *_ = screening.launch_bounds(copy, x, None, None, layout)
    high = upper[:, :M].contiguous().view(torch.float32).double()
    rows, terms = facts.double(), copy.terms.double()
    width = rows[:, 2:3] * terms[1] + rows[:, 3:] * terms[2]
    scores = x.double() @ weight.double().T + bias.double()
    positive = high > 0
    assert (scores[~positive] <= 0).all()
    assert (scores <= high)[positive].all()
    slack = 1e-5 * high
    assert (scores >= high - 2 * width - slack)[positive].all()
    # One entry of 500 times the usual size in the residual adds less than the weight's own error.
    assert (rows[:, 3:] * terms[2] < 0.5 * rows[:, 2:3] * terms[1]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_weights_that_could_overflow_have_no_copy(bad):
    weight, bias = torch.ones(8, 4), torch.zeros(8)
    assert screening.quantise(weight, bias, "certain", 0) is not None
    weight[3, 2] = bad
    assert screening.quantise(weight, bias, "certain", 0) is None
    assert screening.quantise(torch.ones(8, 4), bias.fill_(bad), "certain", 0) is None


# -- the public object -----------------------------------------------------------------------------


@small
def test_an_encoder_screens_and_follows_its_weight(device):  # noqa: ARG001
    tensors = inputs(2, 64, 1024)
    encoder = ScreenedEncoder(tensors["weight"], tensors["bias"], implementation="triton")
    x = tensors["x"].view(2, 1, 64)
    info = encoder.encode_with_info(x, 4)
    assert (info.rows_screened, info.rows_exact, info.implementation) == (2, 0, "triton")
    assert 8 <= info.candidates <= 200
    assert info.code.acts.shape == (2, 1, 4)
    tensors["weight"].neg_()  # counted by torch: the copy is made anew
    info = encoder.encode_with_info(tensors["x"], 4)
    assert (info.rows_exact, info.reason) == (0, None)
    assert_exact(info.code, 4, **tensors)
    tensors["x"][0, 0] = math.nan
    info = encoder.encode_with_info(tensors["x"], 4)
    assert (info.rows_screened, info.rows_exact) == (1, 1)
    assert info.reason == screened_encode.ROW_REASON


@small
def test_an_encoder_screens_thresholds(device):
    tensors = inputs(2, 64, 1024)
    level = torch.tensor(level_of(5, **tensors), device=device)
    encoder = ScreenedEncoder(tensors["weight"], tensors["bias"], implementation="triton")
    info = encoder.threshold_encode_with_info(tensors["x"].view(2, 1, 64), level, 8)
    assert (info.rows_screened, info.rows_exact, info.reason) == (2, 0, None)
    exact = threshold_encode(**tensors, threshold=level, max_active=8, implementation="triton")
    assert info.code.n_active.shape == (2, 1)
    assert torch.equal(info.code.n_active.flatten(), exact.n_active)
    assert torch.equal(info.code.acts.flatten(0, 1), exact.acts)
    assert torch.equal(info.code.indices.flatten(0, 1), exact.indices)


@small
@pytest.mark.parametrize("given", ["nothing", "prediction", "codes", "workspace"])
def test_an_online_step_encodes_by_its_encoder_with_the_same_bits(device, given):
    tensors = inputs(2, 64, 1024)
    W_dec, b_dec = inputs(1, 64, 1024)["weight"], inputs(1, 64, 1)["x"][0]
    more: dict[str, Any] = {"implementation": "triton"}
    if given == "codes":
        code = inputs(2, 4, 1)["x"].abs(), torch.randint(1024, (2, 4), device=device)
        A, c = torch.eye(64, device=device), [b_dec]
        more |= {"codes": [code], "transported": transport([W_dec] * 2, [A], c, b_dec=[b_dec] * 2)}
    else:
        more |= {"b_dec": b_dec}
    if given == "prediction":
        more["prediction"] = tensors["x"].flip(0) / 2
    step = partial(online_step, **tensors, k=4, W_dec=W_dec, **more)
    x_hat, code = step()
    encoder = ScreenedEncoder(tensors["weight"], tensors["bias"], implementation="triton")
    if given == "workspace":
        step = partial(
            step, out=StepWorkspace.allocate(2, 1024, 4, 64, dtype=x_hat.dtype, device=device)
        )
    ours, its_code = step(encoder=encoder)
    assert encoder._state is not None  # it has screened
    for found, expected in zip((ours, *its_code), (x_hat, *code), strict=True):
        assert torch.equal(found, expected)
    other = ScreenedEncoder(W_dec, tensors["bias"], implementation="triton")
    with pytest.raises(ValueError, match="encoder was made of another weight"):
        step(encoder=other)


@small
def test_gradients_are_those_of_the_exact_path(device):  # noqa: ARG001
    tensors = inputs(2, 64, 1024)
    encoder = ScreenedEncoder(tensors["weight"], tensors["bias"], implementation="triton")
    x = tensors["x"].requires_grad_()
    found = [
        torch.autograd.grad((code.acts * torch.arange(1.0, 5.0, device=x.device)).sum(), x)[0]
        for code in (encoder.encode(x, 4), topk_encode(k=4, **tensors, implementation="triton"))
    ]
    assert torch.equal(*found)


@small
def test_what_is_not_screened_takes_the_exact_path_and_says_why(device):  # noqa: ARG001
    tensors = inputs(17, 64, 1024)
    x, weight = tensors["x"], tensors["weight"]
    encoder = ScreenedEncoder(weight, implementation="triton")

    def reason(x: Tensor, k: int = 4) -> str:
        return str(encoder.encode_with_info(x, k).reason)

    assert "17 rows, at most 16" in reason(x)
    assert "does not pay at M=1024, D=64, k=80" in reason(x[:1], 80)
    assert "the GEMM is not in float32" in str(encoder._exact_reason(x.half(), 1, 4, False))
    info = encoder.threshold_encode_with_info(x[:2], torch.zeros((), device=x.device), 80)
    assert "does not pay at M=1024, D=64, max_active=80" in str(info.reason)
    weight.requires_grad_()
    assert "the weight requires its gradient" in reason(x[:2])


def test_small_dictionaries_and_unasked_encoders_are_not_screened_by_triton(device):  # noqa: ARG001
    tensors = inputs(1, 64, 1024)
    asked = ScreenedEncoder(tensors["weight"], implementation="triton")
    assert "does not pay" in str(asked.encode_with_info(tensors["x"], 4).reason)
    assert ScreenedEncoder(tensors["weight"]).implementation != "triton"


def test_triton_is_refused_for_a_weight_that_it_cannot_read(monkeypatch):
    monkeypatch.setattr("resae_kernels.dispatch.runtime.is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="ScreenedEncoder: implementation='triton' needs a CUDA"):
        ScreenedEncoder(torch.zeros(4, 2, device="cpu"), implementation="triton")
