"""pytest plugin: the kernel tests as on a machine with a GPU, without one.

Tensors are fake: they have a device and no values. An op runs its implementation up to the
launches, and a launch computes nothing but refuses tensors that are not on the GPU. A test ends
where it reads the first value. It fails where a kernel is given CPU tensors, or where tensors of
two devices meet.

    PYTHONPATH=.:tests pytest -p gpu_stand_in tests/test_sparse_decode.py
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "stand_in"
_setup_privateuseone_for_python_backend(GPU)
FakeTensor.is_cuda = property(lambda t: t.device.type == GPU)  # type: ignore[assignment]
torch.cuda.device_of = nullcontext  # type: ignore[assignment, misc]

implementations: dict[str, Any] = {}
library_impl, register_fake = torch.library.Library.impl, torch.library.register_fake
new_tensor = torch.tensor


def impl(self, name, function, *rest, **options):
    implementations[f"{self.ns}::{name}"] = function
    return library_impl(self, name, function, *rest, **options)


def register_implementation(op, function=None, /, **options):
    """The op itself in place of its fake function, which launches nothing."""
    ours = str(op).startswith("resae::")
    return register_fake(op, implementations[op] if ours else function, **options)


def tensor(data, *, device=None, **options):
    """`torch.tensor`, which a device without memory does not have."""
    return new_tensor(data, device="cpu", **options).to(device or torch.empty(0).device)


torch.library.Library.impl = impl
torch.library.register_fake = register_implementation
torch.tensor = tensor

from resae_kernels.triton.runtime import Kernel  # noqa: E402  (after the ops' registration is replaced)

reached: set[str] = set()
"""Tests that have launched a kernel."""
running = ""


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def launch(kernel: Kernel, grid: Any):  # noqa: ARG001
    def run(*arguments: Any, **options: Any) -> None:
        for one in tensors((*arguments, *options.values())):
            if one.device.type != GPU:
                raise RuntimeError(f"{kernel.__name__} was launched on {one.device} tensors")
        reached.add(running)

    return run


Kernel.__getitem__ = launch  # type: ignore[method-assign]
WRONG = re.compile("needs a CUDA device|same device|move one so that both|was launched on")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def launches(item: pytest.Item) -> bool:
    """True if the test launches kernels."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "implementation" in parameters:
        return parameters["implementation"] == "triton"
    return "device" in item.fixturenames


def pytest_collection_modifyitems(config, items) -> None:
    """Keep one case of each kernel test: its cases make their inputs alike."""
    chosen = {(i.path, i.originalname): i for i in reversed(items) if launches(i)}.values()
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    global running
    running = pyfuncitem.nodeid
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return (yield)
    except BaseException as error:
        wrong = next((e for e in chain(error) if WRONG.search(str(e))), None)
        if wrong is not None:
            raise AssertionError(f"not on the GPU: {wrong}") from error
        return True  # it has read a value


def pytest_sessionstart() -> None:
    settings.register_profile("stand-in", settings(), max_examples=1, phases=[Phase.generate])
    settings.load_profile("stand-in")


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{len(reached)} tests launched a kernel")
