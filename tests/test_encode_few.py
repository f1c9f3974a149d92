"""Scores of few tokens: each kernel that a tile can choose; the error of three TF32 products."""

from typing import Any

import pytest
import torch
from measured import assert_error_as_torch, largest_allocation
from torch import Tensor

from resae_kernels import SparseCode, reference, topk_encode
from resae_kernels.triton import encode_few
from resae_kernels.triton import tiles as kernel_tiles
from resae_kernels.triton.selection import selection_layout
from resae_kernels.triton.tiles import GemvTile, SmallGemmTile

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
TABLES = [n for n in kernel_tiles.TILES if n.startswith(("gemm_2_tokens_", "gemm_16_tokens_"))]
EVERY_TILE = [
    pytest.param(name, tile, id=f"{name}-{kernel_tiles.sizes(tile)}")
    for name in TABLES
    for tile in dict.fromkeys(
        (*kernel_tiles.TILES[name].candidates("other"), kernel_tiles.TILES[name].of("sm_90").tile)
    )
]
TF32X3 = sorted(
    {
        tile.dimensions
        for name in TABLES
        for tile in kernel_tiles.TILES[name].candidates("other")
        if isinstance(tile, SmallGemmTile) and tile.precision == "tf32x3"
    }
)


def inputs_of(device, N: int, D: int, M: int, dtype, draw) -> dict[str, Any]:
    shapes = {"x": (N, D), "weight": (M, D), "bias": (M,), "pre_bias": (D,), "prediction": (N, D)}
    return {name: draw(shape).to(device, dtype) for name, shape in shapes.items()}


def whole(shape) -> Tensor:
    """Small integers: sums are exact in every order, so that scores agree bit by bit."""
    return torch.randint(-1, 2, shape).float()


def by_columns(weight: Tensor) -> Tensor:
    """The same weight as a view of `[D, M]`, as SAELens' `W_enc.T`."""
    return weight.T.contiguous().T


def encode(k: int, x, weight, bias=None, tile=None, name="", **options) -> SparseCode:
    forced = {} if tile is None else {name: tile}
    with kernel_tiles.override_tiles(forced):
        return topk_encode(x, weight, bias, k, **options, implementation="triton")


def assert_same_code(ours: SparseCode, theirs: SparseCode) -> None:
    assert torch.equal(ours.acts, theirs.acts)
    assert torch.equal(ours.indices, theirs.indices)


# -- every tile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tile"), EVERY_TILE)
def test_every_tile_gives_the_reference_code(device, name, tile):
    # More blocks of latents than resident programs, the last one in part; so too of dimensions.
    D, M = 144, 304
    dtype = torch.bfloat16 if "16bit" in name else torch.float32
    for N, columns in ((1, True), (2, False)) if "_2_tokens" in name else ((3, True), (5, False)):
        inputs = inputs_of(device, N, D, M, dtype, whole)
        expected = reference.topk_encode(k=9, **inputs)
        if columns:
            inputs["weight"] = by_columns(inputs["weight"])
        shape, strides = inputs["weight"].shape, inputs["weight"].stride()
        assert encode_few.small_gemm_tile_name(dtype, N, shape, strides) == name
        assert_same_code(encode(9, **inputs, tile=tile, name=name), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 2, 5])
def test_weight_of_any_strides_gives_the_reference_code(device, N, dtype):
    inputs = inputs_of(device, N, 37, 53, dtype, whole)
    expected = reference.topk_encode(k=7, **inputs)
    weight = inputs.pop("weight")
    layouts = {
        "rows": weight,
        "columns": by_columns(weight),
        "rows of a wider matrix": torch.cat([weight, weight], 1)[:, :37],
        "columns of a taller matrix": by_columns(torch.cat([weight, weight]))[:53],
        "neither": torch.stack([weight, weight], -1)[..., 0],
    }
    for given in layouts.values():
        assert torch.equal(given, weight)
        assert_same_code(encode(7, weight=given, **inputs), expected)


def test_a_gemv_holds_whole_groups_whatever_its_tile(device):
    layout = selection_layout(2100, 1)
    assert layout is not None
    assert layout.group == 64
    inputs = inputs_of(device, 2, 16, 2100, torch.float32, whole)
    tile = GemvTile(32, 128, num_warps=4)
    constants = encode_few.small_gemm_constants(tile, 2, 64, torch.float32)
    assert (constants["BL"], constants["BK"]) == (64, 64)
    code = encode(1, **inputs, tile=tile, name="gemm_2_tokens_32bit")
    assert_same_code(code, reference.topk_encode(k=1, **inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_rounded_alike_wherever_it_is_formed(device, dtype):
    # Numbers that differ in size by 2⁸: every further rounding of the residual would show.
    inputs = inputs_of(device, 5, 64, 96, dtype, torch.randn)
    inputs["prediction"] *= 256
    inputs["pre_bias"] /= 16
    name = encode_few.small_gemm_tile_name(dtype, 5, (96, 64), (64, 1))
    once = kernel_tiles.TILES[name].default.tile
    assert once.residual_launch
    inside = once._replace(residual_launch=0)
    assert_same_code(*(encode(9, **inputs, tile=tile, name=name) for tile in (once, inside)))


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 5, 17])
def test_a_view_of_a_transposed_weight_is_never_copied(device, N):
    D, M = 96, 200
    weight = torch.randn(D, M, device=device).T
    x = torch.randn(N, D, device=device)
    assert largest_allocation(lambda: encode(3, x, weight)) < weight.numel() * weight.itemsize


# -- three TF32 products ---------------------------------------------------------------------------


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Round to ten bits after the leading one, ties away from zero (`cvt.rna.tf32`)."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut_off(t: Tensor, largest: Tensor) -> Tensor:
    """fp64 to the last bit of an fp32 number as large as `largest`, towards zero."""
    unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-300))) - 23)
    return torch.trunc(t / unit) * unit


def matrix_instruction(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a b` over 8 dimensions as tensor cores add at worst: all terms aligned to the
    largest and cut off, and so is their sum."""
    terms = torch.cat([total.unsqueeze(1), a.double().unsqueeze(-1) * b.double()], 1)
    total = cut_off(terms, terms.abs().amax(1, keepdim=True)).sum(1)
    return cut_off(total, total.abs())


def tf32x3(w: Tensor, x: Tensor, dimensions: int) -> Tensor:
    """`x wᵀ` as `tl.dot(…, input_precision="tf32x3")` computes it step by step: the three products
    of a step by tensor cores, the sum over steps in fp32, rounded to nearest."""
    total = torch.zeros(w.shape[0], x.shape[0])
    for a, b in zip(w.split(dimensions, 1), x.split(dimensions, 1), strict=True):
        coarse = rounded_to_tf32(a), rounded_to_tf32(b.T)
        fine = rounded_to_tf32(a - coarse[0]), rounded_to_tf32(b.T - coarse[1])
        step = torch.zeros_like(total, dtype=torch.float64)
        for left, right in ((fine[0], coarse[1]), (coarse[0], fine[1]), coarse):
            for eight in range(0, a.shape[1], 8):
                part = slice(eight, eight + 8)
                step = matrix_instruction(step, left[:, part], right[part])
        total += step.float()
    return total.T


@pytest.mark.parametrize("dimensions", TF32X3)
@pytest.mark.parametrize("D", [512, 768, 2304, 4096])
def test_three_tf32_products_err_as_plain_torch(D, dimensions):
    w, x = torch.nn.functional.normalize(torch.randn(64, D), dim=1), torch.randn(16, D)
    scores = tf32x3(w, x, dimensions)
    truth = x.double() @ w.double().T
    assert_error_as_torch("scores", scores, x @ w.T, truth)
    # One TF32 product alone is hundreds of times as far off.
    single = rounded_to_tf32(x) @ rounded_to_tf32(w).T
    with pytest.raises(AssertionError, match="plain torch"):
        assert_error_as_torch("scores", single, x @ w.T, truth, factor=100)
