"""GEMMs by oneDNN: when they are used, and that they are as exact as torch's own."""

import pytest
import tiny
import torch
from measured import assert_error_as_torch
from torch import nn

from resae.data.activations import capture_tokens
from resae_kernels import topk_encode
from resae_kernels.cpu import onednn
from resae_kernels.cpu.onednn import MOST_DEPTH, OneDNNLinear


@pytest.fixture
def called(monkeypatch):
    """Shapes of the GEMMs that oneDNN computes."""
    shapes = []
    plain = onednn.linear

    def counted(x, weight, bias):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return plain(x, weight, bias)

    monkeypatch.setattr(onednn, "linear", counted)
    return shapes


@pytest.mark.parametrize("D", [1, 100, 128, MOST_DEPTH])
@pytest.mark.parametrize("with_bias", [True, False])
def test_error_as_torch_up_to_the_depth(D, with_bias):
    x, weight = torch.randn(300, D), torch.randn(512, D)
    bias = torch.randn(512) if with_bias else None
    wide = None if bias is None else bias.double()
    truth = nn.functional.linear(x.double(), weight.double(), wide)
    assert_error_as_torch(
        "linear", onednn.linear(x, weight, bias), nn.functional.linear(x, weight, bias), truth
    )


def test_the_encode_takes_it_where_it_pays(called):
    def encode(N, D, M, dtype=torch.float32):
        called.clear()
        topk_encode(torch.randn(N, D, dtype=dtype), torch.randn(M, D, dtype=dtype), None, 4)
        return bool(called)

    assert encode(64, 128, 512)
    assert not encode(1, 128, 512)  # too little work
    assert not encode(64, MOST_DEPTH + 1, 512)  # too deep
    assert not encode(64, 128, 512, torch.float64)


def test_linears_of_a_model_while_it_is_read_and_not_else(called):
    lm = tiny.pythia()
    ids = tiny.ids(8, 64)
    points = lm.hook_points(tiny.LAYERS)
    read = capture_tokens(lm, ids, points)
    assert called
    called.clear()
    keep = ~lm.is_special(ids)
    for x, y in zip(read, lm.capture(ids, points).values(), strict=True):
        torch.testing.assert_close(x, y[keep])
    assert not called


def test_gradients_are_left_to_torch(called):
    layer = nn.Linear(64, 512)
    x = torch.randn(256, 64)
    with OneDNNLinear():
        layer(x).sum().backward()
        assert not called
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
            no_bias = nn.Linear(64, 512, bias=False)
            torch.testing.assert_close(no_bias(x[None]), (x @ no_bias.weight.T)[None])
            assert len(called) == 2
            layer.double()(x.double())
            layer.to(torch.bfloat16)(x.to(torch.bfloat16))
            layer(x[:8].to(torch.bfloat16))
            assert len(called) == 2
    assert layer.weight.grad is not None
