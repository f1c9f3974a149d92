"""Codes above thresholds (JumpReLU, BatchTopK, ReLU) by every path: compiled, torch, Triton, and
screened by either implementation. The specification is `reference.threshold_encode`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import DTYPES, assert_error_as_torch, largest_allocation
from torch import Tensor

from resae_kernels import ScreenedEncoder, ThresholdCode, reference, threshold_encode, topk_encode
from resae_kernels.cpu import native, selection
from resae_kernels.screened import MARGINS
from resae_kernels.triton import selection as triton_selection
from resae_kernels.triton import tiles

pytestmark = pytest.mark.usefixtures("poisoned_memory")

inf, nan = math.inf, math.nan
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES |= {"fp64": torch.float64}


def paths(**dtypes: str):
    """Parametrize `path` and `dtype`. Interpreted kernels are slow: few dtypes for these."""
    pairs = [
        pytest.param(path, NAMES[name], id=f"{path}-{name}")
        for path, names in dtypes.items()
        for name in names.split()
    ]
    return pytest.mark.parametrize(("path", "dtype"), pairs, indirect=["path"])


@pytest.fixture(params=["compiled", "torch", "triton"])
def path(request, monkeypatch):
    """An implementation's name, for `implementation=`; "compiled" and "torch" are both torch."""
    if request.param == "triton":
        request.getfixturevalue("device")
        return "triton"
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda *_: False)
    elif native.unavailable():
        pytest.skip(native.unavailable())
    return "torch"


def encoder_inputs(leading, D, M, dtype=torch.float64) -> dict[str, Tensor]:
    return {
        "x": torch.randn(*leading, D).to(dtype),
        "weight": torch.randn(M, D).to(dtype),
        "bias": torch.randn(M).to(dtype),
        "threshold": torch.randn(M).to(dtype),
        "pre_bias": torch.randn(D).to(dtype),
        "prediction": torch.randn(*leading, D).to(dtype),
    }


def exact_inputs(leading, D, M, dtype) -> dict[str, Tensor]:
    """Small integers: sums are exact in every dtype, so that codes agree bit by bit, with many
    ties and many scores equal to their threshold."""
    inputs = encoder_inputs(leading, D, M, dtype)
    return {name: torch.randint(-2, 3, t.shape).to(dtype) for name, t in inputs.items()}


def encode(op, max_active, *, bias=None, **arguments) -> ThresholdCode:
    x, weight, threshold = (arguments.pop(name) for name in ("x", "weight", "threshold"))
    return op(x, weight, bias, threshold, max_active, **arguments)


def assert_same_code(ours: ThresholdCode, theirs: ThresholdCode) -> None:
    assert isinstance(ours, ThresholdCode)
    assert ours.n_active.dtype == torch.int32
    assert torch.equal(ours.n_active, theirs.n_active)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.acts, theirs.acts, rtol=0, atol=0, equal_nan=True)


# -- equals the reference --------------------------------------------------------------------------

SHAPES = [
    pytest.param((5,), 4, 8, 3, id="small"),
    pytest.param((0,), 4, 8, 3, id="no-tokens"),
    pytest.param((2, 0), 4, 8, 3, id="no-tokens-in-a-batch"),
    pytest.param((), 4, 8, 3, id="a-vector"),
    pytest.param((17,), 19, 53, 7, id="primes"),
    pytest.param((2, 3), 5, 8, 2, id="batch-of-sequences"),
    pytest.param((6,), 12, 8, 1, id="room-for-one"),
    pytest.param((20,), 12, 70, 70, id="room-for-all"),
    pytest.param((6,), 3, 1, 1, id="M-1"),
]


@paths(compiled="fp32 bf16 fp16", torch="fp32 bf16 fp64", triton="bf16")
@pytest.mark.parametrize(("leading", "D", "M", "max_active"), SHAPES)
def test_code_and_count_are_those_of_the_reference(path, leading, D, M, max_active, dtype):
    inputs = exact_inputs(leading, D, M, dtype)
    for sorted_ in (True, False):
        code = encode(threshold_encode, max_active, **inputs, sorted=sorted_, implementation=path)
        assert code.acts.shape == code.indices.shape == (*leading, max_active)
        assert code.n_active.shape == leading
        assert_same_code(
            code, encode(reference.threshold_encode, max_active, **inputs, sorted=sorted_)
        )


@pytest.mark.parametrize("absent", ["bias", "pre_bias", "prediction", "all"])
def test_optional_inputs_may_be_absent(path, absent):
    inputs = exact_inputs((20,), 5, 40, torch.float32)
    for name in ("bias", "pre_bias", "prediction"):
        if absent in (name, "all"):
            del inputs[name]
    ours = encode(threshold_encode, 9, **inputs, implementation=path)
    assert_same_code(ours, encode(reference.threshold_encode, 9, **inputs))


@paths(compiled="fp32 bf16 fp16", torch="fp32 bf16 fp16", triton="fp32 fp16")
@pytest.mark.parametrize("N", [3, 18])
def test_acts_are_as_close_to_fp64_as_plain_torch(path, dtype, N):
    inputs = encoder_inputs((N,), 19, 53, dtype)
    acts, indices, _ = encode(threshold_encode, 40, **inputs, implementation=path)
    assert (acts > 0).sum() > 5 * N

    def dense(x, weight, bias, threshold, pre_bias, prediction):
        scores = (x - prediction - pre_bias) @ weight.T + bias
        return (scores.relu() * (scores > threshold)).gather(-1, indices) * (acts > 0)

    # Where a score is within rounding of its threshold, dense torch may not take what we take.
    plain, truth = dense(**inputs), dense(**{n: t.double() for n, t in inputs.items()})
    same = (plain > 0) == (truth > 0)
    assert same.float().mean() > 0.9
    assert_error_as_torch("acts", acts[same], plain[same], truth[same])


def test_chunks_of_rows_change_nothing(path):
    inputs = exact_inputs((20,), 6, 64, torch.bfloat16)
    whole = encode(threshold_encode, 9, **inputs, implementation=path)
    for workspace_bytes in (64 * 4, 64 * 4 * 7):
        parts = encode(
            threshold_encode, 9, **inputs, workspace_bytes=workspace_bytes, implementation=path
        )
        assert_same_code(parts, whole)


def test_no_more_scores_are_held_than_the_workspace_allows():
    x, weight, threshold = torch.randn(200, 8), torch.randn(4096, 8), torch.full((4096,), 5.0)
    held = 20 * 4096 * 4
    most = largest_allocation(
        lambda: threshold_encode(x, weight, None, threshold, 64, workspace_bytes=held)
    )
    assert most <= held


# -- which latents ---------------------------------------------------------------------------------

# (scores of one token, thresholds, max_active, acts by value, indices by value, n_active)
CASES = [
    pytest.param([3, 1, 2], [0, 0, 0], 3, [3, 2, 1], [0, 2, 1], 3, id="relu"),
    pytest.param([3, 1, 2], [4, 0, 1], 2, [2, 1], [2, 1], 2, id="one-below-its-threshold"),
    pytest.param([1, 1, 2], [1, 0, 2], 2, [1, 0], [1, 0], 1, id="equal-is-not-above"),
    pytest.param([1, 2, 3], [9, 9, 9], 2, [0, 0], [0, 0], 0, id="nothing-active"),
    pytest.param([1, 2, 3], [0, 0, 0], 3, [3, 2, 1], [2, 1, 0], 3, id="all-active"),
    pytest.param([1, 2, 3], [0, 0, 0], 1, [3], [2], 3, id="overflow"),
    pytest.param([2, 3, 2, 2], [0] * 4, 2, [3, 2], [1, 0], 4, id="tie-at-the-limit"),
    pytest.param([5, 3, 2, 2], [6, 0, 2, 0], 2, [3, 2], [1, 3], 2, id="tie-with-one-below"),
    pytest.param([-1, 0, 2], [-3, -3, -3], 3, [2, 0, 0], [2, 0, 0], 1, id="negative-threshold"),
    pytest.param([-1, 1, 2], [-inf] * 3, 3, [2, 1, 0], [2, 1, 0], 2, id="threshold-minus-inf"),
    pytest.param([1, inf, 2], [inf] * 3, 2, [0, 0], [0, 0], 0, id="threshold-inf"),
    pytest.param([1, inf, 2], [0, 9, 3], 2, [inf, 1], [1, 0], 2, id="score-inf"),
    pytest.param([1, -inf, 2], [0, -inf, 3], 2, [1, 0], [0, 0], 1, id="score-minus-inf"),
    pytest.param([1, nan, 2], [0, 0, 0], 2, [nan, 2], [1, 2], 3, id="nan-first"),
    pytest.param([1, nan, 2], [inf] * 3, 2, [nan, 0], [1, 0], 1, id="nan-above-inf"),
    pytest.param([inf, 1, nan], [nan] * 3, 2, [nan, 0], [2, 0], 1, id="threshold-nan"),
    pytest.param([nan] * 3, [0] * 3, 2, [nan, nan], [0, 1], 3, id="all-nan"),
    pytest.param([0.0, -0.0, 1], [-0.0, -1, 0.0], 2, [1, 0], [2, 0], 1, id="signed-zeros"),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@paths(compiled="fp32 bf16 fp16", torch="fp32 bf16 fp64", triton="bf16")
@pytest.mark.parametrize(("scores", "threshold", "k", "acts", "indices", "n_active"), CASES)
def test_selection(path, dtype, scores, threshold, k, acts, indices, n_active):
    N = 2 if path == "triton" else 20
    # A row is the weight of its own encoder of width 1, on x = 1: no entry meets another.
    given_ = torch.ones(N, 1, dtype=dtype), torch.tensor(scores, dtype=dtype)[:, None], None
    threshold = torch.tensor(threshold, dtype=dtype)
    expected = ThresholdCode(
        torch.tensor([acts] * N, dtype=dtype),
        torch.tensor([indices] * N),
        torch.tensor([n_active] * N, dtype=torch.int32),
    )
    assert_same_code(threshold_encode(*given_, threshold, k, implementation=path), expected)
    assert_same_code(reference.threshold_encode(*given_, threshold, k), expected)


LEVELS = st.sampled_from([-inf, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0, inf, nan])


@st.composite
def score_rows(draw):
    M, N = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    row = st.lists(LEVELS, min_size=M, max_size=M)
    rows, threshold = draw(st.lists(row, min_size=N, max_size=N)), draw(row)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    tensors = torch.tensor(rows, dtype=dtype), torch.tensor(threshold, dtype=dtype)
    return *tensors, draw(st.integers(1, M)), draw(st.booleans())


@given(case=score_rows())
def test_any_scores_and_thresholds(case):
    scores, threshold, k, sorted_ = case
    acts, indices, n_active = selection.select_above(scores, threshold, k, sorted_)
    for row, *ours in zip(scores.tolist(), acts, indices, n_active.tolist(), strict=True):
        levels = threshold.tolist()
        active = [m for m, s in enumerate(row) if math.isnan(s) or (s > levels[m] and s > 0)]
        best = sorted(active, key=lambda m: (0, 0, m) if math.isnan(row[m]) else (1, -row[m], m))
        chosen = best[:k] if sorted_ else sorted(best[:k])
        padding = [0] * (k - len(chosen))
        assert ours[2] == len(active)
        assert ours[1].tolist() == chosen + padding
        expected = torch.tensor([row[m] for m in chosen] + padding, dtype=acts.dtype)
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 30, 300, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_cut_at_the_limit(dtype, k):
    """More active latents than a list of the compiled library holds at once, ties and NaN among
    them."""
    scores = torch.randint(-3, 9, (6, 2000)).to(dtype)
    scores[1, ::7] = nan
    threshold = torch.randint(-2, 4, (2000,)).to(dtype)
    weight = torch.eye(2000, dtype=dtype)
    given_ = (scores[:1], weight, None, threshold, k)  # NaN would meet the zeros of the weight
    assert_same_code(threshold_encode(*given_), reference.threshold_encode(*given_))
    active = ((scores > threshold) & (scores > 0)) | scores.isnan()
    acts, indices, n_active = selection.select_above(scores, threshold, k, True)
    expected = selection.select(torch.where(active, scores, 0.0), k, True)
    assert torch.equal(n_active, active.sum(1).int())
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(acts, expected[0], rtol=0, atol=0, equal_nan=True)


def test_threshold_zero_is_topk_and_one_threshold_serves_all(path):
    inputs = exact_inputs((30,), 6, 64, torch.float32)
    code = encode(threshold_encode, 9, **inputs | {"threshold": torch.tensor(0.0)})
    x, weight, bias, _, pre_bias, prediction = inputs.values()
    topk = topk_encode(x, weight, bias, 9, pre_bias=pre_bias, prediction=prediction)
    assert torch.equal(code.acts, topk.acts)
    assert torch.equal(code.indices, topk.indices)
    one, each = (
        encode(threshold_encode, 9, **inputs | {"threshold": t}, implementation=path)
        for t in (torch.tensor(2.0), torch.full((64,), 2.0))
    )
    assert_same_code(one, each)


# -- layouts, composition, errors ------------------------------------------------------------------


def test_any_layout(path):
    inputs = exact_inputs((6, 4), 5, 40, torch.float32)
    strided = {
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": inputs["weight"].T.contiguous().T,
        "bias": inputs["bias"].repeat_interleave(2)[::2],
        "threshold": inputs["threshold"].repeat_interleave(2)[::2],
        "pre_bias": inputs["pre_bias"].repeat_interleave(2)[::2],
        "prediction": inputs["prediction"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    assert not any(t.is_contiguous() for t in strided.values())
    ours = encode(threshold_encode, 7, **strided, implementation=path)
    assert_same_code(ours, encode(reference.threshold_encode, 7, **inputs))
    expanded = inputs | {"prediction": inputs["prediction"][:1, :1].expand(6, 4, 5)}
    ours = encode(threshold_encode, 7, **expanded, implementation=path)
    assert_same_code(ours, encode(reference.threshold_encode, 7, **expanded))


def test_op_passes_opcheck():
    x, weight, bias, threshold, pre_bias, prediction = encoder_inputs((5,), 4, 8).values()
    for optional in ((bias, pre_bias, prediction), (None, None, None)):
        arguments = (x, weight, optional[0], threshold, 3, *optional[1:], True, 1 << 20, "torch")
        torch.library.opcheck(torch.ops.resae.threshold_encode.default, arguments)


def test_compiled_equals_eager():
    inputs = exact_inputs((5,), 4, 8, torch.float32)

    def code(**tensors):
        return encode(threshold_encode, 3, **tensors)

    compiled = torch.compile(code, fullgraph=True, backend="aot_eager")
    assert_same_code(compiled(**inputs), code(**inputs))


def test_meta_tensors_give_shapes():
    x, weight = torch.empty(2, 3, 4, device="meta"), torch.empty(8, 4, device="meta")
    code = threshold_encode(x, weight, None, torch.empty(8, device="meta"), 5)
    assert code.acts.shape == code.indices.shape == (2, 3, 5)
    assert code.n_active.shape == (2, 3)
    assert {t.device.type for t in code} == {"meta"}


def test_autocast_casts_every_input():
    inputs = encoder_inputs((5,), 4, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = encode(threshold_encode, 3, **inputs)
    narrow = {n: t.bfloat16() for n, t in inputs.items()}
    assert_same_code(ours, encode(threshold_encode, 3, **narrow))


@pytest.mark.parametrize("wants", ["x", "weight", "bias", "threshold", "pre_bias", "prediction"])
def test_a_backward_pass_is_refused(wants):
    inputs = encoder_inputs((5,), 4, 8)
    inputs[wants].requires_grad_()
    code = encode(threshold_encode, 3, **inputs)
    with pytest.raises(RuntimeError, match="threshold_encode: has no gradient.*torch.no_grad"):
        code.acts.sum().backward()
    assert not code.n_active.requires_grad


BAD = [
    pytest.param({"max_active": 0}, ValueError, "max_active=0, expected at least 1", id="no-room"),
    pytest.param({"max_active": 9}, ValueError, "max_active=9 exceeds .* M=8", id="too-much-room"),
    pytest.param(
        {"threshold": torch.zeros(7)}, ValueError, r"threshold has shape \[7\], .*\[8\]", id="shape"
    ),
    pytest.param(
        {"threshold": torch.zeros(8, dtype=torch.float64)},
        TypeError,
        "threshold has dtype torch.float64, weight has torch.float32",
        id="dtype",
    ),
    pytest.param({"x": torch.zeros(5, 3)}, ValueError, r"x has shape \[5, 3\]", id="width"),
    pytest.param({"implementation": "cuda"}, ValueError, "'torch', 'triton'", id="implementation"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    inputs = encoder_inputs((5,), 4, 8, torch.float32) | {"max_active": 3} | change
    with pytest.raises(error, match=f"^threshold_encode: .*{message}"):
        encode(threshold_encode, inputs.pop("max_active"), **inputs)


# -- Triton ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 64], ids=["default", "strips"])
def test_triton_selection_of_special_values(device, dtype, columns):
    """Ties, inf and NaN in scores and thresholds; 150 latents fill no last strip or group."""
    levels = torch.tensor([-inf, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0, inf, nan]).to(dtype)
    scores, threshold = (levels[torch.randint(9, shape)] for shape in ((4, 150), (150,)))
    scores[0], scores[1] = 3.0, -1.0
    acts, indices = scores.new_empty(4, 20), torch.empty(4, 20, dtype=torch.int64)
    n_active = torch.empty(4, dtype=torch.int32)
    layout = triton_selection.selection_layout(150, 20)
    assert layout is not None
    assert scores.device.type == device.type
    tile = tiles.SelectTile(keys_per_thread=16, columns=columns)
    for by_value in (True, False):
        with tiles.override_tiles({"select": tile}):
            triton_selection.launch_select(
                scores, None, acts, indices, layout, by_value, threshold, n_active
            )
        expected = selection.select_above(scores, threshold, 20, by_value)
        assert_same_code(ThresholdCode(acts, indices, n_active), ThresholdCode(*expected))


# -- screened --------------------------------------------------------------------------------------

screens = pytest.mark.usefixtures("screened_at_any_size")


def screened_inputs(dtype=torch.float32) -> dict[str, Tensor]:
    x, prediction = torch.randn(2, 40, 96)
    weight, bias = torch.randn(700, 96) / math.sqrt(96), 0.3 * torch.randn(700)
    threshold, pre_bias = 2.5 + torch.rand(700), 0.5 * torch.randn(96)
    named = {"x": x, "weight": weight, "bias": bias, "threshold": threshold}
    named |= {"pre_bias": pre_bias, "prediction": prediction}
    return {name: t.to(dtype) for name, t in named.items()}


def screened(inputs: dict[str, Tensor], max_active: int, *, margin="statistical", **options):
    rest = dict(inputs)
    encoder = ScreenedEncoder(rest.pop("weight"), rest.pop("bias"), margin=margin)
    return encoder.threshold_encode_with_info(
        rest.pop("x"), rest.pop("threshold"), max_active, **rest, **options
    )


def assert_within_rounding(code: ThresholdCode, inputs: dict[str, Tensor]) -> None:
    """What is active in float64 beyond doubt is in the code, and nothing that beyond doubt is not:
    the rows must not overflow."""
    x, weight, bias, threshold, pre_bias, prediction = (t.double() for t in inputs.values())
    eps = torch.finfo(code.acts.dtype).eps
    rest = (x - prediction - pre_bias).to(code.acts.dtype).double()
    scores = rest @ weight.T + bias
    room = eps * (scores.abs() + threshold.abs().clamp_max(1e6))
    room += 2e-6 * (rest.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs())
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for row, indices, count in zip(taken, code.indices, code.n_active.tolist(), strict=True):
        row[indices[:count]] = True
    level = threshold.clamp_min(0.0)
    assert taken[scores - room > level].all(), "an active latent is missing"
    assert not taken[scores + room <= level].any(), "a latent below its threshold is in the code"
    assert torch.equal(taken.sum(1).int(), code.n_active), "a latent twice"
    off = (code.acts.double() - scores.gather(1, code.indices)).abs()
    assert (off <= room.gather(1, code.indices))[code.acts > 0].all()


@screens
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("sorted_", [True, False], ids=["by-value", "by-index"])
@pytest.mark.parametrize("N", [1, 40])
def test_screened_code_is_that_of_the_exact_path(margin, sorted_, N):
    inputs = screened_inputs()
    inputs |= {name: inputs[name][:N] for name in ("x", "prediction")}
    exact = encode(threshold_encode, 200, **inputs, sorted=sorted_)
    assert (exact.n_active > 0).all()
    found = screened(inputs, 200, margin=margin, sorted=sorted_)
    assert (found.rows_screened, found.rows_exact, found.reason) == (N, 0, None)
    assert exact.n_active.sum() <= found.candidates < N * 700 // 4
    assert torch.equal(found.code.indices, exact.indices)
    assert torch.equal(found.code.n_active, exact.n_active)
    assert_within_rounding(found.code, inputs)


@screens
@pytest.mark.parametrize("margin", MARGINS)
def test_screened_overflow_is_counted_and_the_largest_are_kept(margin):
    inputs = screened_inputs()
    found, exact = screened(inputs, 5, margin=margin), encode(threshold_encode, 5, **inputs)
    assert (exact.n_active > 5).any()
    assert (exact.n_active < 5).any() or exact.n_active.min() > 0
    assert found.rows_exact == 0
    assert torch.equal(found.code.n_active, exact.n_active)
    assert torch.equal(found.code.indices, exact.indices)


@screens
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    "case", ["infinite", "huge", "large bias", "equal", "outliers", "tiny", "nan", "one for all"]
)
def test_screened_adversarial_thresholds(margin, case):
    inputs = screened_inputs()
    x, weight, bias, threshold, *_ = inputs.values()
    if case == "infinite":
        threshold[::2] = inf
    elif case == "huge":
        threshold[::2] = torch.logspace(1, 38, 350)
    elif case == "large bias":  # of which the thresholds take away nearly all
        bias += 300.0
        threshold += 300.0
    elif case == "equal":  # latents that are the same, with thresholds equal to scores
        scores = reference._scores(x, weight, bias, inputs["pre_bias"], inputs["prediction"])
        threshold[:] = scores[0].clamp_min(2.0)
    elif case == "outliers":
        x[:, 5] += 1000.0
        x[::3, 40] -= 500.0
    elif case == "tiny":
        for t in (x, inputs["prediction"], inputs["pre_bias"], bias, threshold):
            t *= 1e-12
    elif case == "nan":
        threshold[::2] = nan
    else:
        threshold = inputs["threshold"] = torch.tensor(3.0)
    found = screened(inputs, 700, margin=margin)
    assert found.rows_exact == (40 if case == "outliers" and found.rows_exact else 0)
    inputs["threshold"] = threshold.expand(700).nan_to_num(nan=inf, posinf=inf)
    assert_within_rounding(found.code, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("amx", [True, False])
def test_compiled_screening_above_thresholds(dtype, margin, threads, amx):
    from resae_kernels.cpu.screening_native import NativeCopy

    if native.unavailable() or (amx and not native.has_amx()):
        pytest.skip(native.unavailable() or "this processor has no AMX")
    inputs = screened_inputs(dtype)
    x, weight, bias, threshold, pre_bias, prediction = inputs.values()
    copied = NativeCopy(weight, bias, margin, seed=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for N in (1, 16, 40):
            found = copied.encode(x[:N], 300, pre_bias, prediction[:N], True, threshold, amx=amx)
            assert found.rows_left is None
            code = ThresholdCode(found.acts, found.indices, found.n_active)
            some = inputs | {"x": x[:N], "prediction": prediction[:N]}
            assert_within_rounding(code, some)
    finally:
        torch.set_num_threads(before)


@screens
def test_screened_rows_with_too_many_candidates_or_nan_take_the_exact_path():
    inputs = screened_inputs()
    inputs["weight"] = inputs["weight"].repeat(60, 1)  # 42,000 latents
    inputs["bias"] = inputs["bias"].repeat(60)
    inputs["threshold"] = torch.zeros(())
    inputs["x"][1] = nan
    inputs["x"] = inputs["x"][:4]
    inputs["prediction"] = inputs["prediction"][:4]
    found, exact = screened(inputs, 20), encode(threshold_encode, 20, **inputs)
    assert found.rows_exact == 4
    assert "too many candidates" in (found.reason or "")
    assert_same_code(found.code, exact)


@screens
def test_one_copy_serves_topk_and_any_thresholds():
    inputs = screened_inputs()
    x, weight, bias, threshold, *_ = inputs.values()
    encoder = ScreenedEncoder(weight, bias)
    encoder.encode(x, 8)
    state = encoder._state
    for level in (threshold, threshold + 0.3, torch.tensor(3.0)):
        code = encoder.threshold_encode(x, level, 100)
        exact = threshold_encode(x, weight, bias, level, 100)
        assert torch.equal(code.indices, exact.indices)
    assert encoder._state is state
    assert state is not None
    weight.mul_(1.1)
    code, exact = (
        encoder.threshold_encode(x, threshold, 100),
        threshold_encode(x, weight, bias, threshold, 100),
    )
    assert torch.equal(code.indices, exact.indices)


@screens
def test_screened_shapes_and_no_gradient():
    inputs = screened_inputs()
    x, weight, bias, threshold, *_ = inputs.values()
    encoder = ScreenedEncoder(weight.requires_grad_(), bias)
    code = encoder.threshold_encode(x.view(4, 10, 96), threshold, 100)
    assert code.acts.shape == (4, 10, 100)
    assert code.n_active.shape == (4, 10)
    with pytest.raises(RuntimeError, match="threshold_encode: has no gradient"):
        code.acts.sum().backward()
    with torch.no_grad():
        assert not encoder.threshold_encode(x, threshold, 100).acts.requires_grad
    with pytest.raises(ValueError, match="threshold_encode: max_active=0"):
        encoder.threshold_encode(x, threshold, 0)
    with pytest.raises(ValueError, match="threshold_encode: threshold has shape"):
        encoder.threshold_encode(x, threshold[:5], 10)
    assert encoder.threshold_encode(x[:0], threshold, 100).n_active.shape == (0,)
