"""Compile `native.c`: run by `pip install` (hatchling's build hook), or by hand as a script.

The library has a plain C interface and is loaded by ctypes: one wheel serves every version of
Python and torch. Without a C compiler, or on another processor than x86-64, the package is built
without it and encodes by torch's own operations.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "native.c"
LIBRARY = HERE / "_native.so"
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fvisibility=default"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mpopcnt"),
)


def source_version() -> int:
    """Checksum of the source: a library built from another one is not loaded."""
    return zlib.crc32(SOURCE.read_bytes())


def compile_library() -> str | None:
    """Write `_native.so` next to its source; returns the reason if that is impossible, or None."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"native.c is for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "no C compiler (cc, gcc or clang) was found"
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        objects, built = Path(folder, "native.o"), Path(folder, LIBRARY.name)
        define = f"-DSOURCE_VERSION={source_version()}u"
        # Not linked with an OpenMP runtime: torch has loaded one, and shares its threads.
        steps = (
            [compiler, *FLAGS, define, "-c", str(SOURCE), "-o", str(objects)],
            [compiler, "-shared", str(objects), "-o", str(built), "-lm"],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(step)} failed:\n{done.stderr[-2000:]}"
        built.replace(LIBRARY)
    return None


if __name__ == "__main__":
    sys.exit(compile_library())
else:
    try:
        from hatchling.builders.hooks.plugin.interface import (  # pyright: ignore[reportMissingImports]
            BuildHookInterface,
        )
    except ModuleNotFoundError:
        pass
    else:

        class NativeBuildHook(BuildHookInterface):  # pyright: ignore[reportUntypedBaseClass]
            """Adds the compiled library to the wheel where it can be built."""

            def initialize(self, version: str, build_data: dict[str, Any]) -> None:
                del version
                if self.target_name != "wheel":
                    return
                reason = compile_library()
                if reason is not None:
                    LIBRARY.unlink(missing_ok=True)
                    self.app.display_warning(
                        f"resae_kernels is built without its CPU library: {reason}"
                    )
                    return
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-linux_{platform.machine()}"
                # The package is a folder of the project `resae`, and the whole of `resae-kernels`.
                library = LIBRARY.relative_to(Path(self.root).resolve())
                build_data["artifacts"].append(f"/{library.as_posix()}")
