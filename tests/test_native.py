"""The compiled CPU library does what the reference says, whatever the layout of its arguments."""

import math
import random

import pytest
import torch
from torch import Tensor

from resae_kernels import (
    ScreenedEncoder,
    gradients,
    online_step,
    reconstruction_error,
    reference,
    sparse_decode,
    topk_encode,
)
from resae_kernels import screened as screened_encode
from resae_kernels.cpu import native, screening_native
from resae_kernels.cpu.build_native import compile_library
from resae_kernels.cpu.screening_native import NativeCopy
from resae_kernels.screening_bounds import STEPS, draw_dither

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
SMALL_FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = 300
"""Seeded cases of the fuzz; thousands were run once with other seeds."""


def test_the_library_is_built_where_it_can_be():
    """The gate's machine has a compiler: a library that is missing there would hide this file."""
    reason = compile_library()
    assert reason is None or "no C compiler" in reason or "for Linux on x86-64" in reason


# -- selection -------------------------------------------------------------------------------------


def selected_by_sorting(scores: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Selection by a stable sort: value, descending (NaN first), then index; padding last."""
    positive = (scores > 0) | scores.isnan()
    ranked = torch.where(scores.isnan(), math.inf, scores.float()).double()
    ranked = ranked + scores.isnan() * 1.0
    ranked[scores.isnan()] = torch.finfo(torch.float64).max  # above +inf is nothing: see below
    ranked[(scores == math.inf)] = torch.finfo(torch.float32).max * 2.0
    ranked[~positive] = -1.0
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, :k]
    taken = positive.gather(1, order)
    acts = torch.where(taken, scores.gather(1, order), 0)
    indices = torch.where(taken, order, 0)
    if not sorted:
        place = torch.where(taken, order, scores.shape[1]).argsort(dim=1, stable=True)
        acts, indices = acts.gather(1, place), indices.gather(1, place)
    return acts, indices


@needs_native
@pytest.mark.parametrize("dtype", SMALL_FLOATS)
@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize(
    "case", ["random", "ties", "constant", "negative", "few positive", "nan", "inf", "rising"]
)
@pytest.mark.parametrize(("M", "k"), [(1, 1), (17, 17), (100, 7), (5000, 64), (5000, 700)])
def test_selection_is_that_of_a_stable_sort(dtype, sorted, case, M, k):
    generator = torch.Generator().manual_seed(M + k)
    scores = torch.randn(5, M, generator=generator)
    if case == "ties":
        scores = (scores * 2).round() / 2
    elif case == "constant":
        scores[:] = 0.5
    elif case == "negative":
        scores = -scores.abs()
    elif case == "few positive":
        scores -= 2.5
    elif case == "nan":
        scores[:, :: max(1, M // 3)] = math.nan
        scores[1] = math.nan
    elif case == "inf":
        scores[:, 1::5] = math.inf
        scores[:, ::3] = -math.inf
    elif case == "rising":
        scores = torch.arange(M, dtype=torch.float32).repeat(5, 1) % 250
    scores = scores.to(dtype)
    acts, indices = native.select(scores, k, sorted)
    expected = selected_by_sorting(scores, k, sorted)
    assert torch.equal(indices, expected[1])
    assert torch.equal(acts.nan_to_num(nan=7e4), expected[0].nan_to_num(nan=7e4))


@needs_native
def test_selection_of_no_rows_and_by_several_threads():
    assert native.select(torch.randn(0, 9), 3, True)[0].shape == (0, 3)
    scores = torch.randn(300, 3000)
    expected = selected_by_sorting(scores, 9, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = native.select(scores, 9, True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- the 8-bit copy --------------------------------------------------------------------------------


def rebuilt_weight(copied: NativeCopy, M: int, D: int, seed: int) -> Tensor:
    """ŵ = s (q − v + ½) in float64, from the copy's own memory."""
    _, _, levels, *_ = copied._tensors
    start, steps = levels.start, levels.steps
    panels = copied._packed.view(len(copied._packed) // 16, -1, 16, 4)
    q = panels.permute(0, 2, 1, 3).reshape(copied._packed.shape)
    assert torch.equal(start[:M].long(), -128 * q[:M].long().sum(1))
    assert not q[M:].any()
    assert not q[:, D:].any()
    _, weight_dither = draw_dither(seed, D)
    return steps[:M, None].double() * (q[:M, :D].double() - weight_dither.double())


@needs_native
@pytest.mark.parametrize("dtype", SMALL_FLOATS)
@pytest.mark.parametrize(("M", "D"), [(40, 64), (700, 97), (33, 513)])
def test_the_copy_is_within_half_a_step_of_the_weight(dtype, M, D):
    weight = (torch.randn(M, D) * torch.logspace(-2, 1, M)[:, None]).to(dtype)
    copied = NativeCopy(weight, None, "certain", seed=5)
    steps = weight.double().abs().amax(1, keepdim=True) / STEPS
    off = (rebuilt_weight(copied, M, D, 5) - weight.double()).abs() / steps
    assert off.max() <= 0.5 * (1 + 1e-4)
    assert off.max() > 0.45, "rounded without its dither"
    *_, terms = copied._tensors
    error = (rebuilt_weight(copied, M, D, 5) - weight.double()).norm(dim=1)
    assert bool((terms[0, :M] >= error).all())
    torch.testing.assert_close(terms[0, :M].double(), error, rtol=1e-3, atol=0)


@needs_native
@pytest.mark.parametrize("margin", screened_encode.MARGINS)
@pytest.mark.parametrize("outliers", [False, True])
def test_every_score_is_within_its_bounds(margin, outliers):
    """The library's bounds, from the copy's memory and the definitions, in float64, for every pair
    of row and latent; the library itself looks at those that it scores."""
    N, D, M = 200, 257, 1001
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator)
    weight = torch.randn(M, D, generator=generator) * torch.logspace(-2, 1, M)[:, None] / 16
    if outliers:
        x[:, 3] *= 300.0
        x[::2, 250] += 80.0
    copied = NativeCopy(weight, None, margin, seed=3)
    copied.encode(x, 8, None, None, True)
    assert set(copied.dimensions) == ({3, 250} if outliers else set())
    _, _, levels, _, terms = copied._tensors
    dither = levels.dither
    inner = x.double()
    inner[:, list(copied.dimensions)] = 0.0
    step = inner.abs().amax(1, keepdim=True) / STEPS
    u = dither[:D].double()
    rebuilt = step * ((inner / step + u).floor() - u + 0.5)
    exactly = x.double() - inner
    approximate = rebuilt @ rebuilt_weight(copied, M, D, 3).T + exactly @ weight.double().T
    truth = x.double() @ weight.double().T
    inner_norm = inner.norm(dim=1, keepdim=True) / step
    if margin == "certain":
        error = ((inner - rebuilt) / step).norm(dim=1, keepdim=True)
        width = inner_norm * terms[0, :M].double() + error * terms[1, :M].double()
    else:
        width = ((copied._struct.ratio * inner_norm) ** 2 + 1).sqrt() * terms[0, :M].double()
    used = ((approximate - truth).abs() / (width * step)).max()
    assert used < 1
    assert used > (0.4 if margin == "statistical" else 0.1), "wider than it need be"


# -- screened encode -------------------------------------------------------------------------------


def scores_in_float64(x, weight, bias, pre_bias, prediction) -> tuple[Tensor, Tensor]:
    """Scores of the residual rounded to x's dtype, as the contract has it, and their scale."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rest = x.to(wide)
    for offset in (prediction, pre_bias):
        rest = rest if offset is None else rest - offset.to(wide)
    rest = rest.to(x.dtype).double()
    scores = rest @ weight.double().T
    size = rest.norm(dim=-1, keepdim=True) * weight.double().norm(dim=1)
    if bias is not None:
        scores, size = scores + bias.double(), size + bias.double().abs()
    return scores, size


def assert_code(acts, indices, scores: Tensor, size: Tensor, k: int, sorted: bool) -> None:
    """The TopK of float64 scores but for ties within the rounding of the dtype and float32 sums."""
    eps = torch.finfo(acts.dtype).eps
    room = eps * scores.abs() + (1e-15 if acts.dtype == torch.float64 else 3e-6) * size
    high, low = scores + room, scores - room
    taken = acts > 0
    wide = acts.double()
    assert (wide <= high.gather(1, indices))[taken].all(), "an act is too large"
    assert (wide >= low.gather(1, indices))[taken].all(), "an act is too small"
    kth_low, kth_high = low.topk(k).values[:, -1:], high.topk(k).values[:, -1:]
    assert (high.gather(1, indices) >= kth_low)[taken].all(), "not of the TopK"
    above = low > torch.maximum(kth_high, torch.zeros_like(kth_high))
    present = (
        indices.new_zeros(above.shape).scatter_add(1, indices, taken.long()) > 0
    )  # padding has index 0 too
    assert present[above].all(), "a latent of the TopK is missing"
    assert (taken.sum(1) >= (low > 0).sum(1).clamp_max(k)).all(), "too few latents"
    assert (indices[~taken] == 0).all()
    assert (acts[~taken] == 0).all()
    for row, count in zip(indices.tolist(), taken.sum(1).tolist(), strict=True):
        assert len(set(row[:count])) == count, "a latent twice"
        assert sorted or row[:count] == list(dict.fromkeys(row[:count])), "repeated"
    if sorted:
        assert (acts[:, 1:] <= acts[:, :-1]).all(), "not sorted"
    else:
        order = torch.where(taken, indices, 1 << 40)
        assert (order[:, 1:] >= order[:, :-1]).all(), "not in order of index"


@needs_native
@pytest.mark.parametrize("dtype", SMALL_FLOATS)
@pytest.mark.parametrize("margin", screened_encode.MARGINS)
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("N", [1, 2, 5, 16, 33, 300])
def test_screened_codes(dtype, margin, amx, threads, N):
    if amx and not native.has_amx():
        pytest.skip("this processor has no AMX")
    generator = torch.Generator().manual_seed(N)
    x, prediction = torch.randn(2, N, 130, generator=generator).to(dtype)
    weight = (torch.randn(1500, 130, generator=generator) / 11).to(dtype)
    bias, pre_bias = torch.randn(1500, generator=generator).to(dtype), prediction[0] * 0.5
    copied = NativeCopy(weight, bias, margin, seed=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = copied.encode(x, 24, pre_bias, prediction, N % 2 == 0, amx=amx)
    finally:
        torch.set_num_threads(before)
    assert found.rows_left is None
    assert N * 24 <= found.candidates < N * 1500 // 2
    scores, size = scores_in_float64(x, weight, bias, pre_bias, prediction)
    assert_code(found.acts, found.indices, scores, size, 24, N % 2 == 0)


@needs_native
def test_rows_beyond_a_block_and_alone_have_the_same_code():
    x, weight = torch.randn(600, 64), torch.randn(800, 64)
    copied = NativeCopy(weight, None, "statistical", seed=0)
    together = copied.encode(x, 8, None, None, True)
    for i in (0, 255, 256, 599):
        alone = copied.encode(x[i : i + 1], 8, None, None, True)
        assert torch.equal(alone.acts[0], together.acts[i])
        assert torch.equal(alone.indices[0], together.indices[i])


@needs_native
def test_outlier_dimensions_become_columns_and_are_handed_on():
    x, weight = torch.randn(50, 96), torch.randn(700, 96)
    x[:, 7] += 400.0
    x[:, 90] -= 90.0
    encoder = ScreenedEncoder(weight)
    first = encoder.encode_with_info(x, 8)
    weight += 0.0  # counted as a change: the copy is made anew
    assert encoder.encode_with_info(x, 8).rows_screened == 50
    assert encoder._state is not None
    assert isinstance(encoder._state.copy, NativeCopy)
    assert set(encoder._state.copy.dimensions) == {7, 90}
    x[:, [7, 90]] = 0.0
    plain = ScreenedEncoder(weight).encode_with_info(x, 8)
    assert first.candidates < 1.5 * plain.candidates, "outliers cost candidates"


@needs_native
def test_an_outlier_at_the_very_limit_ends_the_search_for_columns(monkeypatch):
    """The library finds an entry beyond the limit, the choice of columns finds it within."""
    monkeypatch.setattr(screening_native, "_with_largest", lambda dimensions, _: dimensions)
    x, weight = torch.randn(5, 96), torch.randn(700, 96)
    x[:, 7] += 400.0
    found = NativeCopy(weight, None, "statistical", seed=0).encode(x, 8, None, None, True)
    scores, size = scores_in_float64(x, weight, None, None, None)
    assert_code(found.acts, found.indices, scores, size, 8, True)


# -- any layout ------------------------------------------------------------------------------------


def contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def transposed(t: Tensor) -> Tensor:
    return contiguous(t.mT).mT if t.ndim > 1 else strided(t)


def strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), math.nan, dtype=t.dtype)
    wide[..., 1::3] = t
    return wide[..., 1::3]


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*(n + 2 for n in t.shape[:-1]), t.shape[-1] + 5), math.nan, dtype=t.dtype)
    inside = wide[..., 3 : 3 + t.shape[-1]]
    inside = inside[1:-1] if t.ndim > 1 else inside
    inside.copy_(t)
    return inside


def offset(t: Tensor) -> Tensor:
    memory = torch.full((t.numel() + 7,), math.nan, dtype=t.dtype)
    memory[1 : 1 + t.numel()] = t.flatten()
    return memory[1 : 1 + t.numel()].view(t.shape)


def negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t)  # pyright: ignore[reportPrivateImportUsage]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


LAYOUTS = (contiguous, transposed, strided, sliced, offset, negated, expanded)


def laid_out(t: Tensor, draw: random.Random) -> Tensor:
    """The tensor in a layout drawn at random; `expanded` changes its values."""
    return draw.choice(LAYOUTS)(t) if t.numel() else t


def fuzzed(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([*SMALL_FLOATS, torch.float64])
    N, D = draw.choice([1, 2, 3, 16, 17, 40]), draw.choice([1, 7, 16, 33, 64, 130, 400])
    M = draw.choice([1, 5, 31, 64, 200, 520])
    k = draw.randint(1, max(1, min(M, 40) // draw.choice([1, 2, 8])))
    sorted = draw.random() < 0.5

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return laid_out((torch.randn(shape) * scale).to(dtype), draw)

    def maybe(*shape: int) -> Tensor | None:
        return made(*shape) if draw.random() < 0.7 else None

    x, weight = made(N, D), made(M, D, scale=D**-0.5)
    bias, pre_bias, prediction = maybe(M), maybe(D), maybe(N, D)
    op = draw.choice(["topk_encode", "screened", "decode", "error", "online_step"])
    if op in ("topk_encode", "screened"):
        if op == "topk_encode":
            rows = draw.choice([None, 1, 1 << 12])
            code = topk_encode(
                x, weight, bias, k, pre_bias=pre_bias, prediction=prediction, sorted=sorted,
                workspace_bytes=rows,
            )  # fmt: skip
        else:
            margin = draw.choice(screened_encode.MARGINS)
            code = ScreenedEncoder(weight, bias, margin=margin).encode(
                x, k, pre_bias=pre_bias, prediction=prediction, sorted=sorted
            )
        scores, size = scores_in_float64(x, weight, bias, pre_bias, prediction)
        assert_code(*code, scores, size, k, sorted)
        return
    W_dec = made(M, D, scale=D**-0.5)
    eps = torch.finfo(dtype).eps
    if op == "online_step":
        if N > 16:
            return
        step = online_step(x, weight, bias, k, W_dec, b_dec=pre_bias, prediction=prediction)
        scores, size = scores_in_float64(x, weight, bias, pre_bias, prediction)
        assert_code(*step.code, scores, size, k, sorted=False)
        acts, indices, found = *step.code, step.x_hat
    else:
        acts = made(N, k).abs()
        indices = torch.randint(0, M, (N, k))
        indices = strided(indices.float()).long() if draw.random() < 0.3 else transposed(indices)
        found = None
    offsets = {"bias": pre_bias, "prediction": prediction}
    wide = {name: None if t is None else t.double() for name, t in offsets.items()}
    truth = reference.sparse_decode(acts.double(), indices, W_dec.double(), **wide)
    size = acts.double().abs() @ torch.ones(k, 1, dtype=torch.float64) * W_dec.double().abs().max()
    size = size + sum(t.abs().max() for t in wide.values() if t is not None)
    if op == "error":
        target = made(N, D)
        error, squared = reconstruction_error(acts, indices, W_dec, target, **offsets)
        off = error.double() - (truth - target.double())
        size = size + target.double().abs().max()
        wanted = (truth - target.double()).square().sum(-1)
        assert bool(
            ((squared.double() - wanted).abs() <= 8 * eps * (wanted + size[:, 0])).all()
        ) or (torch.allclose(squared.double(), wanted, rtol=0.05, atol=8 * eps))
    else:
        found = sparse_decode(acts, indices, W_dec, **offsets) if found is None else found
        off = found.double() - truth
    assert bool((off.abs() <= 4 * eps * size + 1e-12).all())


@pytest.mark.parametrize("start", range(0, CASES, 50))
def test_any_layout_and_dtype(start, screened_at_any_size):
    """A bias with a stride, an expanded scalar, a transposed weight: the codes of float64."""
    del screened_at_any_size
    for seed in range(start, start + 50):
        fuzzed(seed)


@pytest.mark.parametrize(
    "make", [lambda M: torch.randn(M, 2)[:, 0], lambda M: torch.tensor(0.5).expand(M)]
)
def test_a_bias_with_a_stride(make):
    """oneDNN read a strided bias as if it were contiguous: wrong codes, and memory that is not its
    own."""
    x, weight, bias = torch.randn(64, 128), torch.randn(512, 128), make(512)
    code, expected = (topk_encode(x, weight, b, 8) for b in (bias, bias.clone()))
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.acts, expected.acts)


# -- gradients of codes ----------------------------------------------------------------------------


def fuzzed_gradients(seed: int) -> None:
    """The three sums of the backward against float64: any dtype and layout, latents that a token
    names twice, acts of 0, latents that no token names."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([*SMALL_FLOATS, torch.float64])
    N, D = draw.choice([0, 1, 2, 17, 40, 300]), draw.choice([1, 7, 16, 33, 64, 130, 400])
    M, k = draw.choice([1, 5, 31, 64, 520]), draw.choice([1, 3, 8, 9, 16, 17, 40])
    acts = torch.randn(N, k) * (torch.rand(N, k) < 0.8)
    acts = laid_out((acts * draw.choice([1.0, -1.0])).to(dtype), draw)  # zeros of either sign
    x, W = (laid_out(torch.randn(n, D).to(dtype), draw) for n in (N, M))
    indices = torch.randint(0, draw.choice([M, -(-M // 3)]), (N, k))
    indices = transposed(indices) if draw.random() < 0.5 else indices[:, :k]
    code = torch.zeros(N, M, dtype=torch.float64)
    size = code.scatter_add(1, indices, acts.double().abs())
    code = code.scatter_add(1, indices, acts.double())
    found = gradients.scatter_outer(acts, indices, x, M)
    assert_summed(found, code.T @ x.double(), size.T @ x.double().abs())
    assert not found[~size.any(0)].any(), "the row of a latent that no token names"
    found = gradients.scatter_sum(acts, indices, M)
    assert_summed(found, code.sum(0), size.sum(0))
    found = torch.ops.resae.sddmm(x, indices, W)
    truth, size = x.double() @ W.double().T, x.double().abs() @ W.double().abs().T
    assert_summed(found, truth.gather(1, indices), size.gather(1, indices))


def assert_summed(found: Tensor, truth: Tensor, size: Tensor) -> None:
    """A sum in float32 (float64), rounded once; `size` is that of the terms without their sign."""
    assert found.shape == truth.shape
    room = 1e-14 if found.dtype == torch.float64 else 2e-6
    bound = torch.finfo(found.dtype).eps * truth.abs() + room * size
    smallest = torch.finfo(found.dtype).smallest_normal * 2.0**-10
    assert bool(((found.double() - truth).abs() <= bound + smallest).all())


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("start", range(0, CASES, 100))
def test_gradients_of_any_code(start, library, monkeypatch):
    if not library:
        monkeypatch.setattr(native, "takes", lambda *_: False)
    for seed in range(start, start + 100):
        fuzzed_gradients(seed)


@needs_native
@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_gradients_by_two_threads_have_the_same_bits(dtype):
    acts, x, W = (torch.randn(shape).to(dtype) for shape in ((700, 20), (700, 300), (900, 300)))
    indices = torch.randint(0, 900, (700, 20))
    indices[::2, 0] = 5  # one latent on half of all tokens

    def both() -> tuple[Tensor, Tensor]:
        return (
            native.scatter_outer([acts], indices, [x], 900)[0],
            native.sddmm(x, indices, W),
        )

    alone, before = both(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        together = both()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))


@needs_native
@pytest.mark.parametrize("index", [-1, 9])
@pytest.mark.parametrize("op", ["scatter_outer", "scatter_sum", "sddmm"])
def test_an_index_outside_is_refused_by_the_gradients(op, index):
    acts, indices, x = torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int64), torch.randn(4, 3)
    indices[3, 1] = index
    arguments = {
        "scatter_outer": ([acts], indices, [x], 9),
        "scatter_sum": (acts, indices, 9),
        "sddmm": (x, indices, torch.randn(9, 3)),
    }
    low, high = min(index, 0), max(index, 0)
    with pytest.raises(RuntimeError, match=f"{op}: indices from {low} to {high}, expected 0 to 8"):
        getattr(native, op)(*arguments[op])


@needs_native
def test_padding_that_names_a_latent_adds_nothing_to_its_gradient():
    """Holds also where the row of its token is not finite."""
    acts, indices = torch.tensor([[1.0, 0.0], [-0.0, 2.0]]), torch.tensor([[0, 1], [1, 0]])
    x = torch.tensor([[1.0], [math.inf]])
    found = native.scatter_outer([acts], indices, [x], 3)[0]
    assert found.tolist() == [[math.inf], [0.0], [0.0]]
