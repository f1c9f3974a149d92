"""The process that a result was measured in: versions and hardware, its allocator."""

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `malloc.h`."""
KEPT_BYTES = 1 << 28


def environment() -> dict[str, Any]:
    """Versions, processor or GPU, and threads; JSON types only."""
    import torch  # takes seconds, and every command, `--help` too, sets up the allocator

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "resae": _version("resae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB that tensors leave, for the tensors after them.

    By itself it gives blocks of some megabytes back to the system as they are freed, and gets them
    again page by page: a tenth of a training run on a CPU. Other libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def _version(package: str) -> str | None:
    """None for what is run from its source tree, or absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
