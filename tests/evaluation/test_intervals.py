import numpy as np
import pytest

from resae.evaluation.intervals import Bootstrap, divided, interval


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    """Of many documents the bootstrap's is ± 1.96 standard errors."""
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = interval(Bootstrap(400).per_token(values, [1] * 400))
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.08 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.08 * error)


def test_95_of_100_intervals_have_the_true_mean():
    generator = np.random.default_rng(4)
    bootstrap = Bootstrap(60, resamples=1_000)
    hits = 0
    for _ in range(400):
        found = interval(bootstrap.per_token(generator.normal(1.0, 1.0, 60), [1] * 60))
        hits += found.low < 1.0 < found.high
    assert 0.91 < hits / 400 < 0.98


def test_quantities_are_paired():
    """What is hard for both cancels in a difference and in a ratio."""
    hard = np.random.default_rng(5).exponential(1.0, 50)
    bootstrap, ones = Bootstrap(50), [1] * 50
    ours, theirs = bootstrap.per_token(hard, ones), bootstrap.per_token(2 * hard, ones)
    ratio = interval(ours / theirs)
    assert ratio.low == pytest.approx(0.5)
    assert ratio.high == pytest.approx(0.5)
    assert interval(theirs).high - interval(theirs).low > 0.1


def test_a_document_weighs_as_much_as_it_has_tokens():
    quantity = Bootstrap(2, resamples=50).per_token([10.0, 90.0], [10, 30])
    assert quantity[0] == pytest.approx(2.5)
    assert {round(x, 6) for x in quantity[1:]} == {1.0, 2.5, 3.0}
    assert str(interval(quantity)) == "2.500 [1.000, 3.000]"


def test_of_every_stratum_as_many_are_drawn_as_there_are():
    strata, ones = ["a"] * 3 + ["b"] * 2, [1] * 5
    bootstrap = Bootstrap(5, resamples=200, strata=strata)
    of_a = bootstrap.per_token([1.0, 1.0, 1.0, 0.0, 0.0], ones)
    assert set(of_a) == {0.6}
    assert len(set(bootstrap.per_token([1.0, 0.0, 0.0, 1.0, 0.0], ones))) > 4


def test_of_many_documents_fewer_resamples_are_drawn():
    """The matrix of resamples stays within 80 MB."""
    sizes = {n: len(Bootstrap(n).total([1.0] * n)) - 1 for n in (2, 1_000, 5_000)}
    assert sizes == {2: 10_000, 1_000: 10_000, 5_000: 2_000}


def test_there_is_no_interval_of_one_document_or_of_an_undefined_ratio():
    one, three = Bootstrap(1), Bootstrap(3)
    assert one.columns("x", one.total([2.0])) == {"x": 2.0, "x_low": None, "x_high": None}
    ratio = divided(three.total([1.0, 2.0, 3.0]), three.total([0.0, 0.0, 1.0]))
    assert three.columns("x", ratio) == {"x": 6.0, "x_low": None, "x_high": None}
    constant = three.total([1.0, 1.0, 1.0])
    assert three.columns("x", constant) == {"x": 3.0, "x_low": 3.0, "x_high": 3.0}
    assert three.columns("x", None) == {"x": None, "x_low": None, "x_high": None}
