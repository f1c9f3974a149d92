import pytest
import tiny
import torch
from torch import nn

from resae.models.norms import frozen_norms


def norms():
    layer = nn.LayerNorm(8)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    bare = nn.LayerNorm(8, elementwise_affine=False)
    rms = nn.RMSNorm(8, eps=1e-6)
    nn.init.normal_(rms.weight)
    gemma = type(tiny.gemma3().blocks[0].input_layernorm)(8)
    nn.init.normal_(gemma.weight)
    return {"layer": layer, "bare": bare, "rms": rms, "gemma": gemma}


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("name", list(norms()))
def test_the_gradient_is_that_of_a_norm_with_its_denominator_fixed(name, size):
    norm = norms()[name].double()
    x = (size * (torch.randn(3, 8).double() + 0.5)).requires_grad_()
    x.data[0, 2] = 0
    weights = torch.randn(3, 8).double()
    plain = norm(x)
    with torch.no_grad():
        centred = x - x.mean(-1, keepdim=True) if name in ("layer", "bare") else x
        scale = 1 / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gain = 1 if norm.weight is None else norm.weight + (name == "gemma")
        expected = weights * gain * scale
        if name in ("layer", "bare"):
            expected = expected - expected.mean(-1, keepdim=True)
    with frozen_norms(nn.Sequential(norm)):
        frozen = norm(x)
        (gradient,) = torch.autograd.grad((frozen * weights).sum(), x)
    torch.testing.assert_close(frozen, plain, rtol=0, atol=0)
    expected[0, 2] = gradient[0, 2] if name in ("rms", "gemma") else expected[0, 2]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 / size)
    (true,) = torch.autograd.grad((norm(x) * weights).sum(), x)
    assert not torch.allclose(true, gradient, rtol=0.01)
