import pytest
import tiny
import torch

from resae.evaluation.reconstruction import variance_within
from resae.evaluation.redundancy import HISTOGRAM_EDGES, LargestCosines, redundancy
from resae_kernels import SparseCode, transport


def largest(*dictionaries):
    return LargestCosines(dictionaries).other_layers()


def test_the_largest_cosine_is_signed_and_only_with_other_layers():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # equal within the layer: does not count
    second = torch.tensor([[-2.0, 0.0], [0.0, 3.0]])
    assert largest(first, second).tolist() == [0.0, 0.0, -1.0, 0.0]
    assert largest(first, first).tolist() == [1.0] * 4
    with_zero = torch.tensor([[-2.0, 0.0], [0.0, 0.0]])  # has no direction
    assert largest(first, with_zero).tolist() == [-1.0] * 3


def test_redundancy_of_copies_and_of_random_directions():
    W = torch.randn(64, 16)
    copies = redundancy(LargestCosines([W, 2 * W, W], within=True))
    assert copies.mean_max_cos == pytest.approx(1.0, abs=1e-5)
    assert copies.share_over_0_9 == 1.0
    assert copies.layers_per_latent == 3.0
    assert copies.mean_max_cos_within < 0.9
    random = redundancy(LargestCosines([torch.randn(256, 32) for _ in range(3)]))
    assert random.mean_max_cos == pytest.approx(random.random_floor, abs=0.02)
    assert random.share_over_0_9 == 0.0
    assert random.share_over_0_5 > random.share_over_0_7
    assert 1.0 <= random.layers_per_latent < 1.3


@pytest.mark.parametrize("kind", ["previous", "all_previous"])
def test_latents_are_transported_through_the_chain(kind):
    """As by the transported dictionaries of a stack."""
    stack = tiny.stack(tiny.pythia(), kind, d_sae=40)
    W = [stack.sae(layer).W_dec.detach() for layer in range(3)]
    A, c = stack.predictor.A, stack.predictor.c
    tables = transport(W, A, c, b_dec=[torch.zeros(stack.d_in)] * 3).dictionaries
    found = LargestCosines(W, A).of_layers
    for later in range(3):
        for earlier in range(later):
            cosines = torch.cosine_similarity(
                tables[later][earlier].unsqueeze(1), W[later].unsqueeze(0), dim=2
            )
            torch.testing.assert_close(found[earlier][:, later], cosines.amax(1))
            torch.testing.assert_close(found[later][:, earlier], cosines.amax(0))
    # What a map makes of a latent is the same latent after transport, and another one before.
    copies = LargestCosines([W[0], W[0] @ A[0]], A[:1])
    assert copies.other_layers().min() > 0.9999
    assert largest(W[0], W[0] @ A[0]).min() < 0.99


def test_no_cosine_depends_on_the_size_of_blocks():
    generator = torch.Generator().manual_seed(5)
    W = [torch.randn(rows, 24, generator=generator) for rows in (157, 90, 131)]
    W[1][7] = 0
    W[2][:20] = W[0][30:50] * 1.5  # ties
    A = [torch.randn(24, 24, generator=generator) for _ in range(2)]
    for maps in (None, A):
        whole = LargestCosines(W, maps, within=True, block_rows=1000)
        for block_rows in (1, 7, 32, 64, 150):
            blocked = LargestCosines(W, maps, within=True, block_rows=block_rows)
            for one, other in zip(whole.of_layers, blocked.of_layers, strict=True):
                assert torch.equal(one, other)


def test_the_histogram_counts_every_latent():
    counts = LargestCosines([torch.randn(40, 8), torch.randn(30, 8)]).histogram()
    assert len(counts) == len(HISTOGRAM_EDGES) - 1
    assert sum(counts) == 70


def test_redundancy_of_one_layer_is_an_error():
    with pytest.raises(ValueError, match="at least 2"):
        LargestCosines([torch.randn(3, 2)])


def test_the_spread_of_a_latent_at_a_token_is_over_its_layers():
    """Token 0: latent 5 at layers 0 and 2, acts 1 and 3; latent 2 at layer 1 alone."""
    none = [[0.0, 0.0]]
    codes = [
        SparseCode(torch.tensor([[1.0, 0.0], *none]), torch.tensor([[5, 0], [0, 0]])),
        SparseCode(torch.tensor([[2.0, 0.0], *none]), torch.tensor([[2, 0], [0, 0]])),
        SparseCode(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([[5, 0], [5, 2]])),
    ]
    both = torch.tensor([True, True])
    mean = 3 * 2 / 4
    expected = 1 * mean**2 + 3 * (2 - mean) ** 2
    assert float(variance_within(codes, both, 8)) == pytest.approx(expected)
    assert float(variance_within(codes, ~both, 8)) == 0.0
