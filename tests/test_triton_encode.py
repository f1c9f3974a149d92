"""The Triton encode of many tokens: chunks of rows, selection, and its GEMM."""

import math

import pytest
import torch
from measured import DTYPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resae_kernels import SparseCode, reference, topk_encode
from resae_kernels.cpu.selection import select
from resae_kernels.triton import gemm, selection, tiles
from resae_kernels.triton.encode import rows_per_chunk
from resae_kernels.triton.keys import KEYS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

inf, nan = math.inf, math.nan


def assert_same_code(ours: SparseCode, theirs: SparseCode) -> None:
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.acts, theirs.acts, rtol=0, atol=0, equal_nan=True)


# -- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "most", "rows"),
    [
        pytest.param(8192, 3971, 2816, id="three-of-32-tiles"),
        pytest.param(4096, 3971, 2048, id="two-equal"),
        pytest.param(3900, 3971, 3900, id="all-at-once"),
        pytest.param(1000, 300, 256, id="one-tile-each"),
        pytest.param(1000, 255, 250, id="less-than-a-tile"),
        pytest.param(20, 1, 1, id="one-row"),
        pytest.param(0, 7, 1, id="no-rows"),
    ],
)
def test_chunks_are_whole_tiles_and_equal(N, most, rows):
    assert rows_per_chunk(N, most) == rows


def test_chunks_make_fewer_waves_of_tiles_than_filling_the_workspace():
    def waves(N, rows):  # of 128 × 256 tiles over 132 multiprocessors, M = 65536
        parts = [min(rows, N - start) for start in range(0, N, rows)]
        return sum(-(-(-(-part // 128) * 256) // 132) for part in parts)

    most = 3971  # of M = 65536, k = 64 in 512 MiB
    assert (waves(8192, most), waves(8192, rows_per_chunk(8192, most))) == (130, 125)
    for N in range(4000, 40000, 997):
        assert rows_per_chunk(N, most) <= most
        assert waves(N, rows_per_chunk(N, most)) <= waves(N, most) + 1


# -- selection -------------------------------------------------------------------------------------


def selected(scores: Tensor, k: int, by_value: bool) -> SparseCode:
    n, M = scores.shape
    layout = selection.selection_layout(M, k)
    assert layout is not None
    acts = scores.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=scores.device)
    selection.launch_select(scores, None, acts, indices, layout, by_value)
    return SparseCode(acts, indices)


def awkward_scores(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of ties, of zeros, of one value, with inf and NaN; 100 latents fill no last group."""
    rows = torch.randint(-1, 4, (9, 100)).to(dtype)
    rows[0], rows[1], rows[2], rows[3] = 0, 3, -1, nan
    rows[4, 5:90:7] = inf
    rows[5, ::9], rows[5, 1::9], rows[5, 2::9] = nan, inf, -inf
    rows[6] = torch.randn(100).to(dtype)
    return rows.to(device)


def assert_selects(scores: Tensor, k: int) -> None:
    """Compare selection by index with the CPU's, and by value with a stable sort of that."""
    by_index, by_value = selected(scores, k, False), selected(scores, k, True)
    expected = (t.to(scores.device) for t in select(scores.cpu(), k, False))
    assert_same_code(by_index, SparseCode(*expected))
    acts, order = by_index.acts.sort(dim=-1, descending=True, stable=True)
    assert_same_code(by_value, SparseCode(acts, by_index.indices.gather(-1, order)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_by_value_is_the_stable_sort_of_the_code_by_index(device, dtype):
    for k in (1, 5, 40, 100):  # 40: more than the groups
        assert_selects(awkward_scores(dtype, device), k)


@pytest.mark.parametrize("tile", tiles.TILES["select"].alternatives, ids=tiles.sizes)
def test_every_tile_of_the_selection_selects_the_same(device, tile):
    with tiles.override_tiles({"select": tile}):
        assert_selects(awkward_scores(torch.bfloat16, device), 5)


class Called(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [2, 17])
def test_no_sort_follows_the_selection(device, tokens):
    x, weight = torch.randn(tokens, 5, device=device), torch.randn(40, 5, device=device)
    with Called() as called:
        acts, _ = topk_encode(x, weight, None, 4, implementation="triton")
    assert not called.names & {"sort", "gather", "topk"}
    assert (acts.diff(dim=-1) <= 0).all()


# -- the GEMM with group maxima --------------------------------------------------------------------

# The interpreter multiplies the zeros that fill a tile by infinite weights.
interpreted_inf = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
GEMM_TILES = pytest.mark.parametrize(
    "tile",
    [
        pytest.param(tiles.GemmTile(64, 64, 32, 2, 4, descriptors=0, persistent=0), id="pointers"),
        pytest.param(tiles.GemmTile(64, 64, 32, 2, 4, 1, persistent=1), id="descriptors"),
    ],
)


def by_gemm(tile: tiles.GemmTile, x, weight, bias, k, **options) -> SparseCode:
    with tiles.override_tiles({"gemm_many_tokens_16bit": tile}):
        return topk_encode(x, weight, bias, k, **options, implementation="triton")


def integers(device: torch.device, *shape: int, dtype=torch.bfloat16) -> Tensor:
    """Small ones: their sums are exact, so that scores agree bit by bit."""
    return torch.randint(-1, 2, shape).to(device=device, dtype=dtype)


@GEMM_TILES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gemm_gives_the_reference_code(device, dtype, tile):
    # No size is a multiple of the tile's.
    x, prediction = (integers(device, 70, 48, dtype=dtype) for _ in range(2))
    weight, bias = integers(device, 150, 48, dtype=dtype), integers(device, 150, dtype=dtype)
    pre_bias = integers(device, 48, dtype=dtype)
    ours = by_gemm(tile, x, weight, bias, 9, pre_bias=pre_bias, prediction=prediction)
    expected = reference.topk_encode(x, weight, bias, 9, pre_bias=pre_bias, prediction=prediction)
    assert_same_code(ours, expected)
    ours = by_gemm(tile, x, weight, None, 9, workspace_bytes=20 * 192 * 2)  # several chunks
    assert_same_code(ours, reference.topk_encode(x, weight, None, 9))


@interpreted_inf
@GEMM_TILES
def test_gemm_keeps_special_values_and_ties(device, tile):
    for row in awkward_scores(torch.bfloat16, device)[[0, 1, 3, 4, 5, 6]]:
        x, weight = row.new_zeros(17, 16), row.new_zeros(100, 16)
        x[:, 0], weight[:, 0] = 1, row
        k = 100 if row.isnan().all() else 11
        assert_same_code(
            by_gemm(tile, x, weight, None, k), reference.topk_encode(x, weight, None, k)
        )


@interpreted_inf
@GEMM_TILES
def test_gemm_reads_nothing_into_the_latents_that_fill_its_tile(device, tile):
    # An infinite x makes NaN of every zero weight: of those past the last latent too.
    x = torch.full((17, 16), inf, dtype=torch.bfloat16, device=device)
    weight = -torch.ones(21, 16, dtype=torch.bfloat16, device=device)
    weight[3] = 1
    code = by_gemm(tile, x, weight, None, 1)
    assert (code.indices == 3).all()
    assert (code.acts == inf).all()


@GEMM_TILES
@pytest.mark.parametrize("group", selection.GROUP_SIZES)
def test_gemm_leaves_the_maxima_that_a_pass_over_its_scores_finds(device, group, tile):
    x, weight = integers(device, 5, 16), torch.randn(100, 16, device=device).bfloat16()
    groups = -(-100 // group)
    scores = x.new_empty(5, 128)[:, :100]
    best = torch.empty(5, groups, dtype=KEYS[x.dtype].dtype, device=device)
    gemm.launch_gemm(x, weight, None, scores, best, group, tile)
    layout = selection.SelectionLayout(group, groups, slots=1, width=128)
    # Below 0 the order of keys is another, and nothing is selected.
    assert torch.equal(best.clamp(min=0), selection.group_maxima(scores, layout).clamp(min=0))


def test_gemm_leaves_rows_that_begin_anywhere_to_the_library():
    aligned = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert gemm.gemm_takes(aligned, aligned)
    for x in (aligned.float(), aligned[:, :20].contiguous(), aligned[:, :16], aligned[:1, :16]):
        assert not gemm.gemm_takes(x, x)
    shifted = torch.zeros(129, dtype=torch.bfloat16)[1:].view(4, 32)
    assert not gemm.gemm_takes(aligned, shifted)
