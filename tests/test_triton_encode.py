"""The Triton encode of many tokens: chunks of rows, selection, and its product."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resae_kernels import TopK, topk_encode
from resae_kernels.cpu.selection import select
from resae_kernels.triton import selection, tiles
from resae_kernels.triton.encode import rows_per_chunk

pytestmark = pytest.mark.usefixtures("poisoned_memory")

inf, nan = math.inf, math.nan
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


def assert_same_code(ours: TopK, theirs: TopK) -> None:
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


def selected(scores: Tensor, k: int, by_value: bool) -> TopK:
    n, M = scores.shape
    layout = selection.selection_layout(M, k)
    assert layout is not None
    acts = scores.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=scores.device)
    selection.launch_select(scores, None, acts, indices, layout, by_value)
    return TopK(acts, indices)


def awkward_scores(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of ties, of zeros, of one value, with inf and NaN; 100 latents fill no last group."""
    rows = torch.randint(-1, 4, (9, 100)).to(dtype)
    rows[0], rows[1], rows[2], rows[3] = 0, 3, -1, nan
    rows[4, 5:90:7] = inf
    rows[5, ::9], rows[5, 1::9], rows[5, 2::9] = nan, inf, -inf
    rows[6] = torch.randn(100).to(dtype)
    return rows.to(device)


def assert_selects(scores: Tensor, k: int) -> None:
    """By index as on a CPU; by value as by a stable sort of that."""
    by_index, by_value = selected(scores, k, False), selected(scores, k, True)
    expected = (t.to(scores.device) for t in select(scores.cpu(), k, False))
    assert_same_code(by_index, TopK(*expected))
    acts, order = by_index.acts.sort(dim=-1, descending=True, stable=True)
    assert_same_code(by_value, TopK(acts, by_index.indices.gather(-1, order)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_by_value_is_the_stable_sort_of_the_code_by_index(device, dtype):
    for k in (1, 5, 40, 100):  # 40: more than the groups
        assert_selects(awkward_scores(dtype, device), k)


@pytest.mark.parametrize("tile", tiles.TILES["select"].alternatives, ids=tiles.sizes)
def test_every_tile_of_the_selection_selects_the_same(device, tile):
    with tiles.forced_tiles({"select": tile}):
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
