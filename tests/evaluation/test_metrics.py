import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resae.evaluation.metrics import (
    VarianceUnexplained,
    cross_entropy,
    kept_directions,
    kl_divergence,
)


def fvu(x, x_hat, batches=1):
    sums = VarianceUnexplained()
    for a, b in zip(x.chunk(batches), x_hat.chunk(batches), strict=True):
        sums.add(a, b)
    return sums.fvu()


def test_fvu_of_a_worked_example():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # mean (1, 2): variance 2 · (1 + 4) = 10
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 2.0]])  # error 1 + 4 = 5
    assert fvu(x, x_hat) == 0.5


def test_directions_are_kept_where_the_cosine_is_above():
    before = torch.eye(4)
    after = torch.tensor([[2.0, 0, 0, 0], [0.3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, -1.0]])
    assert kept_directions(before, after) == 0.5
    assert kept_directions(before, after, 0.7) == 0.75


def test_fvu_is_0_for_the_truth_and_1_for_the_mean():
    x = torch.randn(50, 7) + 3
    assert fvu(x, x) == 0.0
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1.0, abs=1e-6)


@given(
    scale=st.floats(0.01, 100), offset=st.floats(-100, 100), batches=st.sampled_from([1, 2, 7, 40])
)
def test_fvu_does_not_change_with_scale_offset_or_batching(scale, offset, batches):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    x_hat = x + 0.3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    moved = fvu(scale * x + offset, scale * x_hat + offset, batches)
    assert moved == pytest.approx(fvu(x, x_hat), rel=1e-6)


def test_fvu_keeps_its_digits_far_from_the_origin():
    x = torch.randn(1000, 4, dtype=torch.float64)
    x_hat = x + 0.1
    assert fvu(x + 1e6, x_hat + 1e6, 10) == pytest.approx(fvu(x, x_hat), rel=1e-4)


def test_fvu_without_tokens_or_variance_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        VarianceUnexplained().fvu()
    with pytest.raises(ValueError, match="does not vary"):
        fvu(torch.ones(3, 2), torch.zeros(3, 2))


def test_cross_entropy_of_uniform_logits_is_log_v():
    ce = cross_entropy(torch.zeros(2, 5, 16), torch.randint(16, (2, 5)))
    assert ce.shape == (2, 4)
    torch.testing.assert_close(ce, torch.full((2, 4), math.log(16)))


def test_cross_entropy_reads_the_next_token():
    logits = torch.full((1, 3, 4), -20.0)
    logits[0, 0, 2] = logits[0, 1, 3] = 20.0
    assert float(cross_entropy(logits, torch.tensor([[0, 2, 3]])).max()) < 1e-6
    assert float(cross_entropy(logits, torch.tensor([[2, 3, 0]])).min()) > 30


def test_kl_of_a_worked_example_is_directed():
    p = torch.tensor([0.5, 0.5]).log().expand(1, 2, 2)
    q = torch.tensor([0.9, 0.1]).log().expand(1, 2, 2)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(kl_divergence(p, q)) == pytest.approx(forward, rel=1e-5)
    assert float(kl_divergence(q, p)) == pytest.approx(
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5
    )
    assert float(kl_divergence(p, p)) == 0.0
