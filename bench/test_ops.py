"""The same calls under pytest-benchmark, for comparing one commit with another:

pytest bench --benchmark-enable --benchmark-autosave --benchmark-compare
"""

import pytest
import torch
from ops import CPU_CASES, DRY_CASES, GPU_CASES

from resae_kernels.profiling import make_inputs
from resae_kernels.profiling.specs import check, providers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "case", GPU_CASES if DEVICE.type == "cuda" else CPU_CASES, ids=lambda case: case.name
)
def test_time(benchmark, case):
    if benchmark.disabled:  # only asked whether it runs
        case = next(c for c in DRY_CASES if c.op == case.op)
    inputs = make_inputs(case, DEVICE)
    name, call = next(iter(providers(case, inputs, {}).items()))
    check(case, inputs, name, call())

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
