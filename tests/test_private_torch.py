"""Fallbacks for a torch that has moved or removed a private interface."""

import pytest
import torch

from resae_kernels import sparse_decode
from resae_kernels.cpu import native, private_torch


def test_a_missing_interface_gives_way_to_its_substitute():
    assert private_torch._found("_C._no_such_thing.at_all", lambda: 7)() == 7
    assert private_torch._found("nn.functional.linear", lambda: 7) is torch.nn.functional.linear


@pytest.mark.parametrize("name", ["_dispatch_modes", "_transform"])
def test_where_torch_cannot_tell_what_sees_a_call_it_goes_through_the_dispatcher(name, monkeypatch):
    assert private_torch.is_eager()
    acts, indices, W = torch.rand(3, 2), torch.randint(9, (3, 2)), torch.randn(9, 5)
    expected = sparse_decode(acts, indices, W)
    monkeypatch.setattr(
        private_torch, name, {"_dispatch_modes": lambda: 1, "_transform": int}[name]
    )
    assert not private_torch.is_eager()
    assert not native.direct(acts, W)
    assert torch.equal(sparse_decode(acts, indices, W), expected)


def test_16_bit_gemms_without_their_probe_are_taken_in_float32(monkeypatch):
    private_torch.has_16bit_gemm.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not private_torch.has_16bit_gemm(torch.bfloat16)
    assert not private_torch.has_onednn_linear()
    private_torch.has_16bit_gemm.cache_clear()
