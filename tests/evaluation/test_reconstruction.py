"""Columns of reconstruction rows against direct formulas in float64, with sinks left out."""

import numpy as np
import pytest
import tiny
import torch

from resae import Method
from resae.evaluation.intervals import Bootstrap, interval
from resae.evaluation.reconstruction import Reconstruction, StreamMeans

TOKENS = [5, 3, 4, 6]
"""Of each of 4 rows, in documents 0, 0, 1, 2."""
DOCUMENTS = torch.tensor([0, 0, 1, 2])


@pytest.fixture(scope="module")
def stack():
    return tiny.stack(tiny.pythia())


@pytest.fixture(scope="module")
def xs(stack):
    """Streams with a large offset and dimensions of different size."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.linspace(0.1, 3.0, stack.d_in)
    noise = [torch.randn(18, stack.d_in, generator=generator) for _ in range(3)]
    return [x * scale + 7.0 for x in noise]


@pytest.fixture(scope="module")
def sinks():
    return torch.arange(18) == 6


@pytest.fixture(scope="module", params=["open", "closed"])
def loop(request):
    return request.param


@pytest.fixture(scope="module")
def measured(stack, xs, sinks, loop):
    means = StreamMeans()
    found = Reconstruction(Method("resae", stack, 4), loop, means, 3)
    parts = [(slice(0, 8), [0, 1]), (slice(8, 18), [2, 3])]
    for tokens, _ in parts:
        means.add([x[tokens] for x in xs], ~sinks[tokens])
    with torch.no_grad():
        for tokens, rows in parts:
            of_rows = [TOKENS[row] for row in rows]
            found.add([x[tokens] for x in xs], sinks[tokens], DOCUMENTS[rows], of_rows)
    return found


@torch.no_grad()
def test_columns_are_those_of_direct_formulas(stack, xs, sinks, loop, measured):
    x_hats, codes = stack(xs, loop=loop)
    document = DOCUMENTS.repeat_interleave(torch.tensor(TOKENS))[~sinks]
    bootstrap = Bootstrap(3)
    for layer in range(3):
        x, x_hat = (t[layer][~sinks].double() for t in (xs, x_hats))
        error = (x - x_hat).square().sum(1)
        spread = (x - x.mean(0)).square().sum(1)
        norms = x.norm(dim=1) * x_hat.norm(dim=1)
        row = measured.row(layer, bootstrap, None)
        assert row.explained_variance == pytest.approx(float(1 - error.sum() / spread.sum()))
        assert row.fvu_stream == pytest.approx(1 - row.explained_variance)
        assert row.explained_variance_legacy == pytest.approx(float((1 - error / spread).mean()))
        assert row.cosine == pytest.approx(float(((x * x_hat).sum(1) / norms).mean()))
        ratio = x_hat.norm(dim=1) / x.norm(dim=1)
        assert row.norm_ratio == pytest.approx(float(ratio.mean()))
        bias = x_hat.square().sum() / (x * x_hat).sum()
        assert row.reconstruction_bias == pytest.approx(float(bias))
        prediction = stack.predictor(layer, x_hats if loop == "closed" else xs)
        target = xs[layer] if prediction is None else xs[layer] - prediction
        target = target[~sinks].double()
        missed = (target - stack.sae(layer).decode(*codes[layer])[~sinks].double()).square().sum(1)
        of_target = missed.sum() / (target - target.mean(0)).square().sum()
        assert row.fvu_target == pytest.approx(float(of_target), rel=1e-5)
        assert (row.sinks, row.l0) == (
            1,
            float((codes[layer].acts[~sinks] > 0).sum(1).double().mean()),
        )
        # The interval: sums of documents drawn again, their mean activation that of all.
        for found, *columns in (
            ("fvu_stream", error, spread),
            ("fvu_target", missed, (target - target.mean(0)).square().sum(1)),
        ):
            sums = [
                np.bincount(document, weights=column.numpy(), minlength=3) for column in columns
            ]
            expected = interval(bootstrap.total(sums[0]) / bootstrap.total(sums[1]))
            bounds = (getattr(row, f"{found}_low"), getattr(row, f"{found}_high"))
            assert expected[1:] == pytest.approx(bounds, rel=1e-5)


def test_firing_rates_are_counted_without_sinks(stack, xs, sinks, loop, measured):
    codes = stack(xs, loop=loop).codes
    for layer in range(3):
        acts, indices = (part[~sinks] for part in codes[layer])
        rate = torch.bincount(indices[acts > 0], minlength=64).double() / 17
        row = measured.density_row(layer)
        assert row.tokens == 17
        assert row.alive_fraction == float((rate > 0).double().mean())
        assert row.over_10_percent == float((rate > 0.1).double().mean())
        assert row.activity_over_10_percent == pytest.approx(
            float(rate[rate > 0.1].sum() / rate.sum())
        )
        assert sum(row.counts) == int((rate > 0).sum())
        assert row.alive_fraction == 1 - measured.row(layer, Bootstrap(3), None).dead_fraction
