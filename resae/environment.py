"""Where a result was measured: versions and hardware, written into every report."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, processor or GPU, and threads; JSON types only."""
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


def _version(package: str) -> str | None:
    """None for what is run from its source tree, or absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
