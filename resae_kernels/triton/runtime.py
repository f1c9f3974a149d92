"""Triton, imported at the first launch of a kernel, and the options of every launch."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch


class Kernel:
    """A Triton kernel that imports Triton when it is first launched.

    The import takes a tenth of the time of importing torch, and on a CPU no kernel is launched.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__ = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        return self.load()[grid]

    def load(self) -> Any:
        """The kernel as `triton.jit` makes it.

        Triton looks names up among the globals of a kernel: its module gets the real `triton`,
        `tl` and all its kernels at once, and later launches find those.
        """
        names = self.function.__globals__
        if names[self.__name__] is self:
            kernels = {name: value for name, value in names.items() if isinstance(value, Kernel)}
            used = self._used()
            loaded = {
                name: used[self.compiler].jit(kernel.function)
                if kernel.function.__globals__ is names
                else kernel.load()
                for name, kernel in kernels.items()
            }
            names.update(loaded, **used)
        return names[self.__name__]

    compiler = "triton"

    def _used(self) -> dict[str, Any]:
        """Modules and names that kernels use, for the globals of their module."""
        return {"triton": import_module("triton"), "tl": import_module("triton.language")}


class GluonKernel(Kernel):
    """A kernel in Gluon, Triton's language of layouts, barriers and warps."""

    compiler = "gluon"

    def _used(self) -> dict[str, Any]:
        gluon = "triton.experimental.gluon"
        hopper = import_module(f"{gluon}.language.nvidia.hopper")
        # Triton 3.9 has taken the earlier name away, and 3.6 does not know the later one.
        name = "async_load" if hasattr(hopper.tma, "async_load") else "async_copy_global_to_shared"
        return {
            "gluon": import_module(gluon),
            "gl": import_module(f"{gluon}.language"),
            "tl": import_module("triton.language"),
            "hopper": hopper,
            "blackwell": import_module(f"{gluon}.language.nvidia.blackwell"),
            "async_load": getattr(hopper.tma, name),
        }


class _Lazy:
    """A module that is imported when anything is asked for but what stands in for it here."""

    def __init__(self, module: str, **stand_ins: Any):
        self._module = module
        vars(self).update(stand_ins)

    def __getattr__(self, name: str) -> Any:
        found = vars(self)[name] = getattr(import_module(self._module), name)
        return found


triton: Any = _Lazy("triton", jit=Kernel)
gluon: Any = _Lazy("triton.experimental.gluon", jit=GluonKernel)
gl: Any = _Lazy("triton.experimental.gluon.language")
hopper: Any = _Lazy("triton.experimental.gluon.language.nvidia.hopper")
blackwell: Any = _Lazy("triton.experimental.gluon.language.nvidia.blackwell")
async_load: Any = None
"""A load by the tensor memory accelerator, put into the modules of Gluon kernels."""
if TYPE_CHECKING:
    import triton.language as tl  # pyright: ignore[reportUnusedImport]  (for the kernels)
else:
    tl = _Lazy("triton.language", constexpr="constexpr")  # Triton knows an annotation by this word


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def is_interpreted() -> bool:
    """Do kernels run in Triton's interpreter, on CPU tensors? (Tests do.)"""
    return triton.knobs.runtime.interpret


def launch_options(
    num_warps: int, num_stages: int = 3, registers: int | None = None
) -> dict[str, Any]:
    """Options of every launch. Fusion is named since Triton's default changes with its versions.

    With `registers` the assembler may use as many per thread; it then orders loads for latency,
    where of itself it would put each load next to its use to save registers.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers is not None and not torch.version.hip:  # no such option there
        options["maxnreg"] = registers
    return options
