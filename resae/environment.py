"""The process that a result was measured in: versions and hardware, its allocator."""

import ctypes
import json
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Option of `mallopt`, from glibc's `malloc.h`."""
KEPT_BYTES = 1 << 28


def environment() -> dict[str, Any]:
    """Versions, processor or GPU, and threads; JSON types only."""
    import torch  # takes seconds, and every command, `--help` too, sets up the allocator

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "resae": installed_version("resae"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "datasets": installed_version("datasets"),
        "safetensors": installed_version("safetensors"),
        "triton": installed_version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def processor() -> str | None:
    """Model name, and what there is of the instructions that the ops gain by; None where Linux does
    not tell."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return None
    flags = facts.get("flags", "").split()
    wanted = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return ", ".join([facts["model name"], *(flag for flag in wanted if flag in flags)])


def commit() -> str | None:
    """The commit of the resae that runs, with `-dirty` where its files were changed since; None
    where it was installed without one."""
    source = Path(__file__).resolve().parents[1]
    if (source / ".git").exists():
        command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
            )
            return done.stdout.strip()
    with suppress(PackageNotFoundError, KeyError):
        installed_from = distribution("resae").read_text("direct_url.json")
        return json.loads(installed_from or "{}")["vcs_info"]["commit_id"]
    return None


def find_device(name: str) -> str:
    """`auto` → `cuda` where there is a GPU, otherwise `cpu`; other names as they are.

    Raises:
        ValueError: a GPU that is not there.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if there else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= there:
        raise ValueError(
            f"device {name!r}: torch {torch.__version__} finds {there} GPUs; choose cpu"
            + (f" or cuda:0 to cuda:{there - 1}" if there else ", or look for driver and build")
        )
    return name


def describe_device(name: str) -> str:
    """`cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    import torch

    if name.startswith("cuda"):
        return f"{name} ({torch.cuda.get_device_name(name)})"
    return f"{name} ({torch.get_num_threads()} threads)"


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB that tensors leave, for the tensors after them.

    By itself it gives blocks of some megabytes back to the system as they are freed, and gets them
    again page by page: a tenth of a training run on a CPU. Other libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def installed_version(package: str) -> str | None:
    """None for what is run from its source tree, or absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
