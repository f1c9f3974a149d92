import importlib
import itertools
import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import (
    DTYPES,
    assert_close_as_torch,
    assert_same,
    largest_allocation,
    random_code,
    scatter,
    values_and_gradients,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resae_kernels import (
    affine_chain,
    gradients,
    memory,
    reconstruction_error,
    reference,
    sparse_decode,
    topk_encode,
)
from resae_kernels import dense as dense_module
from resae_kernels.cpu import native, private_torch, sums
from resae_kernels.gradients import encoder_gradients, scatter_outer, scatter_sum
from resae_kernels.triton import decode as triton_decode
from resae_kernels.triton import runtime

pytestmark = pytest.mark.usefixtures("poisoned_memory")

either = pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
by_both_algorithms = pytest.mark.parametrize("algorithm", ["gather", "dense"])
# (N, D, M, k)
SHAPES = [
    pytest.param(5, 4, 8, 3, id="small"),
    pytest.param(0, 4, 8, 3, id="no-tokens"),
    pytest.param(1, 4, 8, 3, id="one-token"),
    pytest.param(37, 19, 53, 7, id="primes"),
    pytest.param(6, 1, 8, 3, id="D-1"),
    pytest.param(6, 12, 8, 1, id="k-1"),
    pytest.param(6, 12, 8, 8, id="k-M"),
    pytest.param(6, 3, 1, 1, id="M-1"),
    pytest.param(6, 3, 4, 0, id="empty-code"),
    # Of each kernel's tile more than one, and the last one partly filled.
    pytest.param(17, 293, 23, 19, id="many-tiles"),
    pytest.param(2, 131, 71, 67, id="many-tiles-of-few-tokens"),
]
module = importlib.import_module("resae_kernels.decode")


def decoder_inputs(N, D, M, k, dtype=torch.float64) -> dict[str, Tensor]:
    acts, indices = random_code(N, k, M, dtype)
    return {
        "acts": acts,
        "indices": indices,
        "W_dec": torch.randn(M, D).to(dtype),
        "bias": torch.randn(D).to(dtype),
        "prediction": torch.randn(N, D).to(dtype),
    }


def decode_two(op, acts, indices, W_dec, more_acts, more_indices, more_W_dec, bias, prediction):
    return op(
        [acts, more_acts],
        [indices, more_indices],
        [W_dec, more_W_dec],
        bias=bias,
        prediction=prediction,
    )


def both(implementation, algorithm=None):
    """The op as `implementation` computes it by that algorithm, and its reference."""
    op = partial(sparse_decode, implementation=implementation, algorithm=algorithm)
    return op, reference.sparse_decode


def two_decoders(dtype=torch.float64) -> dict[str, Tensor]:
    more = decoder_inputs(7, 5, 6, 2, dtype)
    names = ("acts", "indices", "W_dec")
    return decoder_inputs(7, 5, 11, 4, dtype) | {f"more_{name}": more[name] for name in names}


# -- equals the reference --------------------------------------------------------------------------


@either
@by_both_algorithms
@pytest.mark.parametrize(("N", "D", "M", "k"), SHAPES)
def test_sum_and_gradients_equal_the_reference(N, D, M, k, implementation, algorithm):
    inputs = decoder_inputs(N, D, M, k)
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: op(**t), inputs)
        for op in both(implementation, algorithm)
    )
    assert ours["output 0"].shape == (N, D)
    assert_same(ours, theirs)


@either
@by_both_algorithms
@pytest.mark.parametrize(
    "absent", [("bias",), ("prediction",), ("bias", "prediction")], ids="-".join
)
def test_sum_and_gradients_equal_the_reference_without_an_optional_input(
    absent, implementation, algorithm
):
    inputs = {name: t for name, t in decoder_inputs(7, 5, 11, 4).items() if name not in absent}
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: op(**t), inputs)
        for op in both(implementation, algorithm)
    )
    assert_same(ours, theirs)


@either
@by_both_algorithms
def test_lists_sum_over_dictionaries_of_different_sizes(implementation, algorithm):
    inputs = two_decoders()
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: decode_two(op, **t), inputs)
        for op in both(implementation, algorithm)
    )
    assert_same(ours, theirs)


@either
@by_both_algorithms
@pytest.mark.parametrize("N", [3, 18], ids=["few-tokens", "tokens"])
def test_four_dictionaries_sum_one_of_them_without_a_latent(N, implementation, algorithm):
    parts = [decoder_inputs(N, 70, M, k) for M, k in ((11, 9), (5, 0), (83, 66), (3, 1))]
    names = ("acts", "indices", "W_dec")
    inputs = {f"{name}.{i}": part[name] for i, part in enumerate(parts) for name in names}

    def total(op, **named):
        return op(*([named[f"{name}.{i}"] for i in range(4)] for name in names))

    ours, theirs = (
        values_and_gradients(partial(total, op), inputs) for op in both(implementation, algorithm)
    )
    assert_same(ours, theirs)


@either
def test_one_list_entry_is_the_plain_call(implementation):
    inputs = decoder_inputs(5, 4, 8, 3)
    lists = {name: [inputs[name]] for name in ("acts", "indices", "W_dec")}
    op, _ = both(implementation)
    assert torch.equal(op(**inputs), op(**(inputs | lists)))


@either
@by_both_algorithms
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_gradients_are_as_close_to_fp64_as_plain_torch(dtype, implementation, algorithm):
    def plain(acts, indices, W_dec, bias, prediction):
        return scatter(acts, indices, W_dec.shape[0]) @ W_dec + bias + prediction

    op, _ = both(implementation, algorithm)
    assert_close_as_torch(op, plain, decoder_inputs(37, 19, 53, 7, dtype))


@either
@by_both_algorithms
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over_dictionaries_is_as_close_to_fp64_as_plain_torch(dtype, implementation, algorithm):
    def plain(acts, indices, W_dec, more_acts, more_indices, more_W_dec, bias, prediction):
        first = scatter(acts, indices, W_dec.shape[0]) @ W_dec
        return (
            first
            + scatter(more_acts, more_indices, more_W_dec.shape[0]) @ more_W_dec
            + (bias + prediction)
        )

    op, _ = both(implementation, algorithm)
    assert_close_as_torch(lambda **t: decode_two(op, **t), plain, two_decoders(dtype))


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 0)], ids=["a-vector", "batch", "no-tokens"])
def test_leading_shape_is_kept(leading):
    acts, indices = torch.rand(*leading, 3), torch.randint(0, 8, (*leading, 3))
    inputs = {"acts": acts, "indices": indices, "W_dec": torch.randn(8, 4)}
    inputs["prediction"] = torch.randn(*leading, 4)
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: op(**t), inputs)
        for op in (sparse_decode, reference.sparse_decode)
    )
    assert ours["output 0"].shape == (*leading, 4)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-6)


@either
@by_both_algorithms
def test_op_passes_opcheck(implementation, algorithm):
    inputs = decoder_inputs(5, 4, 8, 3)
    acts, W_dec, bias, prediction = (
        inputs[name].requires_grad_() for name in ("acts", "W_dec", "bias", "prediction")
    )
    op = torch.ops.resae.sparse_decode.default
    for arguments in (
        ([acts], [inputs["indices"]], [W_dec], bias, prediction),
        ([acts] * 2, [inputs["indices"]] * 2, [W_dec] * 2, None, None),
    ):
        torch.library.opcheck(
            op, arguments, {"implementation": implementation, "algorithm": algorithm}
        )


def test_op_without_an_implementation_named_passes_opcheck():
    inputs = decoder_inputs(5, 4, 8, 3)
    acts, W_dec = (inputs[name].requires_grad_() for name in ("acts", "W_dec"))
    op = torch.ops.resae.sparse_decode.default
    torch.library.opcheck(op, ([acts], [inputs["indices"]], [W_dec], None, None))


@either
@by_both_algorithms
def test_ops_of_the_backward_pass_opcheck(implementation, algorithm):
    acts, indices = random_code(5, 3, 8)
    rows, W_dec = torch.randn(5, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    for tensor in (acts, rows, W_dec):
        tensor.requires_grad_()
    ops, named = torch.ops.resae, {"implementation": implementation, "algorithm": algorithm}
    torch.library.opcheck(ops.scatter_outer.default, (acts, indices, rows, 8), named)
    torch.library.opcheck(ops.sddmm.default, (rows, indices, W_dec), named)


@by_both_algorithms
def test_gradients_can_be_differentiated_again(algorithm):
    # Without a derivative of their own the sums of the backward would end the graph: a gradient
    # penalty would train as if they were constants.
    inputs = decoder_inputs(4, 3, 6, 3)
    inputs["indices"][0] = 5  # a latent named three times
    names = [name for name, t in inputs.items() if t.is_floating_point()]

    def decode(*leaves):
        named = dict(zip(names, leaves, strict=True))
        return sparse_decode(**named, indices=inputs["indices"], algorithm=algorithm)

    assert torch.autograd.gradgradcheck(decode, [inputs[name].requires_grad_() for name in names])


def test_registered_gradient_is_the_derivative():
    inputs = two_decoders()
    names = [name for name, t in inputs.items() if t.is_floating_point()]
    integers = {name: t for name, t in inputs.items() if name not in names}

    def total(*leaves):
        return decode_two(sparse_decode, **dict(zip(names, leaves, strict=True)), **integers)

    assert torch.autograd.gradcheck(total, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    "wanted", ["acts", "more_acts", "W_dec", "more_W_dec", "bias", "prediction"]
)
def test_one_gradient_alone_is_the_one_of_all_together(wanted):
    inputs = two_decoders()
    everything = values_and_gradients(lambda **t: decode_two(sparse_decode, **t), inputs)
    rest = {name: t for name, t in inputs.items() if name != wanted}
    alone = values_and_gradients(
        lambda **t: decode_two(sparse_decode, **rest, **t), {wanted: inputs[wanted]}
    )
    name = f"gradient of {wanted}"
    assert torch.equal(alone[name], everything[name])


@either
@by_both_algorithms
def test_same_bits_twice(implementation, algorithm):
    inputs = decoder_inputs(64, 24, 96, 9, torch.float32)
    op, _ = both(implementation, algorithm)
    first, second = (values_and_gradients(op, inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@either
@by_both_algorithms
def test_compiled_equals_eager(implementation, algorithm):
    inputs = two_decoders(torch.float32)
    op, _ = both(implementation, algorithm)

    def total(**tensors):
        return decode_two(op, **tensors)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(total, inputs), 0, 0)


@either
@by_both_algorithms
def test_non_contiguous_inputs_and_gradients_change_nothing(implementation, algorithm):
    inputs = decoder_inputs(6, 5, 9, 3)
    strided = {
        name: t.T.contiguous().T if t.ndim == 2 else torch.stack([t, t], dim=1)[:, 0]
        for name, t in inputs.items()
    }
    assert not any(t.is_contiguous() for t in strided.values())
    op, _ = both(implementation, algorithm)
    ours, theirs = (
        # A transposed result sends a transposed, an expanded sum a stride-0 gradient back.
        values_and_gradients(lambda **t: [y := op(**t).T, y.sum()], given_)
        for given_ in (strided, inputs)
    )
    assert_same(ours, theirs)


def test_meta_tensors_give_shapes():
    y = sparse_decode(
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(2, 3, 4, dtype=torch.int64, device="meta"),
        torch.empty(8, 5, device="meta"),
    )
    assert y.shape == (2, 3, 5)
    assert y.device.type == "meta"


@either
@by_both_algorithms
@given(data=st.data())
def test_any_code_equals_the_reference_repeated_latents_included(implementation, algorithm, data):
    N, M, k = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (1, 6), (1, 6)))
    D = data.draw(st.integers(1, 5))
    latent = st.lists(st.integers(0, M - 1), min_size=N * k, max_size=N * k)
    act = st.lists(st.integers(-2, 2), min_size=N * k, max_size=N * k)
    inputs = {
        "acts": torch.tensor(data.draw(act), dtype=torch.float64).reshape(N, k),
        "indices": torch.tensor(data.draw(latent), dtype=torch.int64).reshape(N, k),
        "W_dec": torch.randint(-3, 4, (M, D)).double(),
    }
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: op(**t), inputs)
        for op in both(implementation, algorithm)
    )
    assert_same(ours, theirs)


# -- worked numbers --------------------------------------------------------------------------------


def test_worked_example():
    acts = torch.tensor([[2.0, 3.0]], requires_grad=True)
    W_dec = torch.tensor([[1.0, 0], [0, 10], [100, 100]], requires_grad=True)
    bias = torch.tensor([0.5, 0.25], requires_grad=True)
    prediction = torch.tensor([[1000.0, 2000.0]], requires_grad=True)
    y = sparse_decode(acts, torch.tensor([[2, 1]]), W_dec, bias=bias, prediction=prediction)
    assert y.tolist() == [[1200.5, 2230.25]]
    y.backward(torch.tensor([[1.0, 7.0]]))
    assert acts.grad.tolist() == [[800, 70]]
    assert W_dec.grad.tolist() == [[0, 0], [3, 21], [2, 14]]
    assert bias.grad.tolist() == [1, 7]
    assert prediction.grad.tolist() == [[1, 7]]


@by_both_algorithms
@pytest.mark.parametrize("latents", [2, 50], ids=["few-latents", "many-latents"])
@pytest.mark.parametrize("offset", ["bias", "prediction", "another dictionary"])
def test_terms_are_added_before_the_one_rounding(offset, latents, algorithm):
    # 256 + 1 − 256: bf16 holds no 257, so that a sum rounded on the way gives 0.
    acts, indices = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0, 1]])
    W_dec = torch.zeros(latents, 1, dtype=torch.bfloat16)
    W_dec[:2, 0] = torch.tensor([256, 1])
    rest = torch.tensor([[-256]], dtype=torch.bfloat16)
    if offset == "another dictionary":
        lists = [acts, acts[:, :1]], [indices, indices[:, :1]], [W_dec, rest]
        y = sparse_decode(*lists, algorithm=algorithm)
    else:
        offsets = {offset: rest[0] if offset == "bias" else rest}
        y = sparse_decode(acts, indices, W_dec, algorithm=algorithm, **offsets)
    assert y.item() == 1


@by_both_algorithms
def test_gradient_of_the_acts_is_summed_before_the_one_rounding(algorithm):
    # (1 + 2⁻⁷)² − (1 + 2⁻⁶) = 2⁻¹⁴: a product rounded to bf16 before the sum gives 0.
    acts = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    W_dec = torch.tensor([[1 + 2**-7, 1]], dtype=torch.bfloat16)
    gradient = torch.tensor([[1 + 2**-7, -1 - 2**-6]], dtype=torch.bfloat16)
    sparse_decode(acts, torch.tensor([[0]]), W_dec, algorithm=algorithm).backward(gradient)
    assert acts.grad.item() == 2**-14


@by_both_algorithms
def test_padding_slots_add_nothing_to_the_sum_or_to_the_gradient_of_latent_0(algorithm):
    acts = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[1, 0, 0], [0, 0, 0]])
    W_dec = torch.tensor([[9.0, 9.0], [1.0, 2.0]], requires_grad=True)
    y = sparse_decode(acts, indices, W_dec, algorithm=algorithm)
    assert y.tolist() == [[2, 4], [0, 0]]
    y.backward(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert W_dec.grad.tolist() == [[0, 0], [2, 6]]


def test_latents_not_in_the_code_get_exactly_zero_gradient():
    acts, indices = random_code(7, 2, 40)
    W_dec = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    sparse_decode(acts, indices, W_dec).sum().backward()
    used = torch.zeros(40, dtype=torch.bool).index_fill(0, indices[acts > 0], True)
    assert (W_dec.grad[~used] == 0).all()
    assert (W_dec.grad[used] != 0).all()


# -- sums by latent --------------------------------------------------------------------------------


@either
@pytest.mark.parametrize(("N", "D", "M", "k"), SHAPES)
def test_scatter_outer_is_the_transposed_dense_code_times_the_rows(N, D, M, k, implementation):
    acts, indices = random_code(N, k, M)
    rows = torch.randn(N, D, dtype=torch.float64)
    dense = scatter(acts, indices, M)
    outer = scatter_outer(acts, indices, rows, M, implementation)
    torch.testing.assert_close(outer, dense.T @ rows)
    torch.testing.assert_close(scatter_sum(acts, indices, M, implementation), dense.sum(0))


@either
def test_scatter_outer_of_padding_alone_is_zero(implementation):
    nothing = scatter_outer(
        torch.zeros(3, 2),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.ones(3, 4),
        5,
        implementation,
    )
    assert torch.equal(nothing, torch.zeros(5, 4))


def often_active(N: int, k: int, M: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A code in which latent 2 is active for half of all tokens and latent M − 1 for all."""
    acts, indices = random_code(N, k, M - 2, dtype)
    indices = torch.where(indices >= 2, indices + 1, indices)
    indices[::2, 1], indices[:, 0] = 2, M - 1
    return acts, indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [8, 10, 64], ids="pieces-of-{}".format)
def test_latent_of_half_of_all_tokens_is_summed_in_pieces(piece, dtype, monkeypatch):
    monkeypatch.setattr(triton_decode, "PIECE", piece)
    N, D, M, k = 131, 5, 11, 3
    acts, indices = often_active(N, k, M, dtype)
    assert min((indices[acts > 0] == latent).sum() for latent in (2, M - 1)) >= 64
    inputs = {"acts": acts, "indices": indices, "W_dec": torch.randn(M, D).to(dtype)}

    def plain(acts, indices, W_dec):
        return scatter(acts, indices, M) @ W_dec

    op, _ = both("triton")
    assert_close_as_torch(op, plain, inputs)


def test_pieces_of_every_length_sum_to_the_whole(monkeypatch, device):  # noqa: ARG001
    # Latent m has m entries: whole pieces, one entry less and one more, and none at all.
    latents = torch.arange(18).repeat_interleave(torch.arange(18))
    indices = latents[torch.randperm(len(latents))].unsqueeze(1)
    acts, rows = torch.rand(len(indices), 1).double() + 1, torch.randn(len(indices), 3).double()
    for piece in (1, 4, 8, 200):
        monkeypatch.setattr(triton_decode, "PIECE", piece)
        torch.testing.assert_close(
            scatter_outer(acts, indices, rows, 18, "triton"), scatter(acts, indices, 18).T @ rows
        )


@either
@pytest.mark.parametrize(("N", "D", "M", "k"), SHAPES)
def test_encoder_gradients_are_both_sums_of_one_code(N, D, M, k, implementation):
    acts, indices = random_code(N, k, M)
    rows = torch.randn(N, D, dtype=torch.float64)
    dense = scatter(acts, indices, M)
    outer, total = encoder_gradients(acts, indices, rows, M, implementation)
    torch.testing.assert_close(outer, dense.T @ rows)
    torch.testing.assert_close(total, dense.sum(0))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_sums_of_encoder_gradients_in_pieces(dtype, monkeypatch, device):
    monkeypatch.setattr(triton_decode, "PIECE", 10)
    N, M, k = 43, 7, 3
    acts, indices = (t.to(device) for t in often_active(N, k, M, dtype))
    # Two slices of D: one of them stores the sum of the acts.
    rows = torch.randn(N, 1040 // dtype.itemsize, device=device).to(dtype)
    outer, total = encoder_gradients(acts, indices, rows, M, "triton")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, scatter(acts.float(), indices, M).sum(0))
    assert torch.equal(outer, scatter_outer(acts, indices, rows, M, "triton"))


@pytest.fixture
def shuffled_programs(monkeypatch):
    """Run the programs of every launch in a random order, another one each time."""
    if not runtime.is_interpreted():
        pytest.skip("the order of programs on a GPU is the GPU's")
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def draw(*grid: int) -> None:
        set_dim(*grid)
        programs = list(itertools.product(*map(range, grid)))
        order.clear()
        order.update(zip(programs, random.sample(programs, len(programs)), strict=True))

    monkeypatch.setattr(builder, "set_grid_dim", draw)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *index: set_index(*order[index]))
    return order


def test_the_order_of_programs_does_not_change_a_bit(shuffled_programs, monkeypatch):
    monkeypatch.setattr(triton_decode, "PIECE", 8)
    N, M = 31, 5
    acts, indices = often_active(N, 3, M, torch.float32)
    indices[::3, 2] = 2  # named twice by a token
    rows, W_dec = torch.randn(N, 260), torch.randn(M, 260)

    def all_sums() -> list[Tensor]:
        return [
            *encoder_gradients(acts, indices, rows, M, "triton"),
            torch.ops.resae.sddmm(rows, indices, W_dec, implementation="triton"),
            sparse_decode(acts, indices, W_dec, implementation="triton"),
        ]

    first = all_sums()
    assert list(shuffled_programs) != list(shuffled_programs.values())
    assert all(map(torch.equal, first, all_sums()))


@either
def test_gradients_of_encoder_gradients(implementation):
    indices = torch.tensor([[1, 0], [1, 1]])
    leaves = [torch.rand(2, 2).double() + 0.1, torch.randn(2, 2).double()]
    assert torch.autograd.gradcheck(
        lambda acts, rows: encoder_gradients(acts, indices, rows, 3, implementation),
        [leaf.requires_grad_() for leaf in leaves],
    )


def test_the_encoder_sorts_its_code_once(monkeypatch, device):
    sorts = []
    sort = sums.sort_stably
    monkeypatch.setattr(sums, "sort_stably", lambda keys: sorts.append(keys) or sort(keys))
    x, weight, bias, pre_bias = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((5, 4), (8, 4), 8, 4)
    )
    code = topk_encode(x, weight, bias, 3, pre_bias=pre_bias, implementation="triton")
    code.acts.sum().backward()
    assert len(sorts) == 1


@either
def test_rows_that_no_latent_asks_for_do_not_matter(implementation):
    # Neither do those that stand in where a tile is not full: the first row, in these kernels.
    N, D, M, k = 19, 6, 8, 3
    acts, indices = torch.rand(N, k) + 0.1, torch.randint(1, M, (N, k))
    W_dec, rows = torch.randn(M, D), torch.randn(N, D)
    W_dec[0] = rows[0] = float("nan")
    acts[0] = 0
    op, _ = both(implementation)
    assert op(acts, indices, W_dec).isfinite().all()
    product = torch.ops.resae.sddmm(rows[1:], indices[1:], W_dec, implementation=implementation)
    assert product.isfinite().all()
    assert scatter_outer(acts, indices, rows, M, implementation).isfinite().all()


# -- the dense algorithm ---------------------------------------------------------------------------


def repeating_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes that name latents again and again, padding among them."""
    acts = torch.rand(9, 70, dtype=torch.float64)
    indices = torch.randint(0, 7, (9, 70))
    acts[::2, 30:], indices[::2, 30:] = 0, 0
    return {
        "acts": acts.to(dtype),
        "indices": indices,
        "W_dec": torch.randn(7, 5).to(dtype),
        "bias": torch.randn(5).to(dtype),
    }


@either
@by_both_algorithms
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_named_repeatedly_are_as_close_to_fp64_as_plain_torch(
    dtype, implementation, algorithm
):
    def plain(acts, indices, W_dec, bias):
        return scatter(acts, indices, W_dec.shape[0]) @ W_dec + bias

    op, _ = both(implementation, algorithm)
    inputs = repeating_inputs(dtype)
    assert_close_as_torch(op, plain, inputs)
    first, second = (values_and_gradients(op, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@either
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 7], ids="{}-rows".format)
def test_chunks_of_the_scattered_code_are_bounded_and_change_nothing(
    rows, dtype, implementation, monkeypatch
):
    N, D, M, k = 64, 3, 256, 8
    inputs = decoder_inputs(N, D, M, k, dtype)
    op, _ = both(implementation, "dense")
    whole = values_and_gradients(op, inputs)
    row_bytes = 4 * M  # of fp32, in which a CPU takes the product
    monkeypatch.setattr(memory, "WORKSPACE_BYTES", dict.fromkeys(("cpu", "cuda"), rows * row_bytes))
    ulps = 4 * torch.finfo(dtype).eps
    assert_same(values_and_gradients(op, inputs), whole, rtol=ulps, atol=ulps)
    if implementation == "torch":  # the interpreter takes memory of its own
        largest = largest_allocation(lambda: values_and_gradients(op, inputs))
        others = max(N * k * 8, M * D * 8)  # the code itself, W_dec, in the test's own fp64
        assert largest <= max(rows * row_bytes, others) < N * M


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # interpreter: inf · 0
@either
def test_acts_that_are_not_finite_reach_their_own_token_alone(implementation):
    inputs = decoder_inputs(4, 3, 8, 2, torch.float32)
    acts = inputs.pop("acts")
    results = {}
    for algorithm in ("gather", "dense"):
        op = partial(sparse_decode, implementation=implementation, algorithm=algorithm)
        clean = op(acts, **inputs)
        broken = acts.clone()
        broken[1, 0], broken[2, 0] = float("nan"), float("inf")
        results[algorithm] = op(broken, **inputs)
        assert torch.equal(results[algorithm][[0, 3]], clean[[0, 3]])
        assert not results[algorithm][1:3].isfinite().any()
    torch.testing.assert_close(results["gather"], results["dense"], equal_nan=True)


@either
def test_dense_algorithm_passes_what_is_not_finite_in_the_dictionary_to_every_token(implementation):
    # As documented: 0 · inf. By the rule this is the only difference between the algorithms.
    W_dec = torch.randn(8, 3)
    W_dec[7, 1] = float("inf")
    acts, indices = torch.ones(2, 1), torch.tensor([[0], [1]])
    gather, dense = (
        sparse_decode(acts, indices, W_dec, algorithm=algorithm, implementation=implementation)
        for algorithm in ("gather", "dense")
    )
    assert gather.isfinite().all()
    assert dense[:, 1].isnan().all()
    assert torch.equal(dense[:, [0, 2]], gather[:, [0, 2]])


SUMS = ("dense_sum", "dense_outer", "dense_sddmm")


def dense_sums_used(monkeypatch, run) -> list[str]:
    """Names of the dense sums that `run` uses, in order."""
    used = []
    for name in SUMS:
        function = getattr(dense_module, name)
        monkeypatch.setattr(
            dense_module, name, lambda *a, name=name, f=function: used.append(name) or f(*a)
        )
    run()
    return used


@pytest.mark.parametrize(
    ("tokens", "latents", "dense"),
    [
        pytest.param(0, 0, True, id="on-the-boundary"),
        pytest.param(-1, 0, False, id="too-few-tokens"),
        pytest.param(0, 1, False, id="too-many-latents"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rule_takes_the_dense_algorithm_for_many_tokens_of_few_latents(
    tokens, latents, dense, dtype, monkeypatch
):
    k = 2
    M = int(dense_module.DENSE_RATIO["cpu"][dtype == torch.bfloat16] * k) + latents
    inputs = decoder_inputs(dense_module.DENSE_TOKENS + tokens, 3, M, k, dtype)
    used = dense_sums_used(monkeypatch, lambda: values_and_gradients(sparse_decode, inputs))
    assert sorted(used) == (sorted(SUMS) if dense else [])


@either
def test_rule_holds_in_the_gradients_of_the_encoder_and_in_the_chain(implementation, monkeypatch):
    N, D, M, k = dense_module.DENSE_TOKENS, 3, 4, 2
    x, weight, bias, A = (torch.randn(shape).double() for shape in ((N, D), (M, D), (M,), (D, D)))
    inputs = {"x": x, "weight": weight, "bias": bias, "W_dec": torch.randn(M, D).double(), "A": A}

    def stack(x, weight, bias, W_dec, A):
        code = topk_encode(x, weight, bias, k, implementation=implementation)
        rest = {"b_dec": [x[0], x[0]], "implementation": implementation}
        return [code.acts, *affine_chain([code] * 2, [W_dec] * 2, [A], [x[0]], **rest)]

    results = []
    with monkeypatch.context() as patch:
        used = dense_sums_used(patch, lambda: results.append(values_and_gradients(stack, inputs)))
    # Two sums, their gradients, and of the encoder dx by a sum and dweight.
    assert sorted(used) == sorted([*SUMS, *SUMS, "dense_sum", "dense_outer"])
    monkeypatch.setattr(dense_module, "DENSE_TOKENS", N + 1)
    assert_same(results[0], values_and_gradients(stack, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_algorithm_never_waits_for_a_value(dtype, device, monkeypatch):
    # Fake tensors have none: whatever asks for one raises. So do factors that do not fit.
    monkeypatch.setattr(triton_decode, "launch_scatter", lambda code, acts, indices: None)  # noqa: ARG005
    monkeypatch.setattr(memory, "WORKSPACE_BYTES", {"cpu": 100, "cuda": 100})
    with FakeTensorMode():
        acts, rows, W = (
            torch.empty(shape, dtype=dtype, device=device) for shape in ((9, 3), (9, 5), (8, 5))
        )
        indices = torch.empty(9, 3, dtype=torch.int64, device=device)
        for implementation in ("torch", "triton"):
            named = {"implementation": implementation, "algorithm": "dense"}
            made = [
                module.decode_rows([acts], [indices], [W], None, rows, **named),
                gradients._scatter_outer(acts, indices, rows, 8, **named),
                gradients._sddmm(rows, indices, W, **named),
            ]
            assert [tuple(t.shape) for t in made] == [(9, 5), (8, 5), (9, 3)]
            assert all(t.dtype == dtype and t.device.type == device.type for t in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_algorithm_in_a_cuda_graph_gives_the_same_bits(dtype):
    inputs = {name: t.cuda() for name, t in decoder_inputs(300, 64, 96, 40, dtype).items()}
    eager = sparse_decode(**inputs, algorithm="dense")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_decode(**inputs, algorithm="dense")
    graph.replay()
    assert torch.equal(captured, eager)


@by_both_algorithms
def test_requested_algorithm_overrules_the_rule(algorithm, monkeypatch):
    big, small = decoder_inputs(dense_module.DENSE_TOKENS, 3, 2, 2), decoder_inputs(3, 4, 8, 1)
    for inputs in (big, small):
        with monkeypatch.context() as patch:
            used = dense_sums_used(
                patch, lambda given=inputs: values_and_gradients(both(None, algorithm)[0], given)
            )
        assert sorted(used) == (sorted(SUMS) if algorithm == "dense" else [])


@either
def test_dictionaries_of_one_sum_take_the_algorithm_that_suits_each(implementation, monkeypatch):
    N = dense_module.DENSE_TOKENS
    parts = [decoder_inputs(N, 3, M, k) for M, k in ((60, 2), (4, 2), (50, 1))]
    lists = [[part[name] for part in parts] for name in ("acts", "indices", "W_dec")]
    offsets = {name: parts[0][name] for name in ("bias", "prediction")}
    kept = offsets["prediction"].clone()
    results = []

    def run():
        results.append(sparse_decode(*lists, **offsets, implementation=implementation))

    assert dense_sums_used(monkeypatch, run) == ["dense_sum"]
    torch.testing.assert_close(results[0], reference.sparse_decode(*lists, **offsets))
    assert torch.equal(offsets["prediction"], kept)


@either
def test_dense_algorithm_is_the_same_under_autocast(implementation):
    inputs = decoder_inputs(6, 4, 8, 3, torch.float32)
    op, _ = both(implementation, "dense")
    plain = values_and_gradients(op, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(values_and_gradients(op, inputs), plain, 0, 0)


# -- reconstruction error --------------------------------------------------------------------------


def error_inputs(N, D, M, k, dtype=torch.float64) -> dict[str, Tensor]:
    return decoder_inputs(N, D, M, k, dtype) | {"target": torch.randn(N, D).to(dtype)}


def both_errors(implementation):
    return partial(reconstruction_error, implementation=implementation), (
        reference.reconstruction_error
    )


@either
@pytest.mark.parametrize(("N", "D", "M", "k"), SHAPES)
def test_error_and_gradients_equal_the_reference(N, D, M, k, implementation):
    inputs = error_inputs(N, D, M, k)
    ours, theirs = (values_and_gradients(op, inputs) for op in both_errors(implementation))
    assert (ours["output 0"].shape, ours["output 1"].shape) == ((N, D), (N,))
    assert_same(ours, theirs)


@either
@pytest.mark.parametrize(
    "absent", [("bias",), ("prediction",), ("bias", "prediction")], ids="-".join
)
def test_error_and_gradients_equal_the_reference_without_an_optional_input(absent, implementation):
    inputs = {name: t for name, t in error_inputs(7, 5, 11, 4).items() if name not in absent}
    ours, theirs = (values_and_gradients(op, inputs) for op in both_errors(implementation))
    assert_same(ours, theirs)


@either
def test_error_of_several_dictionaries_equals_the_reference(implementation):
    inputs = two_decoders() | {"target": torch.randn(7, 5, dtype=torch.float64)}

    def error(op, target, **named):
        return decode_two(partial(op, target=target), **named)

    ours, theirs = (
        values_and_gradients(partial(error, op), inputs) for op in both_errors(implementation)
    )
    assert_same(ours, theirs)


@either
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_and_gradients_are_as_close_to_fp64_as_plain_torch(dtype, implementation, device):
    if (dtype, implementation, device.type) == (torch.bfloat16, "triton", "cpu"):
        pytest.skip("the interpreter cuts fp32 off to bf16 instead of rounding it")

    def plain(acts, indices, W_dec, bias, prediction, target):
        error = scatter(acts, indices, W_dec.shape[0]) @ W_dec + bias + prediction - target
        return [error, error.square().sum(-1)]

    def ours(**tensors):  # as the rule wants it: everything in one dtype
        error, squared = both_errors(implementation)[0](**tensors)
        assert squared.dtype == torch.float32
        return [error, squared.to(error.dtype)]

    for N in (37, 3):  # a program for many columns of a token, and for few
        assert_close_as_torch(ours, plain, error_inputs(N, 190, 53, 7, dtype))


@either
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["error", "squared", "both"])
def test_gradients_of_the_error_come_through_each_output(used, implementation):
    inputs = error_inputs(6, 5, 9, 3)
    inputs["indices"][0] = 4
    op, spec = both_errors(implementation)
    ours, theirs = (
        values_and_gradients(lambda f=f, **t: [f(**t)[i] for i in used], inputs) for f in (op, spec)
    )
    assert_same(ours, theirs)


@either
def test_squares_are_summed_before_the_error_is_rounded(implementation):
    # 256 + 1 is 256 in bf16.
    W_dec = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    acts, indices = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0, 1]])
    op, _ = both_errors(implementation)
    error, squared = op(acts, indices, W_dec, torch.zeros(1, 1, dtype=torch.bfloat16))
    assert (error.item(), squared.item()) == (256, 257**2)
    assert op(acts, indices, W_dec, torch.full((1, 1), 256.0).bfloat16()).error.item() == 1


@either
def test_error_worked_example_keeps_the_leading_shape(implementation):
    acts = torch.tensor([[[2.0, 3.0]], [[1.0, 0.0]]])
    W_dec = torch.tensor([[1.0, 0], [0, 10], [100, 100]])
    indices = torch.tensor([[[2, 1]], [[0, 0]]])
    target = torch.tensor([[[199.0, 234.0]], [[1.0, 2.0]]])
    error, squared = both_errors(implementation)[0](acts, indices, W_dec, target)
    assert error.tolist() == [[[1, -4]], [[0, -2]]]
    assert squared.tolist() == [[17], [4]]


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # interpreter: inf · 0
@either
def test_infinite_act_gives_an_infinite_squared_error_where_a_tile_is_not_full(implementation):
    acts, indices = torch.tensor([[float("inf")]]), torch.tensor([[0]])
    op, _ = both_errors(implementation)
    _, squared = op(acts, indices, torch.ones(2, 3), torch.zeros(1, 3))
    assert squared.item() == float("inf")


@either
def test_error_op_passes_opcheck(implementation):
    inputs = error_inputs(5, 4, 8, 3)
    acts, W_dec, target, bias, prediction = (
        inputs[name].requires_grad_() for name in ("acts", "W_dec", "target", "bias", "prediction")
    )
    op, indices = torch.ops.resae.reconstruction_error.default, inputs["indices"]
    for arguments in (
        ([acts], [indices], [W_dec], target, bias, prediction),
        ([acts] * 2, [indices] * 2, [W_dec] * 2, target, None, None),
    ):
        torch.library.opcheck(op, arguments, {"implementation": implementation})


def test_registered_gradient_of_the_error_is_the_derivative_also_of_itself():
    inputs = error_inputs(4, 3, 6, 3)
    names = [name for name, t in inputs.items() if t.is_floating_point()]

    def error(*leaves):
        named = dict(zip(names, leaves, strict=True))
        return tuple(reconstruction_error(**named, indices=inputs["indices"]))

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(error, leaves)
    assert torch.autograd.gradgradcheck(error, leaves)


@either
def test_error_is_the_same_bits_twice_and_compiled(implementation):
    inputs = error_inputs(40, 150, 96, 9, torch.float32)
    op, _ = both_errors(implementation)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    first, second, third = (values_and_gradients(f, inputs) for f in (op, op, compiled))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert_same(third, first, 0, 0)


@either
def test_error_of_non_contiguous_inputs_is_the_same(implementation):
    inputs = error_inputs(6, 5, 9, 3)
    strided = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in inputs.items()}
    op, _ = both_errors(implementation)
    ours, theirs = (
        # Gradients of a transpose and of sums: transposed, and of stride 0.
        values_and_gradients(lambda **t: [(e := op(**t)).error.T, e.squared.sum()], given_)
        for given_ in (strided, inputs)
    )
    assert_same(ours, theirs)


@either
def test_error_by_the_rule_takes_the_dense_algorithm_where_the_decode_does(
    implementation, monkeypatch
):
    N = dense_module.DENSE_TOKENS
    parts = [decoder_inputs(N, 3, M, k) for M, k in ((60, 2), (4, 2))]
    target = torch.randn(N, 3, dtype=torch.float64)
    for chosen in (parts, parts[1:]):
        lists = [[part[name] for part in chosen] for name in ("acts", "indices", "W_dec")]
        results = []

        def run(lists=lists, results=results):
            results.append(reconstruction_error(*lists, target, implementation=implementation))

        with monkeypatch.context() as patch:
            assert dense_sums_used(patch, run) == ["dense_sum"]
        for ours, theirs in zip(
            results[0], reference.reconstruction_error(*lists, target), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_error_under_autocast_has_the_dtype_of_the_dictionary():
    inputs = error_inputs(6, 4, 8, 3, torch.float32)
    mixed = inputs | {name: inputs[name].bfloat16() for name in ("acts", "target")}
    by_hand = mixed | {name: mixed[name].float() for name in ("acts", "target")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = reconstruction_error(**mixed)
    assert all(map(torch.equal, ours, reconstruction_error(**by_hand)))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            torch.zeros(3, 5),
            ValueError,
            r"reconstruction_error: target has shape \[3, 5\], expected",
        ),
        (torch.zeros(3, 4).double(), TypeError, "reconstruction_error: target has dtype"),
    ],
    ids=["shape", "dtype"],
)
def test_bad_target_is_refused(target, error, message):
    with pytest.raises(error, match=message):
        reconstruction_error(torch.ones(3, 2), torch.zeros(3, 2).long(), torch.ones(8, 4), target)


# -- implementation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "launched"),
    [
        ("triton", {"launch_decode", "launch_sddmm", "launch_scatter_outer"}),
        ("torch", set()),
        (None, set()),  # by device: the inputs are on CPU
    ],
    ids=["triton", "torch", "by-device"],
    indirect=["implementation"],
)
def test_implementation_asked_for_computes_the_sum_and_its_gradients(
    implementation, launched, monkeypatch
):
    called = set()
    for name in ("launch_decode", "launch_sddmm", "launch_scatter_outer"):
        launch = getattr(triton_decode, name)
        monkeypatch.setattr(
            triton_decode, name, lambda *a, name=name, launch=launch: called.add(name) or launch(*a)
        )
    inputs = decoder_inputs(5, 4, 8, 3)
    values_and_gradients(lambda **t: sparse_decode(**t, implementation=implementation), inputs)
    assert called == launched


# -- memory ----------------------------------------------------------------------------------------


def test_no_tensor_of_tokens_by_latents_is_ever_made():
    N, D, M, k = 256, 4, 1024, 4
    acts, indices = random_code(N, k, M, torch.float32)
    leaves = [acts.requires_grad_(), torch.randn(M, D, requires_grad=True)]

    def dense():
        return scatter(leaves[0], indices, M) @ leaves[1]

    def sparse():
        return sparse_decode(leaves[0], indices, leaves[1])

    assert largest_allocation(lambda: dense().sum().backward()) >= N * M * acts.itemsize
    # Not even a mask of one byte per token and latent.
    assert largest_allocation(lambda: sparse().sum().backward()) < N * M


@pytest.fixture
def without_library(monkeypatch):
    """Torch's own operations, as on a machine without the compiled library."""
    monkeypatch.setattr(native, "takes", lambda *_: False)


@pytest.mark.usefixtures("without_library")
def test_gathered_rows_are_bounded_and_chunks_change_nothing(monkeypatch):
    N, D, M, k = 64, 32, 600, 8  # fewer codes than latents: W_dec is not widened as a whole
    rows, W_dec = torch.randn(N, D).bfloat16(), torch.randn(M, D).bfloat16()
    indices = torch.randint(0, M, (N, k))

    def product():
        return torch.ops.resae.sddmm(rows, indices, W_dec)

    whole, gathered = product(), N * k * D * 4  # rows are widened to fp32
    assert largest_allocation(product) >= gathered
    monkeypatch.setattr(memory, "GATHER_BYTES", gathered // 13)
    torch.testing.assert_close(product(), whole)
    assert largest_allocation(product) <= gathered // 13


@pytest.mark.usefixtures("without_library")
def test_dictionary_is_widened_once_for_the_product_in_16_bit():
    # Its rows one by one, as often as codes name them, took 25 times as long.
    N, D, M, k = 64, 32, 40, 8
    rows, W_dec = torch.randn(N, D).bfloat16(), torch.randn(M, D).bfloat16()
    indices = torch.randint(0, M, (N, k))
    product = torch.ops.resae.sddmm
    assert largest_allocation(lambda: product(rows, indices, W_dec)) < N * k * D * 4 / 4
    expected = (W_dec.double()[indices] @ rows.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(product(rows, indices, W_dec), expected.bfloat16())


@pytest.mark.usefixtures("without_library")
def test_no_row_is_copied_for_the_product_in_fp32():
    N, D, M, k = 64, 32, 40, 8
    rows, W_dec = torch.randn(N, D), torch.randn(M, D)
    indices = torch.randint(0, M, (N, k))
    product = torch.ops.resae.sddmm
    assert largest_allocation(lambda: product(rows, indices, W_dec)) < N * k * D * 4 / 4
    expected = (W_dec.double()[indices] @ rows.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(product(rows, indices, W_dec).double(), expected, rtol=0, atol=1e-4)


# -- autocast --------------------------------------------------------------------------------------


def test_autocast_takes_the_acts_to_the_dictionary_dtype():
    inputs = decoder_inputs(6, 4, 8, 3, torch.float32)
    narrow = inputs | {name: inputs[name].bfloat16() for name in ("acts", "bias", "prediction")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_decode(**narrow)
    by_hand = {name: t.float() if t.is_floating_point() else t for name, t in narrow.items()}
    assert y.dtype == torch.float32
    assert torch.equal(y, sparse_decode(**by_hand))


def test_autocast_gradients_have_the_dtype_of_their_input():
    inputs = decoder_inputs(6, 4, 8, 3, torch.float32)
    acts = inputs["acts"].bfloat16().requires_grad_()
    W_dec = inputs["W_dec"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse_decode(acts, inputs["indices"], W_dec).sum().backward()
    assert acts.grad.dtype == torch.bfloat16
    assert W_dec.grad.dtype == torch.float32


# -- the public door -------------------------------------------------------------------------------

ACTS, INDICES, W_DEC = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"acts": INDICES},
            TypeError,
            "sparse_decode: acts has dtype torch.int64, expected one of float32",
            id="integer-acts",
        ),
        pytest.param(
            {"indices": INDICES.int()},
            TypeError,
            r"sparse_decode: indices has dtype torch.int32, expected int64; use indices.long\(\)",
            id="int32-indices",
        ),
        pytest.param(
            {"W_dec": W_DEC.bfloat16()},
            TypeError,
            "sparse_decode: W_dec has dtype torch.bfloat16, acts has torch.float32; convert one",
            id="W_dec-dtype",
        ),
        pytest.param(
            {"bias": torch.zeros(4, dtype=torch.float64)},
            TypeError,
            "sparse_decode: bias has dtype torch.float64, W_dec has torch.float32; convert one",
            id="bias-dtype",
        ),
        pytest.param(
            {"prediction": torch.zeros(3, 4, dtype=torch.float16)},
            TypeError,
            "sparse_decode: prediction has dtype torch.float16, W_dec has torch.float32; "
            "convert one",
            id="prediction-dtype",
        ),
        pytest.param(
            {"W_dec": W_DEC.to("meta")},
            ValueError,
            "sparse_decode: W_dec is on meta, acts on cpu; move one",
            id="W_dec-device",
        ),
        pytest.param(
            {"indices": INDICES.to("meta")},
            ValueError,
            "sparse_decode: indices is on meta, acts on cpu; move one",
            id="indices-device",
        ),
        pytest.param(
            {"acts": torch.tensor(1.0), "indices": torch.tensor(0)},
            ValueError,
            r"sparse_decode: acts has shape \[\], expected \[..., k\]",
            id="scalar-acts",
        ),
        pytest.param(
            {"indices": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            r"sparse_decode: indices has shape \[3, 3\], expected \[3, 2\] \(the shape of acts\)",
            id="indices-shape",
        ),
        pytest.param(
            {"W_dec": torch.zeros(8)},
            ValueError,
            r"sparse_decode: W_dec has shape \[8\], expected \[M, 8\]",
            id="W_dec-not-a-matrix",
        ),
        pytest.param(
            {"bias": torch.zeros(8)},
            ValueError,
            r"sparse_decode: bias has shape \[8\], expected \[4\]",
            id="bias-shape",
        ),
        pytest.param(
            {"prediction": torch.zeros(4)},
            ValueError,
            r"sparse_decode: prediction has shape \[4\], expected \[3, 4\]",
            id="prediction-shape",
        ),
        pytest.param(
            {"acts": [ACTS]},
            TypeError,
            "sparse_decode: acts, indices and W_dec must be three tensors, or three lists",
            id="list-and-tensors",
        ),
        pytest.param(
            {"acts": [ACTS, ACTS], "indices": [INDICES], "W_dec": [W_DEC]},
            ValueError,
            "sparse_decode: got 2 acts, 1 indices, 1 W_dec; expected the same number of each",
            id="lists-of-different-length",
        ),
        pytest.param(
            {"acts": [], "indices": [], "W_dec": []},
            ValueError,
            "sparse_decode: got 0 acts, 0 indices, 0 W_dec; .* at least one",
            id="empty-lists",
        ),
        pytest.param(
            {"acts": [ACTS, ACTS[:2]], "indices": [INDICES, INDICES[:2]], "W_dec": [W_DEC] * 2},
            ValueError,
            r"sparse_decode: acts\[1\] has shape \[2, 2\], expected \[3, 2\] \(the tokens of the ",
            id="different-tokens",
        ),
        pytest.param(
            {"acts": [ACTS] * 2, "indices": [INDICES] * 2, "W_dec": [W_DEC, W_DEC[:, :3]]},
            ValueError,
            r"sparse_decode: W_dec\[1\] has shape \[8, 3\], expected \[M, 4\]",
            id="different-widths",
        ),
        pytest.param(
            {"algorithm": "sparse"},
            ValueError,
            "sparse_decode: algorithm='sparse', expected 'gather', 'dense' or None",
            id="algorithm",
        ),
        pytest.param(
            {"implementation": "cuda"},
            ValueError,
            "sparse_decode: implementation='cuda', expected 'torch', 'triton' or None",
            id="implementation",
        ),
        pytest.param({"indices": INDICES + 8}, RuntimeError, "8", id="index-M"),
        pytest.param({"indices": INDICES - 1}, RuntimeError, "-1", id="index--1"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"acts": ACTS, "indices": INDICES, "W_dec": W_DEC} | change
    with pytest.raises(error, match=message):
        sparse_decode(**arguments)


@pytest.mark.parametrize("index", [-1, 40])
def test_index_outside_the_dictionary_is_refused_in_16_bits_too(index):
    acts, W_dec = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(40, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=str(index)):
        sparse_decode(acts, torch.tensor([[index]]), W_dec, bias=W_dec[0])


def test_gathered_dot_without_the_private_op_is_the_same(monkeypatch):
    """Rows are gathered where torch has moved the op that copies none."""
    x, W = torch.randn(7, 12), torch.randn(20, 12)
    tokens, latents = torch.randint(7, (50,)), torch.randint(20, (50,))
    expected = (x.double()[tokens] * W.double()[latents]).sum(-1).float()
    torch.testing.assert_close(private_torch.gathered_dot(x, tokens, W, latents), expected)
    monkeypatch.setattr(torch.ops, "aten", object())
    monkeypatch.setattr(memory, "GATHER_BYTES", 12 * 4 * 8)
    torch.testing.assert_close(private_torch.gathered_dot(x, tokens, W, latents), expected)


def test_one_token_on_a_cpu_is_decoded_as_any_other():
    """Called past the dispatcher where nothing is lost by it: values, several dictionaries,
    gradients."""
    acts, indices = torch.rand(3, 4), torch.randint(20, (3, 4))
    W, bias, prediction = torch.randn(20, 6), torch.randn(6), torch.randn(3, 6)
    whole = sparse_decode(acts, indices, W, bias=bias, prediction=prediction)
    for n in range(3):
        one = (acts[n], indices[n], W)
        torch.testing.assert_close(
            sparse_decode(*one, bias=bias, prediction=prediction[n]), whole[n]
        )
        lists = ([t, t] for t in one)
        twice = reference.sparse_decode(*([t, t] for t in one))
        torch.testing.assert_close(sparse_decode(*lists), twice)
    weight = W.clone().requires_grad_()
    sparse_decode(acts[:1], indices[:1], weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not sparse_decode(acts[:1], indices[:1], weight).requires_grad
    meta = (t[:1].to("meta") for t in (acts, indices))
    assert sparse_decode(*meta, W.to("meta")).shape == (1, 6)


@pytest.mark.skipif(native.unavailable() is not None, reason="without the compiled library")
def test_many_tokens_of_a_sparse_code_take_one_compiled_call(monkeypatch):
    """Codes for which the dense algorithm pays do not."""
    N, M = dense_module.DENSE_TOKENS, 4096
    acts, indices, W = torch.rand(N, 2), torch.randint(M, (N, 2)), torch.randn(M, 6)
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "check_decode", lambda *_: pytest.fail("passed through the dispatcher")
        )
        x_hat = sparse_decode(acts, indices, W)
    torch.testing.assert_close(x_hat, reference.sparse_decode(acts, indices, W))
    assert dense_sums_used(monkeypatch, lambda: sparse_decode(acts, indices % 4, W[:4]))


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_gradients_without_the_library_are_as_close_to_fp64_as_plain_torch(dtype):
    inputs = decoder_inputs(40, 64, 90, 8, dtype)
    ops = (sparse_decode, reference.sparse_decode)
    assert_close_as_torch(*(lambda op=op, **given: op(**given) for op in ops), inputs)  # type: ignore


@pytest.mark.parametrize("M", [1, 300, 70_000, 2**17])
@pytest.mark.parametrize("entries", [0, 1, 5_000, 40_000])
def test_sorting_by_latent_is_stable(M, entries):
    latents = torch.randint(0, M + 1, (entries,), dtype=torch.int32)
    expected = latents.sort(stable=True)
    values, order = sums.sort_stably(latents)
    assert torch.equal(values, expected.values)
    assert torch.equal(order, expected.indices)


def test_modes_see_the_decode_of_one_token():
    """It does not bypass the dispatcher where something looks at what the dispatcher is given."""
    acts, indices, W = torch.rand(1, 4), torch.randint(9, (1, 4)), torch.randn(9, 5)
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log():
        sparse_decode(acts, indices, W)
    assert "resae.sparse_decode.default" in seen


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("D", [1, 15, 64, 130, 400, 785])
def test_every_width_is_decoded(D, k):
    """Strips of every length, several dictionaries, any layout: against float64."""
    acts = [torch.randn(2, 3, k), torch.randn(3, 2, k + 1).transpose(0, 1)]
    indices = [torch.randint(50, a.shape) for a in acts]
    W = [torch.randn(50, D), torch.randn(50, 2 * D)[:, ::2]]
    bias, prediction = torch.randn(2 * D)[::2], torch.randn(3, 2, D).transpose(0, 1)
    exact = reference.sparse_decode(
        [a.double() for a in acts], indices, [w.double() for w in W],
        bias=bias.double(), prediction=prediction.double(),
    )  # fmt: skip
    got = sparse_decode(acts, indices, W, bias=bias, prediction=prediction)
    torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-5)
