"""The screened encoder finds the TopK of the exact path, whatever the input, and says what it did.

Shapes are small: what the rules would leave to the exact path is screened here all the same.
"""

import copy
import itertools
import math
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import assert_error_as_torch
from torch import Tensor

from resae_kernels import ScreenedEncoder, SparseCode, reference, topk_encode
from resae_kernels import screened as screened_encode
from resae_kernels.cpu import native, screening_torch
from resae_kernels.screened import MARGINS
from resae_kernels.screening_bounds import FAILURE, STEPS, StaleCopyError

screens = pytest.mark.usefixtures("screened_at_any_size")
screens_by_torch = pytest.mark.usefixtures("screened_by_torch_at_any_size")


def inputs(N: int = 40, D: int = 96, M: int = 700, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    weight = torch.randn(M, D, generator=generator) / math.sqrt(D)
    return x, weight, 0.3 * torch.randn(M, generator=generator)


def assert_same_code(screened, x: Tensor, weight: Tensor, bias, k: int, **offsets) -> None:
    """The TopK of float64 scores, but for ties within the rounding of float32 scores."""
    rest = x.double()
    for offset in offsets.values():
        rest = rest - (0.0 if offset is None else offset.double())
    scores = rest @ weight.double().T
    size = rest.norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    if bias is not None:
        scores, size = scores + bias.double(), size + bias.double().abs()
    high, low = scores + 1e-6 * size, scores - 1e-6 * size
    acts, indices = screened
    taken = acts > 0
    assert (acts <= high.gather(1, indices))[taken].all()
    assert (acts >= low.gather(1, indices))[taken].all()
    assert (high.gather(1, indices) >= low.topk(k).values[:, -1:])[taken].all(), "not of the TopK"
    above = low > high.topk(k + 1).values[:, -1:].clamp_min(0.0)  # in the TopK beyond doubt
    present = torch.zeros_like(above).scatter_(1, indices, taken)
    assert present[above].all(), "a latent of the TopK is missing"
    assert (taken.sum(1) >= (low > 0).sum(1).clamp_max(k)).all(), "too few latents"
    for row, count in zip(indices, taken.sum(1), strict=True):
        assert len(set(row[:count].tolist())) == count, "a latent twice"
    assert (indices[~taken] == 0).all()
    assert (acts[~taken] == 0).all()
    assert (acts[:, 1:] <= acts[:, :-1]).all(), "not sorted"


def one_by_one(encoder: ScreenedEncoder, x: Tensor, k: int, **offsets) -> SparseCode:
    """The codes of rows encoded alone: there the margin "statistical" takes its own path."""
    rows = [
        encoder.encode(
            x[i : i + 1],
            k,
            **{
                n: t[i : i + 1] if n == "prediction" and t is not None else t
                for n, t in offsets.items()
            },
        )
        for i in range(len(x))
    ]
    return SparseCode(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


@screens
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("k", [1, 7, 10])
@pytest.mark.parametrize(
    "offsets", [(), ("pre_bias",), ("prediction",), ("pre_bias", "prediction")]
)
def test_the_code_of_the_exact_path(margin, k, offsets):
    x, weight, bias = inputs()
    torch.manual_seed(1)
    given = {
        "pre_bias": torch.randn(96) if "pre_bias" in offsets else None,
        "prediction": torch.randn(40, 96) if "prediction" in offsets else None,
    }
    encoder = ScreenedEncoder(weight, bias, margin=margin)
    found = encoder.encode_with_info(x, k, **given)
    assert (found.rows_screened, found.rows_exact, found.reason) == (40, 0, None)
    assert 40 * k <= found.candidates < 40 * 700 // 4
    assert_same_code(found.code, x, weight, bias, k, **given)
    exact = topk_encode(x, weight, bias, k, **given)
    assert torch.equal(found.code.indices, exact.indices)
    alone = one_by_one(encoder, x, k, **given)
    assert torch.equal(alone.indices, exact.indices)
    assert torch.equal(alone.acts, found.code.acts), "a row's code depends on the rows beside it"
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    truth = reference.topk_encode(x.double(), weight.double(), bias.double(), k, **wide)
    assert_error_as_torch("acts", found.code.acts, exact.acts, truth.acts)


@screens
@pytest.mark.parametrize("margin", MARGINS)
def test_order_of_index(margin):
    x, weight, bias = inputs()
    bias -= 2.0  # some rows have fewer than k positive scores
    encoder = ScreenedEncoder(weight, bias, margin=margin)
    found = encoder.encode(x, 8, sorted=False)
    exact = topk_encode(x, weight, bias, 8, sorted=False)
    assert (exact.acts == 0).any()
    assert (exact.acts > 0).any()
    assert torch.equal(found.indices, exact.indices)
    torch.testing.assert_close(found.acts, exact.acts)
    alone = one_by_one(encoder, x, 8, sorted=False)
    assert torch.equal(alone.indices, exact.indices)


@screens_by_torch
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("outliers", [False, True])
def test_every_score_is_within_its_bounds(margin, outliers):
    x, weight, bias = inputs(N=200, D=257, M=1001)
    weight *= torch.logspace(-2, 1, 1001)[:, None]  # norms of all sizes
    if outliers:
        x[:, 3] *= 300.0
        x[::2, 250] += 80.0
    copied = screening_torch.quantise(weight, bias, margin, 0)
    assert copied is not None
    upper = screening_torch._upper(copied, x)
    assert upper.screened is None
    width = (upper.factors @ copied.bounds)[:, :1001].double()
    middle = upper.scores[:, :1001].double() - width
    truth = (x.double() @ weight.double().T + bias.double()) / upper.step[:, None].double()
    used = ((middle - truth).abs() / width).max()
    assert used < 1
    # The statistical bound is some 8 standard deviations: of 200,000 errors the largest is half of
    # it. That of Cauchy–Schwarz is √D/3 standard deviations or more.
    assert used > (0.4 if margin == "statistical" else 0.1), "wider than it need be"
    assert bool((upper.scores[:, 1001:] == -math.inf).all())


@screens_by_torch
def test_the_statistical_width_is_the_bound_of_the_docstring():
    """Compares with the definition in float64: 2 M exp(−6 λ² / (s²‖r‖² + t²‖ŵ‖²)) ≤ FAILURE."""
    x, weight, bias = inputs(N=30, D=64, M=640)
    copied = screening_torch.quantise(weight, bias, "statistical", 0)
    assert copied is not None
    upper = screening_torch._upper(copied, x)
    width = (upper.factors @ copied.bounds).double()[:, :640] * upper.step[:, None].double()
    s = weight.double().abs().amax(1) / STEPS
    t = x.double().abs().amax(1) / STEPS
    r, w = x.double().norm(dim=1), weight.double().norm(dim=1) + s * math.sqrt(64) / 2
    variance = (s * r[:, None]) ** 2 + (t[:, None] * w) ** 2
    chance = 2 * 640 * (-6 * width**2 / variance).exp()
    assert chance.max() <= FAILURE
    assert chance.max() > FAILURE**1.5, "far wider than it need be"


@screens
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    "case",
    [
        "near ties",
        "duplicated latents",
        "huge range of rows",
        "huge range of latents",
        "outlier dimensions",
        "more outliers than are taken out",
        "dead latents",
        "all scores negative",
        "large bias",
        "constant rows",
        "one-hot weight",
        "tiny",
    ],
)
def test_adversarial_inputs(margin, case):
    x, weight, bias = inputs(N=60, D=64, M=520)
    if case == "near ties":
        weight = weight[:1] + 1e-4 * weight
    elif case == "duplicated latents":
        weight = weight[:40].repeat(13, 1)
        bias = bias[:40].repeat(13)
    elif case == "huge range of rows":
        x *= torch.logspace(-12, 12, 60)[:, None]
    elif case == "huge range of latents":
        weight *= torch.logspace(-8, 8, 520)[:, None]
    elif case == "outlier dimensions":
        x[:, 5] += 1000.0
        x[::3, 40] -= 500.0
    elif case == "more outliers than are taken out":
        x[torch.arange(60), torch.arange(60)] = 1e4
    elif case == "dead latents":
        weight[::2] = 0.0
    elif case == "all scores negative":
        bias = torch.full_like(bias, -100.0)
    elif case == "large bias":
        bias *= 1e5
    elif case == "constant rows":
        x = torch.ones_like(x) * torch.arange(60)[:, None]
    elif case == "one-hot weight":
        weight = torch.eye(64).repeat(9, 1)[:520]
    elif case == "tiny":
        x, weight = x * 1e-15, weight * 1e-15
        bias = bias * 1e-30
    encoder = ScreenedEncoder(weight, bias, margin=margin)
    found = encoder.encode_with_info(x, 6)
    assert found.rows_screened + found.rows_exact == 60
    assert_same_code(found.code, x, weight, bias, 6)
    assert_same_code(one_by_one(encoder, x, 6), x, weight, bias, 6)


@screens
def test_equal_scores_go_to_the_lower_latent():
    x, weight, _ = inputs(N=20, D=64, M=520)
    weight = weight[:40].repeat(13, 1)
    found = ScreenedEncoder(weight).encode_with_info(x, 4)
    assert found.rows_screened == 20
    best = (x @ weight[:40].T).argmax(1)
    expected = best[:, None] + 40 * torch.arange(4)
    assert torch.equal(found.code.indices.sort().values, expected)
    alone = one_by_one(ScreenedEncoder(weight), x, 4)
    assert torch.equal(alone.indices.sort().values, expected)


@screens_by_torch
def test_a_row_alone_has_the_bounds_of_a_row_among_others():
    x, weight, bias = inputs(N=20, D=257, M=1001)
    copied = screening_torch.quantise(weight, bias, "statistical", 0)
    assert copied is not None
    together = screening_torch._upper(copied, x)
    for i in range(len(x)):
        alone = screening_torch._upper_row(copied, x[i])
        assert alone is not None
        scores, factor, step, norm = alone
        torch.testing.assert_close(scores, together.scores[i])
        others = (together.factors[i, 0], together.step[i], together.norm[i])
        for one, other in zip((factor, step, norm), others, strict=True):
            assert one == pytest.approx(float(other), rel=1e-5)


@screens_by_torch
@pytest.mark.parametrize("case", ["zero", "infinite", "nan", "outlier", "few positive"])
def test_a_row_alone_that_needs_more_is_left_to_the_general_path(case):
    x, weight, bias = inputs(N=1, D=257)
    copied = screening_torch.quantise(weight, bias, "statistical", 0)
    assert copied is not None
    assert screening_torch._encode_row(copied, x, 6, True) is not None
    if case == "zero":
        x.zero_()
    elif case == "outlier":
        x[0, 3] = 1e4
    elif case == "few positive":
        copied = screening_torch.quantise(weight, bias - 3.0, "statistical", 0)
        assert copied is not None
    else:
        x[0, 3] = float(case[:3])
    assert screening_torch._encode_row(copied, x, 6, True) is None


@screens
def test_a_copy_sees_that_the_weight_was_written_to_behind_its_back():
    x, weight, bias = inputs(N=1)
    encoder = ScreenedEncoder(weight, bias)
    best = int(encoder.encode(x, 6).indices[0, 0])
    weight.data[best] *= -1.0
    state = encoder._state
    assert state is not None
    with pytest.raises(StaleCopyError):
        state.copy.encode(x, 6, None, None, True)
    assert_same_code(encoder.encode(x, 6), x, weight, bias, 6)


@screens
@settings(max_examples=60)
@given(data=st.data())
def test_any_input(data):
    """Rows, latents and dimensions scaled at will, entries repeated, weight and bias shifted."""
    N = data.draw(st.integers(0, 9), label="N")
    D = data.draw(st.sampled_from([1, 3, 16, 50, 129]), label="D")
    M = data.draw(st.integers(64, 400), label="M")
    k = data.draw(st.integers(1, M // 64), label="k")
    x, weight, bias = inputs(N, D, M, seed=data.draw(st.integers(0, 99), label="seed"))
    span = data.draw(st.floats(0, 6), label="decades")
    generator = torch.Generator().manual_seed(7)
    x *= 10 ** (span * torch.rand(N, 1, generator=generator))
    weight *= 10 ** (span * torch.rand(M, 1, generator=generator))
    x *= 10 ** (span * torch.rand(1, D, generator=generator))
    if data.draw(st.booleans(), label="repeated latents"):
        weight = weight[torch.arange(M) % 17]
    if data.draw(st.booleans(), label="coarse"):
        x, weight = x.round(), weight.round()
    bias *= data.draw(st.sampled_from([0.0, 1.0, 1e4]), label="bias")
    margin = data.draw(st.sampled_from(MARGINS), label="margin")
    code = ScreenedEncoder(weight, bias, margin=margin).encode(x, k)
    assert_same_code(code, x, weight, bias, k)


@screens
def test_rows_that_cannot_be_screened_take_the_exact_path():
    x, weight, bias = inputs()
    x[3] = 0.0
    x[5, 2] = math.nan
    x[8, 1] = math.inf
    x[9, :] = 3e38
    found = ScreenedEncoder(weight, bias).encode_with_info(x, 8)
    assert found.rows_exact == 4
    assert found.reason is not None
    assert "not finite" in found.reason
    exact = topk_encode(x, weight, bias, 8)
    left = [3, 5, 8, 9]  # scores of the last overflow: to inf or NaN, as the rows beside it decide
    for part, of_left in zip(exact, topk_encode(x[left], weight, bias, 8), strict=True):
        part[left] = of_left
    assert torch.equal(found.code.indices, exact.indices)
    torch.testing.assert_close(found.code.acts, exact.acts, equal_nan=True)


@screens
def test_rows_with_too_many_candidates_take_the_exact_path():
    M = 4000  # beyond what the compiled library keeps of a row
    x, weight, bias = inputs(M=M)
    weight = weight[:1].repeat(M, 1)
    weight[0] *= 1.001
    bias.zero_()
    x[:20] = weight[0] * 5  # 20 rows where all latents score alike
    x[20:] = -weight[0]  # and 20 without a positive score
    found = ScreenedEncoder(weight, bias).encode_with_info(x, 8)
    assert found.rows_exact == 20
    assert_same_code(found.code, x, weight, bias, 8)


@screens
@pytest.mark.parametrize("change", ["step", "fused step", "bias", "copy_", "replace", "data"])
def test_a_changed_weight_is_copied_anew(change):
    x, weight, bias = inputs()
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    encoder = ScreenedEncoder(weight, bias)
    with torch.no_grad():
        encoder.encode(x, 8)
        if change.endswith("step"):
            weight.grad = torch.randn_like(weight)
            torch.optim.SGD([weight], lr=1.0, fused=change.startswith("fused")).step()
        elif change == "bias":
            bias += 5 * torch.randn(700)
        elif change == "copy_":
            weight.copy_(torch.randn(700, 96))
        elif change == "replace":
            weight.data = torch.randn(700, 96)
        else:  # of few latents: what is then found lies out of bounds
            weight.data[1:7].mul_(3.0)
        found = encoder.encode_with_info(x, 8)
        assert found.rows_screened == 40
        assert_same_code(found.code, x, weight.detach(), bias.detach(), 8)


@screens
def test_the_copy_is_kept_while_nothing_changes():
    x, weight, bias = inputs()
    encoder = ScreenedEncoder(weight, bias)
    encoder.encode(x, 8)
    first = encoder._state
    encoder.encode(x, 9)
    assert encoder._state is first


@screens
def test_same_bits_twice_and_whatever_the_batch(monkeypatch):
    x, weight, bias = inputs(N=70)
    codes = [ScreenedEncoder(weight, bias, seed=3).encode(x, 8) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    monkeypatch.setattr(screening_torch, "ROWS", 16)
    monkeypatch.setattr(screening_torch, "BLOCK", 32)
    chunked = ScreenedEncoder(weight, bias, seed=3).encode(x, 8)
    assert torch.equal(chunked.indices, codes[0].indices)
    torch.testing.assert_close(chunked.acts, codes[0].acts)


@screens
@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize("lacking", [(), ("bias",), ("pre_bias", "prediction")])
def test_gradients_of_every_input_are_those_of_the_exact_path(sorted, lacking):
    x, weight, bias = inputs()
    torch.manual_seed(1)
    given = {"x": x, "weight": weight, "bias": bias}
    given |= {"pre_bias": torch.randn(96), "prediction": torch.randn(40, 96)}
    given = {name: None if name in lacking else t for name, t in given.items()}
    factors = torch.randn(40, 8)

    def gradients(encode):
        leaves = {n: t.clone().requires_grad_() for n, t in given.items() if t is not None}
        code = encode(*(leaves.get(name) for name in given))
        assert not code.indices.requires_grad
        return torch.autograd.grad((code.acts * factors).sum(), list(leaves.values()))

    def screened(x, weight, bias, pre_bias, prediction):
        options = {"pre_bias": pre_bias, "prediction": prediction, "sorted": sorted}
        found = ScreenedEncoder(weight, bias).encode_with_info(x, 8, **options)
        assert found.rows_screened == 40
        return found.code

    def exact(x, weight, bias, pre_bias, prediction):
        return topk_encode(
            x, weight, bias, 8, pre_bias=pre_bias, prediction=prediction, sorted=sorted
        )

    for got, expected in zip(gradients(screened), gradients(exact), strict=True):
        torch.testing.assert_close(got, expected)


@screens
def test_the_gradient_of_the_activations_alone_keeps_the_copy():
    x, weight, bias = inputs()
    encoder = ScreenedEncoder(weight, bias)
    encoder.encode(x.requires_grad_(), 8).acts.sum().backward()
    assert x.grad is not None
    assert encoder._state is not None


@screens
def test_training_never_uses_a_stale_copy():
    """A fused optimiser's step is not counted by torch: the copy serves one call."""
    x, weight, bias = inputs()
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05, fused=True)
    encoder = ScreenedEncoder(weight, bias)
    for _ in range(4):
        with torch.no_grad():
            encoder.encode(x, 8)  # leaves a copy behind
        code = encoder.encode(x, 8)
        assert encoder._state is None
        assert_same_code(code, x, weight.detach(), bias.detach(), 8)
        optimizer.zero_grad()
        (-code.acts.sum()).backward()
        optimizer.step()


def test_few_rows_of_training_take_the_exact_path():
    weight = torch.randn(1 << 14, 1 << 8, requires_grad=True)
    found = ScreenedEncoder(weight).encode_with_info(torch.randn(40, 256), 8)
    assert found.rows_exact == 40
    assert "under torch.no_grad()" in str(found.reason)
    assert found.code.acts.requires_grad


def test_why_nothing_is_screened():
    x, weight, bias = inputs()
    big = torch.zeros(1 << 14, 1 << 8)

    def reason(weight, bias=None, x=x, k=8, **options):
        found = ScreenedEncoder(weight, bias, **options).encode_with_info(
            x[..., : weight.shape[1]], k
        )
        assert (found.rows_screened, found.candidates) == (0, 0)
        assert found.code.acts.shape == (*x.shape[:-1], k)
        return found.reason

    assert "does not pay at M=128, D=96, k=9" in reason(weight[:128], bias[:128], k=9)
    assert "float64" in reason(weight.double(), bias.double(), x.double())
    x = torch.randn(40, 256)
    assert "does not pay" in reason(big, x=x, k=2000)
    if screened_encode.unavailable("torch") is None:
        options = {"margin": "certain", "implementation": "torch"}
        assert "certain margin does not pay at 40 rows" in reason(big, x=x, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "not in float32" in reason(big, x=x)
    with torch.inference_mode():
        made_there = big + 0.0
    assert "inference mode" in reason(made_there, x=x)


def test_a_processor_that_cannot_screen_is_named_once(monkeypatch, caplog):
    """An older x86, or Arm: the exact path, and a word about it."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    monkeypatch.setattr(native, "unavailable", lambda: "no AVX-512")
    screened_encode._warn_once.cache_clear()
    encoder = ScreenedEncoder(torch.randn(1 << 14, 1 << 8))
    x = torch.randn(3, 1 << 8)
    found = encoder.encode_with_info(x, 8)
    encoder.encode(x, 8)
    assert found.rows_exact == 3
    assert "VNNI" in str(found.reason)
    assert torch.equal(found.code.indices, topk_encode(x, encoder.weight, None, 8).indices)
    (record,) = caplog.records
    assert "float32 GEMM" in record.message
    assert "VNNI" in record.message


@pytest.mark.parametrize("missing", ["oneDNN", "op"])
def test_a_torch_without_the_private_op_is_named(monkeypatch, missing):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    if missing == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "no oneDNN" in str(screened_encode.unavailable("torch"))
    else:
        monkeypatch.setattr(torch.ops, "onednn", object())
        assert "qlinear_prepack" in str(screened_encode.unavailable("torch"))


@screens
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_weight_that_is_not_finite(where):
    x, weight, bias = inputs()
    (weight[7] if where == "weight" else bias)[3] = math.nan
    found = ScreenedEncoder(weight, bias).encode_with_info(x, 8)
    exact = topk_encode(x, weight, bias, 8)
    assert found.reason == "the weight or bias is not finite"
    assert torch.equal(found.code.indices, exact.indices)


@screens
def test_shapes_and_strides():
    x, weight, bias = inputs(N=24)
    encoder = ScreenedEncoder(weight.T.contiguous().T, bias)  # [M, D], latents not contiguous
    expected = topk_encode(x, weight, bias, 8)
    for shape in ((2, 3, 4, 96), (24, 96)):
        code = encoder.encode(x.view(shape), 8)
        assert code.acts.shape == code.indices.shape == (*shape[:-1], 8)
        assert torch.equal(code.indices.view(24, 8), expected.indices)
    code = encoder.encode(x.T.contiguous().T, 8)
    assert torch.equal(code.indices, expected.indices)
    assert encoder.encode(x[0], 8).indices.tolist() == expected.indices[0].tolist()
    assert encoder.encode(x[:0], 8).acts.shape == (0, 8)


def test_bad_arguments():
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"margin='sure', expected statistical or certain"):
        ScreenedEncoder(weight, bias, margin="sure")
    with pytest.raises(ValueError, match=r"weight has shape \[96\], expected \[M, D\]"):
        ScreenedEncoder(weight[0])
    with pytest.raises(ValueError, match=r"bias has shape \[3\], expected \[700\]"):
        ScreenedEncoder(weight, bias[:3])
    with pytest.raises(ValueError, match="k=701 exceeds"):
        ScreenedEncoder(weight, bias).encode(x, 701)


@screens
def test_bad_arguments_where_it_screens():
    x, weight, bias = inputs()
    encoder = ScreenedEncoder(weight, bias)
    with pytest.raises(ValueError, match=r"x has shape \[40, 95\]"):
        encoder.encode(x[:, 1:], 8)
    with pytest.raises(ValueError, match=r"k=0, expected at least 1"):
        encoder.encode(x, 0)
    with pytest.raises(ValueError, match=r"prediction has shape \[39, 96\]"):
        encoder.encode(x, 8, prediction=x[1:])


@screens
def test_a_copied_encoder_makes_its_own_copy():
    x, weight, bias = inputs()
    encoder = ScreenedEncoder(weight, bias)
    before = encoder.encode(x, 8)
    twin = copy.deepcopy(encoder)
    encoder.weight.zero_()
    assert torch.equal(twin.encode(x, 8).indices, before.indices)
    assert twin.weight is not encoder.weight


@screens
def test_the_default_dtype_of_torch_does_not_matter():
    x, weight, bias = inputs()
    expected = ScreenedEncoder(weight, bias).encode(x, 8)
    torch.set_default_dtype(torch.float64)
    try:
        code = ScreenedEncoder(weight, bias).encode(x, 8)
        one = ScreenedEncoder(weight, bias).encode(x[:1], 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert code.acts.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(code, expected, strict=True))
    assert torch.equal(one.indices, expected.indices[:1])


@screens
def test_threads_encode_while_the_weight_changes():
    """Every code is that of one of the two weights, or the call says that it could not be made."""
    x, weight, bias = inputs(N=20, M=700)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    versions = [weight.data.clone(), weight.data.flip(0) * 1.5]
    expected = [topk_encode(x, version, bias, 8) for version in versions]
    encoder = ScreenedEncoder(weight, bias)
    wrong, made, stop = [], [], threading.Event()

    def write():
        for turn in itertools.count(1):
            if stop.is_set():
                return
            weight.data = versions[turn % 2].clone()  # at once: no code sees half of each
            time.sleep(2e-4)  # the copy is made anew in between

    def read():
        for _ in range(60):
            try:
                code = encoder.encode(x, 8)
            except RuntimeError as error:
                assert "another thread" in str(error)  # noqa: PT017
                continue
            made.append(code)
            if not any(torch.equal(code.indices, right.indices) for right in expected):
                wrong.append(code)

    threads = [threading.Thread(target=write), *(threading.Thread(target=read) for _ in "abcd")]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert len(made) > 100
    assert not wrong
    weight.data = versions[0]
    assert torch.equal(encoder.encode(x, 8).indices, expected[0].indices)


@screens
@pytest.mark.parametrize("change", ["fewer latents", "narrower", "transposed"])
def test_a_weight_that_becomes_another_view_of_its_memory_is_copied_anew(change):
    """Pruning by `.data` keeps address and version."""
    x, weight, bias = inputs(D=256, M=256)
    encoder = ScreenedEncoder(weight, bias)
    encoder.encode(x, 8)
    if change == "fewer latents":
        weight.data, bias.data = weight.data[:160], bias.data[:160]
    elif change == "narrower":
        weight.data, x = weight.data[:, :128], x[:, :128]
    else:
        weight.data = weight.data.T
    assert_same_code(encoder.encode(x, 8), x, weight, bias, 8)
