"""Measured in place of chosen: tolerances from plain torch, memory from the allocations made."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Result = dict[str, Tensor]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
"""Dtypes of every kernel, as parameters of a test."""


def assert_close_as_torch(
    kernel: Callable[..., Tensor | list[Tensor]],
    plain: Callable[..., Tensor | list[Tensor]],
    inputs: dict[str, Tensor],
    factor: float = 2.0,
) -> None:
    """`kernel` is at most `factor` times as far from fp64 as `plain` is at the inputs' dtype.

    Said of each output and of the gradient of each floating input, through all outputs together;
    `plain` on the inputs in fp64 is the truth. The error is the largest over a tensor, and again
    the root mean square; one rounding (half an ulp of the entries, in the same measure) is always
    allowed, for where plain torch happens to round exactly.
    """
    dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    exact = values_and_gradients(plain, _to(inputs, torch.float64), dtype)
    rival = values_and_gradients(plain, inputs, dtype)
    ours = values_and_gradients(kernel, inputs, dtype)
    for name, truth in exact.items():
        assert ours[name].dtype == dtype, name
        assert ours[name].shape == truth.shape, name
        assert_error_as_torch(name, ours[name], rival[name], truth, factor)


def assert_error_as_torch(
    name: str, ours: Tensor, rival: Tensor, truth: Tensor, factor: float = 2.0
) -> None:
    """The rule of `assert_close_as_torch` for one tensor, given all three."""
    if truth.numel() == 0:
        return
    ulp = torch.finfo(ours.dtype).eps * truth.abs()
    errors = [(t.double() - truth).abs() for t in (ours, rival)]
    for measure, of in (("at most", torch.amax), ("in the mean square", _root_mean_square)):
        error, allowed, floor = (float(of(t)) for t in (*errors, ulp))
        assert error <= factor * allowed + floor / 2, (
            f"{name}: off by {error:.3g} {measure}, plain torch in {ours.dtype} by {allowed:.3g} "
            f"(ratio {error / max(allowed, 1e-300):.2f}, {factor} allowed; ulp {floor:.3g})"
        )


def _root_mean_square(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def values_and_gradients(
    function: Callable[..., Tensor | list[Tensor]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Result:
    """Outputs as `output i`, gradients of all floating inputs as `gradient of name`.

    The gradients that come in are random, the same for the same shapes, and rounded to `dtype`.
    """
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator("cpu").manual_seed(1)
    incoming = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            out.device, dtype or out.dtype
        )
        for out in outputs
    ]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)],
    )
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}


def assert_same(ours: Result, theirs: Result, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name],
            theirs[name],
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest block of memory that one operator takes while `function` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def random_code(
    N: int, k: int, M: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """k distinct latents per token with positive acts; the last slot of every third is padding."""
    indices = torch.rand(N, M).argsort(dim=-1)[:, :k]
    acts = torch.rand(N, k, dtype=torch.float64) + 0.1
    if k > 1:
        acts[::3, -1] = 0
        indices[::3, -1] = 0
    return acts.to(dtype), indices


def scatter(acts: Tensor, indices: Tensor, M: int) -> Tensor:
    """The dense code `[..., M]`."""
    return acts.new_zeros(*acts.shape[:-1], M).scatter_add(-1, indices, acts)


def _to(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
