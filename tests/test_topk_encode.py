import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import (
    DTYPES,
    assert_close_as_torch,
    assert_error_as_torch,
    assert_same,
    largest_allocation,
    values_and_gradients,
)
from torch import Tensor

from resae_kernels import SparseCode, dispatch, precision, reference, topk_encode
from resae_kernels.cpu import selection
from resae_kernels.encode import _combined
from resae_kernels.triton import encode as encode_kernels
from resae_kernels.triton import runtime

pytestmark = pytest.mark.usefixtures("poisoned_memory")

inf, nan = math.inf, math.nan
# (leading shape of x, D, M, k)
SHAPES = [
    pytest.param((5,), 4, 8, 3, id="small"),
    pytest.param((0,), 4, 8, 3, id="no-tokens"),
    pytest.param((2, 0), 4, 8, 3, id="no-tokens-in-a-batch"),
    pytest.param((1,), 4, 8, 3, id="one-token"),
    pytest.param((), 4, 8, 3, id="a-vector"),
    pytest.param((37,), 19, 53, 7, id="primes"),
    pytest.param((2, 3), 5, 8, 2, id="batch-of-sequences"),
    pytest.param((6,), 1, 8, 3, id="D-1"),
    pytest.param((6,), 12, 8, 1, id="k-1"),
    pytest.param((6,), 12, 8, 8, id="k-M"),
    pytest.param((6,), 3, 1, 1, id="M-1"),
]
OPTIONAL = ("bias", "pre_bias", "prediction")


def encoder_inputs(leading, D, M, dtype=torch.float64) -> dict[str, Tensor]:
    return {
        "x": torch.randn(*leading, D).to(dtype),
        "weight": torch.randn(M, D).to(dtype),
        "bias": torch.randn(M).to(dtype),
        "pre_bias": torch.randn(D).to(dtype),
        "prediction": torch.randn(*leading, D).to(dtype),
    }


def encode(op, k, **arguments):
    """`op` with the positional order of the public function and all else by keyword."""
    inputs = {"bias": None} | arguments
    return op(inputs.pop("x"), inputs.pop("weight"), inputs.pop("bias"), k, **inputs)


def encode_scores(op, scores: Tensor, k: int, **options) -> SparseCode:
    """Encode so that the pre-activations are exactly `scores [N, M]`, inf and NaN included.

    Each row is the weight of its own encoder of width 1, on x = 1: no entry meets another.
    """
    one = scores.new_ones(2, 1)
    codes = [op(one, row.unsqueeze(1), None, k, **options) for row in scores]
    assert all(torch.equal(code.indices[0], code.indices[1]) for code in codes)
    return SparseCode(
        *(torch.stack([half[0] for half in halves]) for halves in zip(*codes, strict=True))
    )


def assert_same_code(ours: SparseCode, theirs: SparseCode) -> None:
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.acts, theirs.acts, rtol=0, atol=0, equal_nan=True)


# -- equals the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("sorted_", [True, False], ids=["by-value", "by-index"])
@pytest.mark.parametrize(("leading", "D", "M", "k"), SHAPES)
def test_code_and_gradients_equal_the_reference(leading, D, M, k, sorted_):
    inputs = encoder_inputs(leading, D, M)
    code = encode(topk_encode, k, **inputs, sorted=sorted_)
    expected = encode(reference.topk_encode, k, **inputs, sorted=sorted_)
    assert isinstance(code, SparseCode)
    assert code.acts.shape == code.indices.shape == (*leading, k)
    assert code.indices.dtype == torch.int64
    assert torch.equal(code.indices, expected.indices)
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: encode(op, k, **t, sorted=sorted_).acts, inputs)
        for op in (topk_encode, reference.topk_encode)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_code_and_gradients_equal_the_reference_without_an_optional_input(absent):
    inputs = encoder_inputs((7,), 5, 11)
    for name in OPTIONAL:
        if absent in (name, "all"):
            del inputs[name]
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: encode(op, 4, **t).acts, inputs)
        for op in (topk_encode, reference.topk_encode)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_acts_and_gradients_are_as_close_to_fp64_as_plain_torch(dtype):
    M = 53
    inputs = encoder_inputs((37,), 19, M, dtype)
    indices = encode(topk_encode, 5, **inputs).indices

    def plain(x, weight, bias, pre_bias, prediction):
        pre_acts = (x - prediction - pre_bias) @ weight.T + bias
        return pre_acts.relu().gather(-1, indices)

    assert_close_as_torch(lambda **t: encode(topk_encode, 5, **t).acts, plain, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_is_the_reference_selection_where_scores_are_exact(dtype):
    # Small integers: products and sums are exact in every dtype, so scores agree bit by bit.
    inputs = {
        name: torch.randint(-3, 4, t.shape).to(dtype)
        for name, t in encoder_inputs((41,), 6, 64).items()
    }
    for k in (1, 9, 63, 64):
        for sorted_ in (True, False):
            assert_same_code(
                encode(topk_encode, k, **inputs, sorted=sorted_),
                encode(reference.topk_encode, k, **inputs, sorted=sorted_),
            )


def test_op_passes_opcheck():
    inputs = encoder_inputs((5,), 4, 8)
    leaves = [
        inputs[name].requires_grad_() for name in ("x", "weight", "bias", "pre_bias", "prediction")
    ]
    x, weight, bias, pre_bias, prediction = leaves
    for optional in ((bias, pre_bias, prediction), (None, None, None)):
        arguments = (x, weight, optional[0], 3, *optional[1:], True, 1 << 20, "torch")
        torch.library.opcheck(torch.ops.resae.topk_encode.default, arguments)


@pytest.mark.parametrize("k", [2, 6], ids=["some", "with-padding"])
def test_registered_gradient_is_the_derivative(k):
    inputs = encoder_inputs((3,), 4, 6)
    names = list(inputs)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def acts(*tensors):
        return encode(topk_encode, k, **dict(zip(names, tensors, strict=True))).acts

    assert torch.autograd.gradcheck(acts, leaves)
    assert torch.autograd.gradgradcheck(acts, leaves)


@pytest.mark.parametrize("wanted", ["x", "weight", *OPTIONAL])
def test_one_gradient_alone_is_the_one_of_all_together(wanted):
    inputs = encoder_inputs((5,), 4, 8)
    everything = values_and_gradients(lambda **t: encode(topk_encode, 3, **t).acts, inputs)
    rest = {name: t for name, t in inputs.items() if name != wanted}
    alone = values_and_gradients(
        lambda **t: encode(topk_encode, 3, **rest, **t).acts, {wanted: inputs[wanted]}
    )
    name = f"gradient of {wanted}"
    torch.testing.assert_close(alone[name], everything[name], rtol=0, atol=0)


def test_same_bits_twice():
    inputs = encoder_inputs((64,), 24, 96, torch.float32)
    first, second = (
        values_and_gradients(lambda **t: encode(topk_encode, 9, **t).acts, inputs) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_compiled_equals_eager():
    inputs = encoder_inputs((5,), 4, 8, torch.float32)

    def acts(**tensors):
        return encode(topk_encode, 3, **tensors).acts

    compiled = torch.compile(acts, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(acts, inputs), 0, 0)


def test_non_contiguous_inputs_change_nothing():
    inputs = encoder_inputs((6, 4), 5, 9)
    strided = {
        "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": inputs["weight"].T.contiguous().T,
        "bias": torch.stack([inputs["bias"], inputs["bias"]], dim=1)[:, 0],
        "pre_bias": torch.stack([inputs["pre_bias"], inputs["pre_bias"]], dim=1)[:, 1],
        "prediction": inputs["prediction"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    assert not any(t.is_contiguous() for t in strided.values())
    ours, theirs = (
        values_and_gradients(lambda **t: encode(topk_encode, 3, **t).acts, given_)
        for given_ in (strided, inputs)
    )
    assert_same(ours, theirs)


def test_expanded_base_gets_the_gradient_of_every_token():
    x, weight, prediction = (
        torch.randn(6, 4),
        torch.randn(8, 4),
        torch.randn(1, 4, requires_grad=True),
    )
    pre_bias = prediction.detach()[0].clone().requires_grad_()
    topk_encode(x, weight, None, 3, prediction=prediction.expand(6, 4)).acts.sum().backward()
    topk_encode(x, weight, None, 3, pre_bias=pre_bias).acts.sum().backward()
    torch.testing.assert_close(prediction.grad[0], pre_bias.grad)


def test_meta_tensors_give_shapes():
    x, weight = torch.empty(2, 3, 4, device="meta"), torch.empty(8, 4, device="meta")
    code = topk_encode(x, weight, None, 5)
    assert code.acts.shape == code.indices.shape == (2, 3, 5)
    assert code.acts.device.type == code.indices.device.type == "meta"


# -- which latents ---------------------------------------------------------------------------------

# (scores of one token, k, acts by value, indices by value)
SELECTIONS = [
    pytest.param([1, 3, 2], 2, [3, 2], [1, 2], id="largest"),
    pytest.param([2, 3, 2, 2], 2, [3, 2], [1, 0], id="tie-at-the-threshold"),
    pytest.param([2, 3, 2, 3], 4, [3, 3, 2, 2], [1, 3, 0, 2], id="ties-inside-the-code"),
    pytest.param([5, 5, 5, 5, 5], 3, [5, 5, 5], [0, 1, 2], id="all-equal"),
    pytest.param([1, 5, 1, 1, 6, 1], 4, [6, 5, 1, 1], [4, 1, 0, 2], id="many-at-the-threshold"),
    pytest.param([-1, -2, -3], 2, [0, 0], [0, 0], id="all-negative"),
    pytest.param([0, 0, 0], 2, [0, 0], [0, 0], id="all-zero"),
    pytest.param([-0.0, 0.0, 1], 3, [1, 0, 0], [2, 0, 0], id="signed-zeros"),
    pytest.param([-1, 4, -1, 2], 3, [4, 2, 0], [1, 3, 0], id="padding-after-the-positive"),
    pytest.param([0, 0, 4, 0], 2, [4, 0], [2, 0], id="zeros-tie-and-are-padding"),
    pytest.param([1, inf, 2], 2, [inf, 2], [1, 2], id="inf"),
    pytest.param([1, inf, 2, inf, inf], 2, [inf, inf], [1, 3], id="more-inf-than-k"),
    pytest.param([-inf, 1, -inf], 2, [1, 0], [1, 0], id="minus-inf-is-padding"),
    pytest.param([-inf, -inf], 2, [0, 0], [0, 0], id="all-minus-inf"),
    pytest.param([1, nan, 2], 2, [nan, 2], [1, 2], id="nan-first"),
    pytest.param([inf, nan, 2], 2, [nan, inf], [1, 0], id="nan-before-inf"),
    pytest.param([1, nan, 2, nan, nan], 2, [nan, nan], [1, 3], id="more-nan-than-k"),
    pytest.param([1, nan, 2, nan, 2], 3, [nan, nan, 2], [1, 3, 2], id="nan-above-a-tie"),
    pytest.param([-1, nan, -2], 3, [nan, 0, 0], [1, 0, 0], id="nan-then-padding"),
    pytest.param([nan, nan, nan], 1, [nan], [0], id="all-nan"),
]


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.float64, id="fp64")])
@pytest.mark.parametrize(("scores", "k", "acts", "indices"), SELECTIONS)
def test_selection(scores, k, acts, indices, dtype):
    scores = torch.tensor([scores], dtype=dtype)
    expected = SparseCode(torch.tensor([acts], dtype=dtype), torch.tensor([indices]))
    assert_same_code(encode_scores(topk_encode, scores, k), expected)
    assert_same_code(encode_scores(reference.topk_encode, scores, k), expected)


@pytest.mark.parametrize(
    ("scores", "k", "acts", "indices"),
    [
        pytest.param([1, 4, 3, 2], 3, [4, 3, 2], [1, 2, 3], id="by-index"),
        pytest.param([3, 1, 4], 2, [3, 4], [0, 2], id="values-unordered"),
        pytest.param([-1, 2, -1, 4], 3, [2, 4, 0], [1, 3, 0], id="padding-last"),
        pytest.param([1, 2, 1, 4], 3, [1, 2, 4], [0, 1, 3], id="tie-to-the-lower-index"),
        pytest.param([1, nan, 3], 2, [nan, 3], [1, 2], id="nan-taken"),
        pytest.param([3, nan, 1], 2, [3, nan], [0, 1], id="nan-in-its-place"),
    ],
)
def test_unsorted_code_is_in_order_of_index(scores, k, acts, indices):
    scores = torch.tensor([scores], dtype=torch.float32)
    expected = SparseCode(torch.tensor([acts], dtype=torch.float32), torch.tensor([indices]))
    assert_same_code(encode_scores(topk_encode, scores, k, sorted=False), expected)
    assert_same_code(encode_scores(reference.topk_encode, scores, k, sorted=False), expected)


def test_bf16_scores_that_round_to_one_value_go_to_the_lower_index():
    # Scores 256, 257, 257, 256: bf16 holds no 257, which rounds to 256.
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.full((4, 1), 256, dtype=torch.bfloat16)
    bias = torch.tensor([0, 1, 1, 0], dtype=torch.bfloat16)
    code = topk_encode(x, weight, bias, 2)
    assert code.indices.tolist() == [[0, 1]]
    assert code.acts.tolist() == [[256, 256]]
    wide = topk_encode(x.float(), weight.float(), bias.float(), 2)
    assert wide.indices.tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), ("pre_bias",), ("prediction",)], ids=str)
def test_backward_forms_the_residual_in_one_launch(dtype, absent, monkeypatch, device):
    inputs = {n: t for n, t in encoder_inputs((5,), 7, 9, dtype).items() if n not in absent}
    inputs = {n: t.to(device).requires_grad_() for n, t in inputs.items()}
    launched = []
    launch = encode_kernels.launch_residual
    monkeypatch.setattr(
        encode_kernels, "launch_residual", lambda *a: launched.append(a) or launch(*a)
    )
    found = torch.ops.resae.residual(inputs["x"], inputs.get("pre_bias"), inputs.get("prediction"))
    expected = precision.residual(inputs["x"], inputs.get("pre_bias"), inputs.get("prediction"))
    # The interpreter does not round fp32 to bf16 to nearest.
    torch.testing.assert_close(found, expected)
    assert len(launched) == 1
    code = encode(topk_encode, 3, implementation="triton", **inputs)
    launched.clear()
    code.acts.sum().backward()
    assert len(launched) == 1


def test_gradients_of_the_residual(device):
    x, pre_bias, prediction = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((4, 3), (3,), (4, 3))
    )
    assert torch.autograd.gradcheck(torch.ops.resae.residual, (x, pre_bias, prediction))
    torch.library.opcheck(torch.ops.resae.residual.default, (x, pre_bias, prediction))


def test_residual_is_rounded_once():
    # 256 + 1 − 1: rounded to bf16 after each step, the sum 257 becomes 256 and the residual 255.
    x, prediction, pre_bias, weight = (
        torch.tensor([[value]], dtype=torch.bfloat16) for value in (256.0, -1.0, 1.0, 1.0)
    )
    for op in (topk_encode, reference.topk_encode):
        assert (
            op(x, weight, None, 1, prediction=prediction, pre_bias=pre_bias[0]).acts.item() == 256
        )


def test_scores_are_rounded_once_after_the_bias():
    # 256 + 1 − 256: bf16 holds no 257, so that a product rounded before the bias gives 0.
    x, bias = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([-256], dtype=torch.bfloat16)
    weight = torch.tensor([[256, 1]], dtype=torch.bfloat16)
    for op in (topk_encode, reference.topk_encode):
        assert op(x, weight, bias, 1).acts.item() == 1


def test_bf16_with_few_levels_and_many_latents_breaks_every_tie_downwards():
    scores = torch.randint(-2, 3, (32, 500)).to(torch.bfloat16)
    weight = torch.eye(500, dtype=torch.bfloat16)
    for k in (1, 50, 150, 400):
        assert_same_code(
            topk_encode(scores, weight, None, k), reference.topk_encode(scores, weight, None, k)
        )


LEVELS = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0])
SPECIAL = st.sampled_from([-inf, -1.0, 0.0, 1.0, 2.0, inf, nan])


@st.composite
def score_matrix(draw, levels):
    M = draw(st.integers(1, 10))
    row = st.lists(levels, min_size=M, max_size=M)
    rows = draw(st.lists(row, min_size=0, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return torch.tensor(rows, dtype=dtype).reshape(-1, M), draw(st.integers(1, M))


def ranked(row: list[float], k: int) -> list[int]:
    """The first k latents that count, by the words of the contract."""
    order = sorted(
        range(len(row)), key=lambda m: (0, 0, m) if math.isnan(row[m]) else (1, -row[m], m)
    )
    return [m for m in order[:k] if math.isnan(row[m]) or row[m] > 0]


@given(
    case=score_matrix(LEVELS), sorted_=st.booleans(), workspace_bytes=st.sampled_from([1, 64, None])
)
def test_ties_go_to_the_lower_index_and_padding_comes_last(case, sorted_, workspace_bytes):
    scores, k = case
    weight = torch.eye(scores.shape[1], dtype=scores.dtype)
    code = topk_encode(scores, weight, None, k, sorted=sorted_, workspace_bytes=workspace_bytes)
    assert_same_code(code, reference.topk_encode(scores, weight, None, k, sorted=sorted_))
    for row, acts, indices in zip(scores, code.acts, code.indices, strict=True):
        chosen = ranked(row.tolist(), k)
        chosen = chosen if sorted_ else sorted(chosen)
        padding = [0] * (k - len(chosen))
        assert indices.tolist() == chosen + padding
        assert acts.tolist() == [float(row[m]) for m in chosen] + padding


@given(case=score_matrix(SPECIAL), sorted_=st.booleans())
def test_special_values_have_their_place_among_ties(case, sorted_):
    scores, k = case
    if scores.shape[0] == 0:
        return
    code = encode_scores(topk_encode, scores, k, sorted=sorted_)
    assert_same_code(code, encode_scores(reference.topk_encode, scores, k, sorted=sorted_))
    for row, indices in zip(scores, code.indices, strict=True):
        chosen = ranked(row.tolist(), k)
        chosen = chosen if sorted_ else sorted(chosen)
        assert indices.tolist() == chosen + [0] * (k - len(chosen))


# -- NaN in checked mode ---------------------------------------------------------------------------


@pytest.mark.parametrize("sorted_", [True, False])
@pytest.mark.parametrize(("M", "k"), [(64, 1), (64, 4), (96, 5), (48, 3), (50, 7), (40, 40)])
@pytest.mark.parametrize("least", [0, 10**9], ids=["by-groups", "at-once"])
def test_selection_by_groups_and_at_once(monkeypatch, least, M, k, sorted_):
    """Rows of few values, of all kinds, and of distinct ones, beside each other."""
    monkeypatch.setattr(selection, "GROUPED_SCORES", least)
    generator = torch.Generator().manual_seed(M + k)
    few = torch.tensor([-inf, -1.0, 0.0, 1.0, 2.0, inf, nan])
    special = few[torch.randint(7, (60, M), generator=generator)]
    levels = torch.randint(5, (60, M), generator=generator).float()
    distinct = torch.randn(60, M, generator=generator)
    one_nan = distinct.index_fill(1, torch.tensor([M - 3]), nan)
    scores = torch.cat([special, levels, distinct, one_nan, levels - 3])
    acts, indices = selection.select(scores, k, sorted_)
    expected = [ranked(row, k) for row in scores.tolist()]
    for row, found, wanted in zip(scores, indices, expected, strict=True):
        wanted = wanted if sorted_ else sorted(wanted)
        assert found.tolist() == wanted + [0] * (k - len(wanted)), row
    taken = torch.where(scores > 0, scores, torch.where(scores.isnan(), nan, 0.0)).gather(
        1, indices
    )
    lengths = torch.tensor([len(wanted) for wanted in expected])
    taken[torch.arange(k) >= lengths.unsqueeze(1)] = 0
    torch.testing.assert_close(acts, taken, rtol=0, atol=0, equal_nan=True)


def test_check_nan_names_the_token():
    x = torch.randn(2, 3, 4)
    x[1, 2, 0] = nan
    with pytest.raises(
        ValueError, match=r"topk_encode: NaN in the pre-activations of token 5 \(of 6"
    ):
        topk_encode(x, torch.randn(8, 4), None, 2, check_nan=True)


def test_check_nan_catches_inf_minus_inf():
    x = torch.full((1, 4), inf)
    with pytest.raises(
        ValueError, match="look for NaN or inf in x, weight, bias, pre_bias and prediction"
    ):
        topk_encode(x, torch.randn(8, 4), None, 2, prediction=x, check_nan=True)


def test_check_nan_changes_nothing_else():
    x, weight = torch.randn(5, 4), torch.randn(8, 4)
    weight[0] = inf  # an infinite score is no NaN
    x[:, :] = x.abs()
    assert_same_code(
        topk_encode(x, weight, None, 3, check_nan=True), topk_encode(x, weight, None, 3)
    )


def test_nan_in_one_token_leaves_the_others_alone():
    x, weight = torch.randn(5, 4), torch.randn(8, 4)
    clean = topk_encode(x, weight, None, 3)
    x[2] = nan
    code = topk_encode(x, weight, None, 3)
    others = [0, 1, 3, 4]
    assert_same_code(
        SparseCode(*(t[others] for t in code)), SparseCode(*(t[others] for t in clean))
    )
    assert code.acts[2].isnan().all()
    assert code.indices[2].tolist() == [0, 1, 2]


# -- gradient gate ---------------------------------------------------------------------------------


def test_gradient_passes_only_where_positive_and_selected():
    # scores of x = (2, 1): 2·2 = 4, 1·3 = 3, 2 + 1 = 3, −2, 1; k = 2 takes latents 0 and 1 (tie).
    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[2.0, 0], [0, 3], [1, 1], [-1, 0], [0, 1]], requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    code = topk_encode(x, weight, bias, 2)
    assert code.indices.tolist() == [[0, 1]]
    code.acts.backward(torch.tensor([[10.0, 100.0]]))
    assert x.grad.tolist() == [[20.0, 300.0]]
    assert weight.grad.tolist() == [[20, 10], [200, 100], [0, 0], [0, 0], [0, 0]]
    assert bias.grad.tolist() == [10, 100, 0, 0, 0]


def test_padding_slots_send_no_gradient_to_latent_0():
    # scores of x = (1, 0): −1, 2, −3; k = 3 leaves two padding slots, which hold index 0.
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[-1.0, 5], [2, 5], [-3, 5]], requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    code = topk_encode(x, weight, bias, 3)
    assert code.acts.tolist() == [[2, 0, 0]]
    assert code.indices.tolist() == [[1, 0, 0]]
    code.acts.backward(torch.tensor([[10.0, 1000.0, 1000.0]]))
    assert x.grad.tolist() == [[20, 50]]
    assert weight.grad.tolist() == [[0, 0], [10, 0], [0, 0]]
    assert bias.grad.tolist() == [0, 10, 0]


def test_pre_bias_and_base_get_the_negative_of_the_gradient_of_x():
    inputs = {name: t.requires_grad_() for name, t in encoder_inputs((5,), 4, 8).items()}
    encode(topk_encode, 3, **inputs).acts.sum().backward()
    assert torch.equal(inputs["prediction"].grad, -inputs["x"].grad)
    torch.testing.assert_close(inputs["pre_bias"].grad, -inputs["x"].grad.sum(0))


def test_latents_not_selected_get_exactly_zero_gradient():
    x, weight = torch.randn(7, 5), torch.randn(40, 5, requires_grad=True)
    code = topk_encode(x, weight, None, 2)
    code.acts.sum().backward()
    selected = torch.zeros(40, dtype=torch.bool).index_fill(0, code.indices.flatten(), True)
    assert (weight.grad[~selected] == 0).all()
    assert (weight.grad[selected] != 0).any(dim=-1).all()


def test_all_negative_rows_send_no_gradient():
    x = torch.ones(3, 2, requires_grad=True)
    weight = -torch.rand(6, 2) - 0.1
    weight.requires_grad_()
    topk_encode(x, weight, None, 4).acts.sum().backward()
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def test_indices_carry_no_gradient():
    code = topk_encode(torch.randn(3, 4, requires_grad=True), torch.randn(8, 4), None, 2)
    assert code.acts.requires_grad
    assert not code.indices.requires_grad


# -- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace_bytes", [1, 13 * 8, 3 * 13 * 8 + 5, 1 << 30])
@pytest.mark.parametrize("sorted_", [True, False], ids=["by-value", "by-index"])
def test_chunks_change_nothing(workspace_bytes, sorted_):
    inputs = {
        name: torch.randint(-2, 3, t.shape).double()
        for name, t in encoder_inputs((17,), 4, 13).items()
    }
    options = {"sorted": sorted_, "workspace_bytes": workspace_bytes}
    code = encode(topk_encode, 5, **inputs, **options)
    assert_same_code(code, encode(reference.topk_encode, 5, **inputs, sorted=sorted_))
    ours, theirs = (
        values_and_gradients(lambda o=o, **t: encode(topk_encode, 5, **t, **o).acts, inputs)
        for o in (options, {"sorted": sorted_})
    )
    assert_same(ours, theirs, 0, 0)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_no_tensor_of_tokens_by_latents_is_ever_made(ties):
    N, D, M, k = 128, 4, 1024, 4
    x, weight = torch.randn(N, D), torch.randn(M, D)
    if ties:
        x, weight = x.sign(), weight.sign()
    x.requires_grad_()
    weight.requires_grad_()

    def forward_and_backward(workspace_bytes):
        topk_encode(x, weight, None, k, workspace_bytes=workspace_bytes).acts.sum().backward()

    whole = N * M * x.itemsize
    assert largest_allocation(lambda: forward_and_backward(whole)) >= whole
    # Four rows of scores: not even a mask of one byte per score is ever whole.
    assert largest_allocation(lambda: forward_and_backward(4 * M * x.itemsize)) < N * M


# -- autocast --------------------------------------------------------------------------------------


def test_autocast_encodes_in_its_dtype_and_returns_gradients_in_the_parameters_dtype():
    inputs = encoder_inputs((6,), 4, 8, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = encode(topk_encode, 3, **leaves)
    narrow = {name: t.detach().bfloat16().requires_grad_() for name, t in inputs.items()}
    by_hand = encode(topk_encode, 3, **narrow)
    assert_same_code(code, by_hand)
    assert code.acts.dtype == torch.bfloat16
    code.acts.sum().backward()
    by_hand.acts.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, narrow[name].grad.float()), name


def test_autocast_lets_inputs_of_mixed_dtype_in_and_fp64_alone():
    x, weight = torch.randn(3, 4), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_encode(x.bfloat16(), weight, None, 2).acts.dtype == torch.bfloat16
        assert topk_encode(x.double(), weight.double(), None, 2).acts.dtype == torch.float64


# -- the public door -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"x": torch.zeros(3, 4, dtype=torch.int64)},
            TypeError,
            "topk_encode: x has dtype torch.int64, expected one of float32, float64, bfloat16",
            id="integer-x",
        ),
        pytest.param(
            {"weight": torch.zeros(8, 4, dtype=torch.bfloat16)},
            TypeError,
            "topk_encode: weight has dtype torch.bfloat16, x has torch.float32",
            id="weight-dtype",
        ),
        pytest.param(
            {"bias": torch.zeros(8, dtype=torch.float64)},
            TypeError,
            "topk_encode: bias has dtype torch.float64, x has torch.float32",
            id="bias-dtype",
        ),
        pytest.param(
            {"pre_bias": torch.zeros(4, dtype=torch.float16)},
            TypeError,
            "topk_encode: pre_bias has dtype torch.float16, x has torch.float32",
            id="pre_bias-dtype",
        ),
        pytest.param(
            {"prediction": torch.zeros(3, 4, dtype=torch.float64)},
            TypeError,
            "topk_encode: prediction has dtype torch.float64, x has torch.float32",
            id="prediction-dtype",
        ),
        pytest.param(
            {"weight": torch.zeros(8, 4, device="meta")},
            ValueError,
            "topk_encode: weight is on meta, x on cpu; move one",
            id="weight-device",
        ),
        pytest.param(
            {"bias": torch.zeros(8, device="meta")},
            ValueError,
            "topk_encode: bias is on meta, x on cpu; move one",
            id="bias-device",
        ),
        pytest.param(
            {"weight": torch.zeros(8)},
            ValueError,
            r"topk_encode: weight has shape \[8\], expected \[M, D\]",
            id="weight-not-a-matrix",
        ),
        pytest.param(
            {"weight": torch.zeros(4, 8)},
            ValueError,
            r"topk_encode: x has shape \[3, 4\], expected \[..., 8\] \(weight is .*pass weight.T",
            id="weight-transposed",
        ),
        pytest.param(
            {"x": torch.zeros(())},
            ValueError,
            r"topk_encode: x has shape \[\], expected \[..., 4\]",
            id="scalar-x",
        ),
        pytest.param(
            {"bias": torch.zeros(4)},
            ValueError,
            r"topk_encode: bias has shape \[4\], expected \[8\] \(one entry per latent\)",
            id="bias-shape",
        ),
        pytest.param(
            {"pre_bias": torch.zeros(8)},
            ValueError,
            r"topk_encode: pre_bias has shape \[8\], expected \[4\] \(one entry per dimension\)",
            id="pre_bias-shape",
        ),
        pytest.param(
            {"prediction": torch.zeros(4)},
            ValueError,
            r"topk_encode: prediction has shape \[4\], expected \[3, 4\] \(the shape of x\)",
            id="prediction-shape",
        ),
        pytest.param({"k": 0}, ValueError, "topk_encode: k=0, expected at least 1", id="k-0"),
        pytest.param(
            {"k": -2}, ValueError, "topk_encode: k=-2, expected at least 1", id="k-negative"
        ),
        pytest.param(
            {"k": 9},
            ValueError,
            r"topk_encode: k=9 exceeds the number of latents M=8 \(weight is \[8, 4\]\); lower k",
            id="k-above-M",
        ),
        pytest.param(
            {"workspace_bytes": 0},
            ValueError,
            "topk_encode: workspace_bytes=0, expected at least 1",
            id="no-workspace",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(8, 4), "k": 2} | change
    with pytest.raises(error, match=message):
        encode(topk_encode, **arguments)


@pytest.mark.parametrize("M", [3, 8192, 8205])
def test_sum_over_all_latents_is_as_close_to_fp64_as_plain_torch(M):
    total, weight = torch.rand(M), torch.randn(M, 64)
    exact = total.double() @ weight.double()
    plain = (total[:, None] * weight).sum(0)
    assert_error_as_torch("sum", _combined(total, weight), plain, exact)


# -- Triton ----------------------------------------------------------------------------------------

# The interpreter's matrix product multiplies the padding tokens, zero, by an infinite weight.
interpreted_inf = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def triton_encode(x, weight, bias, k, **options) -> SparseCode:
    return topk_encode(x, weight, bias, k, **options, implementation="triton")


def exact_inputs(device, leading, D, M, dtype) -> dict[str, Tensor]:
    """Small integers: sums are exact in every dtype, so that scores agree bit by bit."""
    inputs = encoder_inputs(leading, D, M)
    return {
        name: torch.randint(-1, 2, t.shape).to(device=device, dtype=dtype)
        for name, t in inputs.items()
    }


# 1 and 2 tokens, and 16: the product of few; from 17 on the GEMM and the pass over its scores.
TRITON_SHAPES = [
    pytest.param((0,), 4, 8, 3, id="no-tokens"),
    pytest.param((1,), 6, 64, 9, id="1-token"),
    pytest.param((2,), 32, 128, 32, id="2-tokens-whole-tiles"),
    pytest.param((2, 1), 149, 71, 7, id="primes"),
    pytest.param((16,), 5, 11, 11, id="16-tokens-k-M"),
    pytest.param((17,), 19, 131, 1, id="17-tokens-k-1"),
    pytest.param((33,), 3, 1, 1, id="33-tokens-M-1"),
    pytest.param((3, 11), 17, 257, 33, id="33-tokens-primes"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("leading", "D", "M", "k"), TRITON_SHAPES)
def test_triton_code_is_the_reference_code(device, leading, D, M, k, dtype):
    inputs = exact_inputs(device, leading, D, M, dtype)
    code = encode(triton_encode, k, **inputs)
    assert code.acts.shape == (*leading, k)
    assert code.acts.dtype == dtype
    assert_same_code(code, encode(reference.topk_encode, k, **inputs))


@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_triton_code_is_the_reference_code_without_an_optional_input(device, tokens, absent):
    inputs = exact_inputs(device, (tokens,), 5, 21, torch.bfloat16)
    for name in OPTIONAL:
        if absent in (name, "all"):
            del inputs[name]
    for sorted_ in (True, False):
        assert_same_code(
            encode(triton_encode, 4, **inputs, sorted=sorted_),
            encode(reference.topk_encode, 4, **inputs, sorted=sorted_),
        )


def test_triton_selects_any_number_of_latents(device):
    inputs = exact_inputs(device, (1,), 24, 97, torch.float32)
    for k in (*range(1, 65), 96, 97):
        assert_same_code(
            encode(triton_encode, k, **inputs, sorted=False),
            encode(reference.topk_encode, k, **inputs, sorted=False),
        )


@interpreted_inf
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scores", "k", "acts", "indices"), SELECTIONS)
def test_triton_selection(device, scores, k, acts, indices, dtype):
    scores = torch.tensor([scores], dtype=dtype, device=device)
    expected = torch.tensor([acts], dtype=dtype), torch.tensor([indices])
    code = encode_scores(triton_encode, scores, k)
    assert_same_code(code, SparseCode(*(t.to(device) for t in expected)))


@interpreted_inf
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_selects_among_special_values_in_many_groups(device, dtype, tokens):
    # NaN of either sign, infinities, zeros and ties, spread over nine groups.
    row = [1, -nan, 2, nan, inf, -inf, -0.0, 0.0, 5, 5, -3, inf, 2] * 5
    x = torch.ones(tokens, 1, dtype=dtype, device=device)
    weight = torch.tensor(row, dtype=dtype, device=device).unsqueeze(1)
    weight[1::13] = weight[1::13].copysign(-torch.ones_like(weight[1::13]))
    for k in (3, 12, 20, 64):
        assert_same_code(
            triton_encode(x, weight, None, k, sorted=False),
            reference.topk_encode(x, weight, None, k, sorted=False),
        )


@interpreted_inf
@pytest.mark.parametrize("tokens", [1, 17])
def test_triton_reads_nothing_into_the_latents_that_fill_a_tile(device, tokens):
    # An infinite x makes NaN of every zero weight: of those past the last latent too.
    x = torch.full((tokens, 1), inf, device=device)
    weight = -torch.ones(21, 1, device=device)
    weight[3] = 1
    code = triton_encode(x, weight, None, 1)
    assert (code.indices == 3).all()
    assert (code.acts == inf).all()


@pytest.mark.parametrize("value", [2.5, 0.0, -1.0])
@pytest.mark.parametrize("tokens", [1, 17])
def test_triton_takes_the_first_latents_of_a_constant_row(device, tokens, value):
    x = torch.ones(tokens, 1, device=device)
    code = triton_encode(x, torch.full((150, 1), value, device=device), None, 33)
    assert (code.acts == max(value, 0)).all()
    expected = torch.arange(33, device=device) * (value > 0)
    assert (code.indices == expected).all()


def test_triton_breaks_every_tie_downwards(device):
    # Four levels over 500 latents: every group holds the largest value, and more than k do.
    scores = torch.randint(-1, 3, (17, 500), device=device).to(torch.bfloat16)
    weight = torch.eye(500, dtype=torch.bfloat16, device=device)
    for k in (1, 50, 300):
        assert_same_code(
            triton_encode(scores, weight, None, k), reference.topk_encode(scores, weight, None, k)
        )


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_acts_and_gradients_are_as_close_to_fp64_as_plain_torch(device, dtype, tokens):
    inputs = {n: t.to(device) for n, t in encoder_inputs((tokens,), 19, 53, dtype).items()}
    indices = encode(triton_encode, 5, **inputs).indices

    def plain(x, weight, bias, pre_bias, prediction):
        pre_acts = (x - prediction - pre_bias) @ weight.T + bias
        return pre_acts.relu().gather(-1, indices)

    assert_close_as_torch(lambda **t: encode(triton_encode, 5, **t).acts, plain, inputs)


@pytest.mark.parametrize("tokens", [3, 17])
def test_triton_gradients_equal_the_reference(device, tokens):
    inputs = exact_inputs(device, (tokens,), 6, 40, torch.float32)
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: encode(op, 9, **t).acts, inputs)
        for op in (triton_encode, reference.topk_encode)
    )
    assert_same(ours, theirs, 1e-5, 1e-5)


@pytest.mark.parametrize("tokens", [5, 19])
def test_triton_chunks_change_no_bit(device, tokens):
    # Exact sums: a GEMM adds in an order of its own choice for each number of rows.
    inputs = exact_inputs(device, (tokens,), 7, 90, torch.float32)
    whole = encode(triton_encode, 6, **inputs)
    row_bytes = 128 * 4 + 12 * 4  # scores of 90 latents, padded, and maxima of 12 groups
    for workspace_bytes in (1, 4 * row_bytes):
        assert_same_code(encode(triton_encode, 6, **inputs, workspace_bytes=workspace_bytes), whole)


def test_triton_same_bits_twice(device):
    inputs = {n: t.to(device) for n, t in encoder_inputs((19,), 24, 96, torch.float32).items()}
    first, second = (
        values_and_gradients(lambda **t: encode(triton_encode, 9, **t).acts, inputs)
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("tokens", [2, 17])
def test_triton_takes_rows_that_lie_anywhere(device, tokens):
    inputs = exact_inputs(device, (tokens,), 5, 21, torch.float32)
    strided = {
        "x": torch.cat([inputs["x"]] * 2, dim=1)[:, 5:],
        "weight": inputs["weight"].T.contiguous().T,
        "bias": inputs["bias"].repeat_interleave(2)[::2],
        "pre_bias": inputs["pre_bias"].repeat_interleave(2)[1::2],
        "prediction": inputs["prediction"][:1].expand(tokens, 5),
    }
    inputs["prediction"] = strided["prediction"].contiguous()
    expected = encode(triton_encode, 4, **inputs)
    assert_same_code(encode(triton_encode, 4, **strided), expected)
    strided["x"] = inputs["x"].T.contiguous().T
    assert_same_code(encode(triton_encode, 4, **strided), expected)


@pytest.mark.parametrize(
    ("dtype", "M", "k"),
    [
        pytest.param(torch.float32, 1100, 1025, id="k-above-1024"),
        pytest.param(torch.bfloat16, (1 << 19) + 1, 2, id="M-above-2^19"),
        pytest.param(torch.float64, 30, 4, id="fp64"),
    ],
)
def test_triton_selects_as_torch_what_its_kernel_does_not_hold(device, dtype, M, k):
    inputs = exact_inputs(device, (2,), 3, M, dtype)
    code = encode(triton_encode, k, **inputs)
    assert_same_code(code, encode(reference.topk_encode, k, **inputs))


def test_triton_passes_opcheck(device):
    inputs = encoder_inputs((2,), 4, 8, torch.float32)
    x, weight, bias, pre_bias, prediction = (t.to(device).requires_grad_() for t in inputs.values())
    torch.library.opcheck(
        torch.ops.resae.topk_encode.default,
        (x, weight, bias, 3, pre_bias, prediction, True, 1 << 20, "triton"),
    )


def test_implementation_is_chosen_by_device_or_by_name():
    assert dispatch.implementation_for("topk_encode", torch.empty(1), None) == "torch"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        on_cuda = torch.empty(1, device="cuda")
    assert dispatch.implementation_for("topk_encode", on_cuda, None) == "triton"
    assert dispatch.implementation_for("topk_encode", on_cuda, "torch") == "torch"


def test_implementation_that_cannot_run_is_refused(monkeypatch):
    x, weight = torch.zeros(3, 4), torch.zeros(8, 4)
    with pytest.raises(ValueError, match="topk_encode: implementation='cuda', expected 'torch'"):
        topk_encode(x, weight, None, 2, implementation="cuda")
    monkeypatch.setattr(runtime, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="implementation='triton' needs a CUDA device, .* cpu"):
        topk_encode(x, weight, None, 2, implementation="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_scores_may_pass_2_to_the_31():
    N, M = 33_000, 1 << 16
    inputs = exact_inputs("cuda", (N,), 16, M, torch.bfloat16)
    code = encode(triton_encode, 8, **inputs, workspace_bytes=8 << 30)
    last = {name: t[-5:] if name in ("x", "prediction") else t for name, t in inputs.items()}
    expected = encode(reference.topk_encode, 8, **last)
    assert_same_code(SparseCode(code.acts[-5:], code.indices[-5:]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "M", "D", "k"), [(1, 33, 19, 33), (3, 512, 128, 8), (4, 100, 70, 9)])
def test_few_tokens_of_any_layout(N, M, D, k, dtype):
    """The compiled path of few tokens on a CPU, in whole numbers: ties, strides, expansion."""

    def whole(*shape):
        return torch.randint(-2, 3, shape).to(dtype)

    x, prediction = whole(N, 2 * D)[:, ::2], whole(D, N).T
    weight, bias, pre_bias = whole(D, M).T, whole(M, 2)[:, 0], whole(1).expand(D)
    for sorted in (True, False):
        arguments = {"pre_bias": pre_bias, "prediction": prediction, "sorted": sorted}
        ours = topk_encode(x, weight, bias, k, **arguments)
        theirs = reference.topk_encode(x, weight, bias, k, **arguments)
        assert torch.equal(ours.acts, theirs.acts)
        assert torch.equal(ours.indices, theirs.indices)
