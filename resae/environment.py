"""Where a result was measured: versions and hardware, written into every report."""

import platform
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, processor or GPU, and threads; JSON types only."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "resae": version("resae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }
