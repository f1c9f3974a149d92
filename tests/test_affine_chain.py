import importlib
import itertools
from functools import partial

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
    random_code,
    scatter,
    values_and_gradients,
)
from torch import Tensor

from resae_kernels import (
    SparseCode,
    Transported,
    affine_chain,
    reference,
    sparse_decode,
    topk_encode,
    transport,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

either = pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
# How many of the layers before it each layer but the first is predicted from.
SOURCES = [
    pytest.param((), id="one-layer"),
    pytest.param((1,), id="two-layers"),
    pytest.param((1, 1, 1), id="previous"),
    pytest.param((1, 2, 3), id="all-previous"),
    pytest.param((1, 1, 3), id="mixed-widening"),
    pytest.param((1, 2, 1), id="mixed-narrowing"),
]
SHAPES = [
    pytest.param((5,), 4, id="small"),
    pytest.param((0,), 4, id="no-tokens"),
    pytest.param((1,), 4, id="one-token"),
    pytest.param((23,), 7, id="primes"),
    pytest.param((5,), 1, id="D-1"),
    pytest.param((), 3, id="a-vector"),
    pytest.param((2, 3), 3, id="batch-of-sequences"),
]
module = importlib.import_module("resae_kernels.chain")
FIELDS = ("acts", "indices", "W_dec", "A", "c", "b_dec")


def chain_inputs(sources, leading=(5,), D=4, dtype=torch.float64) -> dict[str, Tensor]:
    """Inputs of a chain by names such as `W_dec.2`; M and k differ from layer to layer."""
    inputs = {}
    for layer in range(len(sources) + 1):
        M, k = 6 + 3 * layer, 2 + layer % 3
        acts, indices = random_code(max(1, torch.Size(leading).numel()), k, M, dtype)
        keep = torch.Size(leading).numel()
        inputs[f"acts.{layer}"] = acts[:keep].reshape(*leading, k)
        inputs[f"indices.{layer}"] = indices[:keep].reshape(*leading, k)
        inputs[f"W_dec.{layer}"] = torch.randn(M, D).to(dtype)
        inputs[f"b_dec.{layer}"] = torch.randn(D).to(dtype)
    for layer, s in enumerate(sources):
        inputs[f"A.{layer}"] = (torch.randn(s * D, D) / (s * D) ** 0.5).to(dtype)
        inputs[f"c.{layer}"] = torch.randn(D).to(dtype)
    return inputs


def unpack(named: dict[str, Tensor]) -> dict[str, list]:
    """`codes, W_dec, A, c, b_dec` from the names of `chain_inputs`."""
    lists = {
        field: [t for name, t in named.items() if name.startswith(f"{field}.")] for field in FIELDS
    }
    acts, indices = lists.pop("acts"), lists.pop("indices")
    return {"codes": [SparseCode(*code) for code in zip(acts, indices, strict=True)], **lists}


def chain(op, **named) -> list[Tensor]:
    return op(**unpack(named))


def dense_chain(**named) -> list[Tensor]:
    """The chain in plain torch: dense codes, one product per dictionary and one per layer."""
    parts = unpack(named)
    x_hats: list[Tensor] = []
    for layer, (acts, indices) in enumerate(parts["codes"]):
        W = parts["W_dec"][layer]
        x_hat = scatter(acts, indices, W.shape[0]) @ W + parts["b_dec"][layer]
        if layer > 0:
            A = parts["A"][layer - 1]
            recent = torch.cat(x_hats[layer - A.shape[0] // A.shape[1] :], dim=-1)
            x_hat = x_hat + recent @ A + parts["c"][layer - 1]
        x_hats.append(x_hat)
    return x_hats


def transported_chain(implementation=None, **named) -> list[Tensor]:
    parts = unpack(named)
    transported = transport(parts["W_dec"], parts["A"], parts["c"], b_dec=parts["b_dec"])
    return affine_chain(
        **parts, transported=transported, algorithm="transported", implementation=implementation
    )


# -- equals the reference --------------------------------------------------------------------------


@either
@pytest.mark.parametrize("sources", SOURCES)
def test_reconstructions_and_gradients_equal_the_reference(sources, implementation):
    inputs = chain_inputs(sources)
    ours, theirs, dense = (
        values_and_gradients(function, inputs)
        for function in (
            lambda **t: chain(partial(affine_chain, implementation=implementation), **t),
            lambda **t: chain(reference.affine_chain, **t),
            dense_chain,
        )
    )
    assert_same(ours, theirs)
    assert_same(ours, dense)


@either
@pytest.mark.parametrize(("leading", "D"), SHAPES)
def test_shapes_equal_the_reference(leading, D, implementation):
    inputs = chain_inputs((1, 2), leading, D)
    ours, theirs = (
        values_and_gradients(lambda op=op, **t: chain(op, **t), inputs)
        for op in (partial(affine_chain, implementation=implementation), reference.affine_chain)
    )
    for layer in range(3):
        assert ours[f"output {layer}"].shape == (*leading, D)
    assert_same(ours, theirs)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_come_through_each_output_alone(used):
    inputs = chain_inputs((1, 2))
    gradients = []
    for op in (affine_chain, reference.affine_chain):
        leaves = {n: t.detach().clone() for n, t in inputs.items()}
        floating = [t.requires_grad_() for t in leaves.values() if t.is_floating_point()]
        x_hats = chain(op, **leaves)
        sum((x_hats[layer] ** 2).sum() for layer in used).backward()
        zeros = [torch.zeros_like(t) for t in floating]
        gradients.append(
            [z if t.grad is None else t.grad for t, z in zip(floating, zeros, strict=True)]
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@either
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sources", [(1, 1, 1), (1, 2, 3)], ids=["previous", "all-previous"])
def test_reconstructions_and_gradients_are_as_close_to_fp64_as_plain_torch(
    sources, dtype, implementation
):
    inputs = chain_inputs(sources, (23,), 12, dtype)
    op = partial(affine_chain, implementation=implementation)
    assert_close_as_torch(lambda **t: chain(op, **t), dense_chain, inputs)


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        pytest.param(torch.bfloat16, "torch", id="bf16-torch"),
        pytest.param(torch.float16, "torch", id="fp16-torch"),
        pytest.param(torch.float16, "triton", id="fp16-triton"),
        # Triton's interpreter cuts fp32 down to bf16 where a device rounds to nearest.
    ],
    indirect=["implementation"],
)
def test_each_reconstruction_is_rounded_once(dtype, implementation):
    inputs = chain_inputs((1, 2), (23,), 12, dtype)
    expected = chain(reference.affine_chain, **inputs)
    ours = chain(partial(affine_chain, implementation=implementation), **inputs)
    for x_hat, truth in zip(ours, expected, strict=True):
        # A sum in another order may end up on the other side of a tie, rarely.
        assert (x_hat != truth).float().mean() < 0.02


@either
def test_op_passes_opcheck(implementation):
    parts = unpack(chain_inputs((1, 2)))
    acts = [code.acts.requires_grad_() for code in parts["codes"]]
    indices = [code.indices for code in parts["codes"]]
    rest = [[t.requires_grad_() for t in parts[field]] for field in FIELDS[2:]]
    torch.library.opcheck(
        torch.ops.resae.affine_chain.default,
        (acts, indices, *rest),
        {"implementation": implementation},
    )


@pytest.mark.parametrize("sources", [(1, 1), (1, 2)], ids=["previous", "all-previous"])
def test_registered_gradient_is_the_derivative(sources):
    inputs = chain_inputs(sources, (2,), 2)
    names = [name for name, t in inputs.items() if t.is_floating_point()]
    integers = {name: t for name, t in inputs.items() if name not in names}

    def x_hats(*leaves):
        return tuple(chain(affine_chain, **dict(zip(names, leaves, strict=True)), **integers))

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(x_hats, leaves)
    assert torch.autograd.gradgradcheck(x_hats, leaves)


@either
def test_same_bits_twice(implementation):
    inputs = chain_inputs((1, 2), (40,), 24, torch.float32)
    op = partial(affine_chain, implementation=implementation)
    first, second = (values_and_gradients(lambda **t: chain(op, **t), inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@either
def test_compiled_equals_eager(implementation):
    inputs = chain_inputs((1, 2), dtype=torch.float32)

    def x_hats(**tensors):
        return affine_chain(**unpack(tensors), implementation=implementation)

    compiled = torch.compile(x_hats, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(x_hats, inputs), 0, 0)


@either
def test_non_contiguous_inputs_change_nothing(implementation):
    inputs = chain_inputs((1, 2))
    strided = {
        name: t.T.contiguous().T if t.ndim == 2 else torch.stack([t, t], dim=1)[:, 0]
        for name, t in inputs.items()
    }
    assert not any(t.is_contiguous() for t in strided.values())
    op = partial(affine_chain, implementation=implementation)
    ours, theirs = (
        values_and_gradients(lambda **t: chain(op, **t), given_) for given_ in (strided, inputs)
    )
    assert_same(ours, theirs)


def test_gradients_share_no_memory():
    inputs = chain_inputs((1, 1))
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    sum(x_hat.sum() for x_hat in chain(affine_chain, **inputs)).backward()
    assert len({leaf.grad.data_ptr() for leaf in leaves}) == len(leaves)


def test_meta_tensors_give_shapes():
    inputs = {name: t.to("meta") for name, t in chain_inputs((1, 2), (2, 3)).items()}
    assert [x_hat.shape for x_hat in chain(affine_chain, **inputs)] == [(2, 3, 4)] * 3


def test_an_empty_code_reconstructs_the_prediction_alone():
    inputs = chain_inputs((1,)) | {
        "acts.1": torch.zeros(5, 0, dtype=torch.float64),
        "indices.1": torch.zeros(5, 0, dtype=torch.int64),
    }
    first, second = chain(affine_chain, **inputs)
    prediction = first @ inputs["A.0"] + inputs["c.0"] + inputs["b_dec.1"]
    torch.testing.assert_close(second, prediction)


def test_plain_pairs_are_codes():
    parts = unpack(chain_inputs((1,)))
    pairs = [(code.acts, code.indices) for code in parts["codes"]]
    for ours, theirs in zip(
        affine_chain(**parts | {"codes": pairs}), affine_chain(**parts), strict=True
    ):
        assert torch.equal(ours, theirs)


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.float64, id="fp64")])
def test_chain_of_one_layer_is_decode(dtype):
    inputs = chain_inputs((), (17,), 5, dtype)
    (x_hat,) = chain(affine_chain, **inputs)
    code = inputs["acts.0"], inputs["indices.0"]
    assert torch.equal(x_hat, sparse_decode(*code, inputs["W_dec.0"], bias=inputs["b_dec.0"]))


def test_identity_maps_accumulate_the_decodes():
    inputs = chain_inputs((1, 1, 1))
    for layer in range(3):
        inputs[f"A.{layer}"] = torch.eye(4, dtype=torch.float64)
        inputs[f"c.{layer}"] = torch.zeros(4, dtype=torch.float64)
    parts = unpack(inputs)
    decodes = [
        sparse_decode(*code, W, bias=b)
        for code, W, b in zip(parts["codes"], parts["W_dec"], parts["b_dec"], strict=True)
    ]
    for x_hat, expected in zip(affine_chain(**parts), itertools.accumulate(decodes), strict=True):
        torch.testing.assert_close(x_hat, expected)


def test_zero_maps_leave_independent_decodes():
    inputs = chain_inputs((1, 2))
    for layer in range(2):
        inputs[f"A.{layer}"] = torch.zeros_like(inputs[f"A.{layer}"])
        inputs[f"c.{layer}"] = torch.zeros_like(inputs[f"c.{layer}"])
    parts = unpack(inputs)
    for layer, x_hat in enumerate(affine_chain(**parts)):
        y = sparse_decode(*parts["codes"][layer], parts["W_dec"][layer], bias=parts["b_dec"][layer])
        assert torch.equal(x_hat, y)


def test_all_previous_map_with_only_its_last_block_is_the_ordinary_chain():
    narrow = chain_inputs((1, 1, 1))
    wide = dict(narrow)
    for layer in range(3):
        blocks = [torch.zeros(4, 4, dtype=torch.float64)] * layer + [narrow[f"A.{layer}"]]
        wide[f"A.{layer}"] = torch.cat(blocks)
    for ours, theirs in zip(
        chain(affine_chain, **wide), chain(affine_chain, **narrow), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_worked_example_reads_the_sources_in_layer_order():
    # D = 1: x̂_0 = 2·3 + 1 = 7; x̂_1 = 7·10 + 5 + 1·4 + 0 = 79; x̂_2 = 7·100 + 79·1 + 0 + 0 + 2.
    one = torch.tensor([[0]])
    x_hats = affine_chain(
        [SparseCode(torch.tensor([[a]]), one) for a in (2.0, 1.0, 0.0)],
        [torch.tensor([[w]]) for w in (3.0, 4.0, 9.0)],
        [torch.tensor([[10.0]]), torch.tensor([[100.0], [1.0]])],
        [torch.tensor([5.0]), torch.tensor([0.0])],
        b_dec=[torch.tensor([b]) for b in (1.0, 0.0, 2.0)],
    )
    assert [x_hat.item() for x_hat in x_hats] == [7, 79, 781]


def test_each_layer_is_rounded_once():
    # Layer 1 is 256 + 1 − 256 from code, map and offset: bf16 holds no 257.
    def cell(value):
        return torch.tensor([[value]], dtype=torch.bfloat16)

    pair = SparseCode(cell(1.0), torch.tensor([[0]]))
    _, x_hat = affine_chain(
        [pair, pair],
        [cell(1.0), cell(256.0)],
        [cell(1.0)],
        [cell(-256.0)[0]],
        b_dec=[cell(0.0)[0]] * 2,
    )
    assert x_hat.item() == 1


@given(data=st.data())
def test_sequential_transported_and_reference_agree_exactly_on_integers(data):
    L = data.draw(st.integers(1, 4))
    sources = tuple(data.draw(st.integers(1, layer)) for layer in range(1, L))
    leading = data.draw(st.sampled_from([(0,), (1,), (3,)]))
    inputs = {
        name: torch.randint(-2, 3, t.shape).double() if t.is_floating_point() else t
        for name, t in chain_inputs(sources, leading, data.draw(st.integers(1, 3))).items()
    }
    expected = chain(reference.affine_chain, **inputs)
    for ours in (chain(affine_chain, **inputs), transported_chain(**inputs)):
        for x_hat, exact in zip(ours, expected, strict=True):
            assert torch.equal(x_hat, exact)


# -- transported algorithm -------------------------------------------------------------------------


@either
@pytest.mark.parametrize("sources", SOURCES)
def test_transported_is_sequential(sources, implementation):
    inputs = chain_inputs(sources)
    parts = unpack(inputs)
    transported = reference.transport(parts["W_dec"], parts["A"], parts["c"], b_dec=parts["b_dec"])
    ours = transported_chain(implementation, **inputs)
    theirs = reference.affine_chain(**parts, transported=transported)
    for x_hat, expected, sequential in zip(
        ours, theirs, chain(affine_chain, **inputs), strict=True
    ):
        torch.testing.assert_close(x_hat, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_hat, sequential, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("N", "algorithm", "ran"),
    [
        pytest.param(16, None, "transported", id="few-tokens"),
        pytest.param(17, None, "sequential", id="many-tokens"),
        pytest.param(0, None, "transported", id="no-tokens"),
        pytest.param(16, "sequential", "sequential", id="sequential-by-name"),
        pytest.param(17, "transported", "transported", id="transported-by-name"),
    ],
)
def test_algorithm_follows_from_the_tokens_unless_it_is_named(N, algorithm, ran, monkeypatch):
    monkeypatch.setattr(module, "TRANSPORTED_TOKENS", 32)
    parts = unpack(chain_inputs((1, 1), (N,)))
    transported = transport(parts["W_dec"], parts["A"], parts["c"], b_dec=parts["b_dec"])
    # Constants of its own tell the transported algorithm apart.
    transported = transported._replace(
        constants=[constant + 1 for constant in transported.constants]
    )
    by_rule = affine_chain(**parts, transported=transported, algorithm=algorithm)
    sequential = affine_chain(**parts)
    for ours, plain in zip(by_rule, sequential, strict=True):
        torch.testing.assert_close(ours, plain + (ran == "transported"))


def test_transported_algorithm_gathers_once_for_each_layer(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "sparse_decode", lambda *a, **b: calls.append(len(a[0])) or sparse_decode(*a, **b)
    )
    transported_chain(**chain_inputs((1, 1)))
    assert calls == [1, 2, 3]


def test_transported_tables_are_the_dictionaries_times_the_maps():
    parts = unpack(chain_inputs((1, 1)))
    (W0, W1, W2), (A1, A2), (c1, c2) = (parts[field] for field in ("W_dec", "A", "c"))
    b0, b1, b2 = parts["b_dec"]
    transported = transport(parts["W_dec"], parts["A"], parts["c"], b_dec=parts["b_dec"])
    assert isinstance(transported, Transported)
    expected = [[W0], [W0 @ A1, W1], [W0 @ A1 @ A2, W1 @ A2, W2]]
    constants = [b0, b0 @ A1 + c1 + b1, (b0 @ A1 + c1 + b1) @ A2 + c2 + b2]
    for ours, theirs in zip(transported.dictionaries, expected, strict=True):
        for table, product in zip(ours, theirs, strict=True):
            torch.testing.assert_close(table, product)
    for ours, theirs in zip(transported.constants, constants, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transport_is_as_close_to_fp64_as_plain_torch(dtype):
    named = chain_inputs((1, 2, 3), D=12, dtype=dtype)
    weights = {name: t for name, t in named.items() if name.split(".")[0] in FIELDS[2:]}

    def tables(fold, **tensors):
        lists = {f: [t for n, t in tensors.items() if n.split(".")[0] == f] for f in FIELDS[2:]}
        transported = fold(lists["W_dec"], lists["A"], lists["c"], b_dec=lists["b_dec"])
        return [table for row in transported[0] for table in row] + list(transported[1])

    def plain(W_dec, A, c, b_dec):
        rows, constants = [], []
        for m, (W, b) in enumerate(zip(W_dec, b_dec, strict=True)):
            row, constant = [torch.zeros_like(W_dec[j]) for j in range(m)], b
            if m > 0:
                constant = constant + c[m - 1]
                maps = A[m - 1].split(12)
                for j, A_mj in zip(range(m - len(maps), m), maps, strict=True):
                    constant = constant + constants[j] @ A_mj
                    for source, table in enumerate(rows[j]):
                        row[source] = row[source] + table @ A_mj
            rows.append([*row, W])
            constants.append(constant)
        return rows, constants

    exact = tables(plain, **{n: t.double() for n, t in weights.items()})
    for ours, rival, truth in zip(
        tables(transport, **weights), tables(plain, **weights), exact, strict=True
    ):
        assert ours.dtype == dtype
        assert_error_as_torch("table", ours, rival, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_transport_rounds_once(dtype):
    parts = unpack(chain_inputs((1, 1, 1), D=12, dtype=dtype))
    weights = {field: parts[field] for field in FIELDS[2:]}
    transported = transport(**weights)
    wide = transport(**{field: [t.float() for t in tensors] for field, tensors in weights.items()})
    for row, wide_row in zip(transported.dictionaries, wide.dictionaries, strict=True):
        for table, wide_table in zip(row, wide_row, strict=True):
            assert torch.equal(table, wide_table.to(dtype))
    for constant, wide_constant in zip(transported.constants, wide.constants, strict=True):
        assert torch.equal(constant, wide_constant.to(dtype))


def test_transported_gradients_do_not_reach_the_weights():
    # Those of a layer itself would get their own share alone, without what the maps carry on.
    inputs = chain_inputs((1, 1))
    weights = {
        name: t.requires_grad_() for name, t in inputs.items() if name[:3] not in ("act", "ind")
    }
    inputs["acts.0"].requires_grad_()
    sum(x_hat.sum() for x_hat in transported_chain(**inputs)).backward()
    assert inputs["acts.0"].grad is not None
    assert all(t.grad is None for t in weights.values())


def test_transported_gradients_reach_the_codes_and_the_carried_dictionaries():
    inputs = chain_inputs((1, 1))
    parts = unpack(inputs)
    transported = transport(parts["W_dec"], parts["A"], parts["c"], b_dec=parts["b_dec"])
    tables = [table.requires_grad_() for row in transported.dictionaries for table in row]
    acts = [code.acts.requires_grad_() for code in parts["codes"]]
    x_hats = affine_chain(**parts, transported=transported, algorithm="transported")
    through_tables = torch.autograd.grad(sum(x.sum() for x in x_hats), [*acts, *tables])
    through_maps = torch.autograd.grad(sum(x.sum() for x in affine_chain(**parts)), acts)
    for ours, theirs in zip(through_tables, through_maps, strict=False):
        torch.testing.assert_close(ours, theirs)
    assert all((gradient != 0).any() for gradient in through_tables)


# -- open and closed loop --------------------------------------------------------------------------


def autoencoder_stack(L, D, N):
    """Activations, maps and autoencoders whose code of all latents reconstructs: rows of ±Q."""
    x = [torch.randn(N, D, dtype=torch.float64) for _ in range(L)]
    predictions = [torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q for _ in range(L)]
    weight = [torch.cat([Q, -Q]) for Q in predictions]
    A = [torch.randn(D, D, dtype=torch.float64) for _ in range(L - 1)]
    c = [torch.randn(D, dtype=torch.float64) for _ in range(L - 1)]
    b_dec = [torch.randn(D, dtype=torch.float64) for _ in range(L)]
    return x, weight, A, c, b_dec


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_autoencoders_that_reconstruct_do_so_in_either_loop(loop):
    L, D = 3, 4
    x, weight, A, c, b_dec = autoencoder_stack(L, D, 7)
    _, x_hats = reference.encode_chain(
        x, weight, [None] * L, [2 * D] * L, weight, A, c, b_dec=b_dec, loop=loop
    )
    for x_l, x_hat in zip(x, x_hats, strict=True):
        torch.testing.assert_close(x_hat, x_l, rtol=1e-9, atol=1e-9)


def test_open_and_closed_loop_agree_where_nothing_is_lost():
    # Dictionaries of signed unit vectors and integers: every sum is exact, the codes are equal.
    L, D = 3, 4
    stack = autoencoder_stack(L, D, 7)
    x, _, A, c, b_dec = ([torch.randint(-3, 4, t.shape).double() for t in part] for part in stack)
    signed = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    (codes, x_hats), (closed_codes, closed_x_hats) = (
        reference.encode_chain(
            x, [signed] * L, [None] * L, [2 * D] * L, [signed] * L, A, c, b_dec=b_dec, loop=loop
        )
        for loop in ("open", "closed")
    )
    for layer in range(L):
        assert torch.equal(x_hats[layer], x[layer])
        assert torch.equal(closed_x_hats[layer], x[layer])
        assert torch.equal(codes[layer].indices, closed_codes[layer].indices)
        assert torch.equal(codes[layer].acts, closed_codes[layer].acts)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_error_of_a_layer_is_its_own_plus_in_the_open_loop_the_mapped_error_before(loop):
    L, D, k = 3, 4, 2
    x, weight, A, c, b_dec = autoencoder_stack(L, D, 7)
    codes, x_hats = reference.encode_chain(
        x, weight, [None] * L, [k] * L, weight, A, c, b_dec=b_dec, loop=loop
    )
    seen = x if loop == "open" else x_hats
    for layer in range(L):
        rest = x[layer] - b_dec[layer]
        if layer > 0:
            rest = rest - seen[layer - 1] @ A[layer - 1] - c[layer - 1]
        error = sparse_decode(*codes[layer], weight[layer]) - rest
        if layer > 0 and loop == "open":
            error = error + (x_hats[layer - 1] - x[layer - 1]) @ A[layer - 1]
        assert error.abs().max() > 0.1
        torch.testing.assert_close(x_hats[layer] - x[layer], error, rtol=1e-9, atol=1e-9)


def test_ops_layer_by_layer_are_the_reference_of_the_closed_loop():
    L, D, k = 3, 4, 2
    x, weight, A, c, b_dec = autoencoder_stack(L, D, 7)
    expected, x_hats = reference.encode_chain(
        x, weight, [None] * L, [k] * L, weight, A, c, b_dec=b_dec, loop="closed"
    )
    codes: list[SparseCode] = []
    for layer in range(L):
        prediction = None
        if layer > 0:
            so_far = affine_chain(
                codes, weight[:layer], A[: layer - 1], c[: layer - 1], b_dec=b_dec[:layer]
            )
            prediction = so_far[-1] @ A[layer - 1] + c[layer - 1]
        codes.append(
            topk_encode(
                x[layer], weight[layer], None, k, pre_bias=b_dec[layer], prediction=prediction
            )
        )
        assert torch.equal(codes[layer].indices, expected[layer].indices)
    for ours, theirs in zip(affine_chain(codes, weight, A, c, b_dec=b_dec), x_hats, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- memory, autocast ------------------------------------------------------------------------------


def test_no_tensor_of_tokens_by_latents_is_ever_made():
    N, D, M, k = 256, 4, 1024, 4
    codes = [random_code(N, k, M, torch.float32) for _ in range(2)]
    for acts, _ in codes:
        acts.requires_grad_()
    W_dec = [torch.randn(M, D, requires_grad=True) for _ in range(2)]
    rest = [torch.eye(D, requires_grad=True)], [torch.zeros(D, requires_grad=True)]
    b_dec = [torch.zeros(D)] * 2

    def forward_and_backward():
        sum(x.sum() for x in affine_chain(codes, W_dec, *rest, b_dec=b_dec)).backward()

    # Not even a mask of one byte per token and latent.
    assert largest_allocation(forward_and_backward) < N * M


def test_autocast_returns_the_dictionary_dtype_and_gradients_in_the_input_dtype():
    inputs = chain_inputs((1, 2), (6,), 8, torch.float32)
    expected = chain(affine_chain, **inputs)
    for name in inputs:
        if name.startswith("acts"):
            inputs[name] = inputs[name].bfloat16()
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hats = chain(affine_chain, **leaves)
        transported = transported_chain(**leaves)
    for ours, fused, theirs in zip(x_hats, transported, expected, strict=True):
        assert ours.dtype == fused.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)
        torch.testing.assert_close(fused, theirs, rtol=0.03, atol=0.03)
    sum(x_hat.sum() for x_hat in x_hats).backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype, name


def test_autocast_leaves_the_products_of_the_chain_in_the_dictionary_dtype():
    # Autocast reaches into an op: products in it were taken in bf16, results two digits coarser.
    inputs = chain_inputs((1, 2), (6,), 8, torch.float32)
    expected = chain(affine_chain, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, chain(affine_chain, **inputs), expected))


# -- the public door -------------------------------------------------------------------------------


def good_parts() -> dict[str, list]:
    return unpack(chain_inputs((1, 2), dtype=torch.float32))


def replaced(field: str, position: int, value):
    return lambda parts: {
        field: [value if i == position else t for i, t in enumerate(parts[field])]
    }


def code(acts: Tensor, indices: Tensor | None = None) -> SparseCode:
    return SparseCode(
        acts, torch.zeros(acts.shape, dtype=torch.int64) if indices is None else indices
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            lambda _: {"W_dec": []},
            ValueError,
            "affine_chain: W_dec is empty, expected one dictionary per layer",
            id="no-layers",
        ),
        pytest.param(
            lambda parts: {"codes": parts["codes"][:2]},
            ValueError,
            "affine_chain: codes has 2 entries, expected 3 for 3 layers",
            id="codes-short",
        ),
        pytest.param(
            lambda parts: {"A": parts["A"][:1]},
            ValueError,
            "affine_chain: A has 1 entries, expected 2 for 3 layers",
            id="A-short",
        ),
        pytest.param(
            lambda parts: {"c": parts["c"] * 2},
            ValueError,
            "affine_chain: c has 4 entries, expected 2 for 3 layers",
            id="c-long",
        ),
        pytest.param(
            lambda parts: {"b_dec": parts["b_dec"][:2]},
            ValueError,
            "affine_chain: b_dec has 2 entries, expected 3 for 3 layers",
            id="b_dec-short",
        ),
        pytest.param(
            replaced("W_dec", 1, torch.zeros(9, 5)),
            ValueError,
            r"affine_chain: W_dec\[1\] has shape \[9, 5\], expected \[M, 4\]",
            id="W_dec-width",
        ),
        pytest.param(
            replaced("W_dec", 2, torch.zeros(12, 4, dtype=torch.float64)),
            TypeError,
            r"affine_chain: W_dec\[2\] has dtype torch.float64, W_dec\[0\] has torch.float32",
            id="W_dec-dtype",
        ),
        pytest.param(
            replaced("W_dec", 2, torch.zeros(12, 4, device="meta")),
            ValueError,
            r"affine_chain: W_dec\[2\] is on meta, W_dec\[0\] on cpu",
            id="W_dec-device",
        ),
        pytest.param(
            replaced("b_dec", 0, torch.zeros(5)),
            ValueError,
            r"affine_chain: b_dec\[0\] has shape \[5\], expected \[4\]",
            id="b_dec-shape",
        ),
        pytest.param(
            replaced("b_dec", 0, torch.zeros(4, dtype=torch.float16)),
            TypeError,
            r"affine_chain: b_dec\[0\] has dtype torch.float16, W_dec\[0\] has torch.float32",
            id="b_dec-dtype",
        ),
        pytest.param(
            replaced("A", 0, torch.zeros(8, 4)),
            ValueError,
            r"affine_chain: A\[0\] has shape \[8, 4\], expected \[s·4, 4\] with 1 ≤ s ≤ 1 sources",
            id="A-more-sources-than-layers",
        ),
        pytest.param(
            replaced("A", 1, torch.zeros(6, 4)),
            ValueError,
            r"affine_chain: A\[1\] has shape \[6, 4\], expected \[s·4, 4\] with 1 ≤ s ≤ 2 sources",
            id="A-not-a-multiple-of-D",
        ),
        pytest.param(
            replaced("A", 1, torch.zeros(0, 4)),
            ValueError,
            r"affine_chain: A\[1\] has shape \[0, 4\], expected \[s·4, 4\]",
            id="A-without-sources",
        ),
        pytest.param(
            replaced("A", 1, torch.zeros(4, 4, dtype=torch.float64)),
            TypeError,
            r"affine_chain: A\[1\] has dtype torch.float64, W_dec\[0\] has torch.float32",
            id="A-dtype",
        ),
        pytest.param(
            replaced("c", 0, torch.zeros(1, 4)),
            ValueError,
            r"affine_chain: c\[0\] has shape \[1, 4\], expected \[4\]",
            id="c-shape",
        ),
        pytest.param(
            replaced("c", 0, torch.zeros(4, dtype=torch.bfloat16)),
            TypeError,
            r"affine_chain: c\[0\] has dtype torch.bfloat16, W_dec\[0\] has torch.float32",
            id="c-dtype",
        ),
        pytest.param(
            replaced("codes", 1, code(torch.zeros(6, 3))),
            ValueError,
            r"affine_chain: acts\[1\] has shape \[6, 3\], expected \[5, 3\] \(the tokens of the ",
            id="different-tokens",
        ),
        pytest.param(
            replaced("codes", 1, code(torch.zeros(5, 3, dtype=torch.bfloat16))),
            TypeError,
            r"affine_chain: acts\[1\] has dtype torch.bfloat16, W_dec\[0\] has torch.float32",
            id="acts-dtype",
        ),
        pytest.param(
            replaced("codes", 2, code(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32))),
            TypeError,
            r"affine_chain: indices\[2\] has dtype torch.int32, expected int64",
            id="int32-indices",
        ),
        pytest.param(
            replaced("codes", 2, code(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64))),
            ValueError,
            r"affine_chain: indices\[2\] has shape \[5, 2\], expected \[5, 3\]",
            id="indices-shape",
        ),
        pytest.param(
            lambda _: {"transported": Transported([], [])},
            ValueError,
            r"affine_chain: transported covers 0 layers, codes 3; build it with transport\(\)",
            id="transported-of-another-chain",
        ),
        pytest.param(
            lambda _: {"algorithm": "transported"},
            ValueError,
            r"affine_chain: algorithm='transported' needs transported; build it with transport\(\)",
            id="transported-without-tables",
        ),
        pytest.param(
            lambda _: {"algorithm": "gather"},
            ValueError,
            "affine_chain: algorithm='gather', expected 'sequential', 'transported' or None",
            id="algorithm",
        ),
        pytest.param(
            lambda _: {"implementation": "cuda"},
            ValueError,
            "affine_chain: implementation='cuda', expected 'torch', 'triton' or None",
            id="implementation",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    parts = good_parts()
    with pytest.raises(error, match=message):
        affine_chain(**parts | change(parts))


def test_transport_refuses_the_same():
    parts = good_parts()
    del parts["codes"]
    with pytest.raises(ValueError, match="A has 1 entries, expected 2 for 3 layers"):
        transport(**parts | {"A": parts["A"][:1]})
