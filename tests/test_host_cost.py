"""bench/host.py without its clock: eager Triton calls skip the dispatcher, checked once."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from resae_kernels import (
    StepWorkspace,
    affine_chain,
    decode,
    dispatch,
    encode,
    online_step,
    sparse_decode,
    topk_encode,
    transport,
)
from resae_kernels.dispatch import check_once, triton_signature
from resae_kernels.triton import decode as triton_decode
from resae_kernels.triton import encode_few
from resae_kernels.triton import step as triton_step

ROOT = Path(__file__).parent.parent


def calls(N=2, k=2, gradient=False):
    """A call by Triton of each op, by its name."""
    x, weight = torch.randn(N, 4, requires_grad=gradient), torch.randn(8, 4)
    acts, indices = torch.rand(N, k, requires_grad=gradient), torch.zeros(N, k, dtype=torch.int64)
    b_dec = torch.randn(4)
    t = {"implementation": "triton"}
    return {
        "topk_encode": lambda: list(topk_encode(x, weight, None, k, **t)),
        "sparse_decode": lambda: [sparse_decode(acts, indices, weight, **t)],
        "affine_chain": lambda: affine_chain(
            [(acts, indices)] * 2, [weight] * 2, [torch.eye(4)], [b_dec], b_dec=[b_dec] * 2, **t
        ),
    }


def dispatched(call) -> set[str]:
    """Ops of this package that the dispatcher sees; the profiler would make calls take it."""
    seen = set()
    original = torch._ops.OpOverloadPacket.__call__

    def spy(self, *args, **kwargs):
        seen.add(str(self).partition(".")[2])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._ops.OpOverloadPacket, "__call__", spy)
        call()
    return seen


@pytest.mark.parametrize("op", calls())
def test_eager_calls_skip_the_dispatcher_and_gradients_do_not(op, device):  # noqa: ARG001
    assert dispatched(calls()[op]) == set()
    assert op in dispatched(calls(gradient=True)[op])
    with torch.no_grad():
        assert dispatched(calls(gradient=True)[op]) == set()
    with torch.amp.autocast("cpu"):
        assert op in dispatched(calls()[op])


@pytest.mark.parametrize("op", calls())
def test_both_ways_give_the_same_bits(op, device, monkeypatch):  # noqa: ARG001
    call = calls(N=3)[op]
    fast = call()
    for module in ("encode", "decode", "chain"):
        monkeypatch.setattr(f"resae_kernels.{module}.triton_signature", lambda *_: None)
    assert op in dispatched(call)
    for ours, theirs in zip(fast, call(), strict=True):
        assert torch.equal(ours, theirs)


def transported_calls(N=2, k=2):
    """Calls by Triton of layer 1 of two, with codes of layer 0 and transported dictionaries."""
    x, weight, W_dec = torch.randn(N, 1, 4), torch.randn(8, 4), torch.randn(8, 4)
    code = torch.rand(N, k), torch.randint(8, (N, k))
    first = tuple(t.view(N, 1, k) for t in code)
    b_dec = [torch.randn(4)] * 2
    dictionaries = [W_dec] * 2, [torch.randn(4, 4)], [torch.randn(4)]
    given: dict[str, Any] = {"transported": transport(*dictionaries, b_dec=b_dec)}
    given["implementation"] = "triton"
    return {
        "step": lambda: [
            out
            for part in (online_step(x, weight, None, k, W_dec, codes=[first], **given))
            for out in (part if isinstance(part, tuple) else [part])
        ],
        "step of layer 0": lambda: [online_step(x, weight, None, k, W_dec, **given).x_hat],
        "chain": lambda: affine_chain([code] * 2, *dictionaries, b_dec=b_dec, **given),
    }


@pytest.mark.parametrize("name", transported_calls())
def test_transported_dictionaries_skip_the_dispatcher_with_the_same_bits(device, name, monkeypatch):  # noqa: ARG001
    call = transported_calls()[name]
    with torch.no_grad():
        assert dispatched(call) == set()
        fast = [t.clone() for t in call()]
        for module in ("step", "decode", "chain"):
            monkeypatch.setattr(f"resae_kernels.{module}.triton_signature", lambda *_: None)
        assert dispatched(call) != set()
        for ours, theirs in zip(fast, call(), strict=True):
            assert torch.equal(ours, theirs)


def test_wrong_codes_and_dictionaries_are_refused_past_the_dispatcher(device):  # noqa: ARG001
    x, W = torch.randn(2, 4), torch.randn(8, 4)
    whole = transport([W] * 2, [torch.eye(4)], [torch.zeros(4)], b_dec=[torch.zeros(4)] * 2)
    code = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    t: dict[str, Any] = {"transported": whole, "implementation": "triton"}
    with pytest.raises(ValueError, match=r"online_step: codes\[0\] has shape \[3, 2\]"):
        online_step(x, W, None, 2, W, codes=[code], **t)
    with pytest.raises(ValueError, match="online_step: 2 codes, but transported covers 2 layers"):
        online_step(x, W, None, 2, W, codes=[code] * 2, **t)
    with pytest.raises(ValueError, match="online_step: 1 codes without transported"):
        online_step(x, W, None, 2, W, codes=[code], implementation="triton")
    other = transport([W[:, :3]] * 2, [torch.eye(3)], [torch.zeros(3)], b_dec=[torch.zeros(3)] * 2)
    with pytest.raises(ValueError, match="sparse_decode: bias has shape|W_dec"):
        affine_chain(
            [code] * 2,
            [W] * 2,
            [torch.eye(4)],
            [torch.zeros(4)],
            b_dec=[torch.zeros(4), torch.zeros(4)],
            transported=other._replace(constants=[torch.zeros(4)] * 2),
            implementation="triton",
        )


class NoLaunch:
    def __getitem__(self, _grid):
        return lambda *_arguments, **_options: None


def tensors_made(call, monkeypatch) -> Counter[str]:
    """Calls of torch that make a tensor, of which each takes the host up to a microsecond."""
    for module, name in (
        (triton_decode, "decode_kernel"),
        (encode_few, "gemv_kernel"),
        (triton_step, "select_decode_kernel"),
    ):
        monkeypatch.setattr(module, name, NoLaunch())
    call()
    made: Counter[str] = Counter()

    def count(_frame, event, function):
        if event == "c_call" and function.__name__ in ("new_empty", "empty", "view", "to", "mm"):
            made[function.__name__] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return made


def test_a_step_makes_its_results_and_what_passes_between_its_launches(device, monkeypatch):  # noqa: ARG001
    x, weight = torch.randn(2, 4), torch.randn(8, 4)
    given = x, weight, None, 2, weight
    space = StepWorkspace.allocate(2, 8, 2, 4, dtype=x.dtype, device=x.device)
    made = tensors_made(lambda: online_step(*given, implementation="triton"), monkeypatch)
    # Memory for a prediction only where there are codes; one view, of the codes as integers.
    assert made == {"new_empty": len(space) - 1, "view": 1}
    in_place = lambda: online_step(*given, out=space, implementation="triton")  # noqa: E731
    assert tensors_made(in_place, monkeypatch) == {"view": 1}


def test_a_chain_makes_its_results_and_its_predictions(device, monkeypatch):  # noqa: ARG001
    made = tensors_made(calls()["affine_chain"], monkeypatch)
    assert made == {"new_empty": 3, "mm": 1}


def test_checks_run_once_for_each_signature(device, monkeypatch):  # noqa: ARG001
    checked = []
    original = encode.check_arguments
    monkeypatch.setattr(
        encode, "check_arguments", lambda *a: checked.append(a[0].shape) or original(*a)
    )
    monkeypatch.setattr(encode, "_PASSED", set())
    for N in (3, 3, 4, 3):
        calls(N=N)["topk_encode"]()
    assert [shape[0] for shape in checked] == [3, 4]
    with pytest.raises(ValueError, match="k=9 exceeds"):
        topk_encode(torch.zeros(3, 4), torch.zeros(8, 4), None, 9, implementation="triton")


def test_what_fails_its_checks_is_checked_again():
    passed, runs = set(), []

    def fail():
        runs.append(1)
        raise ValueError("wrong")

    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            check_once(passed, ("a",), fail)
    assert len(runs) == 2
    assert not passed


def test_kept_signatures_are_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_SIGNATURES", 3)
    passed = set()
    for i in range(10):
        check_once(passed, (i,), lambda: None)
    assert len(passed) <= 3


def test_signatures_are_of_what_triton_may_be_given_at_once():
    x = torch.zeros(2, 3)
    assert triton_signature(None, x) is None  # on a CPU by itself torch computes
    assert triton_signature("torch", x) is None
    assert triton_signature("triton", x, None) == ((x.shape, x.dtype, x.device), None)
    assert triton_signature("triton", x, x[0].requires_grad_()) is None
    assert triton_signature("triton", torch._neg_view(x)) is None  # pyright: ignore
    with torch._subclasses.FakeTensorMode():
        assert triton_signature("triton", torch.zeros(2)) is None


def test_the_dense_algorithm_skips_the_dispatcher_too(device):  # noqa: ARG001
    acts, indices = torch.rand(3, 2), torch.randint(4, (3, 2))
    W_dec = torch.randn(4, 5)
    for algorithm in ("gather", "dense"):
        out = sparse_decode(acts, indices, W_dec, algorithm=algorithm, implementation="triton")
        torch.testing.assert_close(out, decode.decode_rows([acts], [indices], [W_dec], None, None))


def test_the_benchmark_runs_without_a_device(tmp_path):
    command = [sys.executable, "bench/host.py", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = (tmp_path / "host.md").read_text().splitlines()
    assert (
        sum(line.startswith(("| topk", "| sparse", "| online", "| affine")) for line in lines) == 8
    )
