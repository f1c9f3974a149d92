"""Models stored as GGUF, the file format of llama.cpp.

transformers reads such a file as the weights of the folder it lies in. It dequantises every weight
to the dtype asked for: the model takes as much memory as an ordinary one of that dtype (4 bytes per
parameter in float32), and is as precise as the quantised file.
"""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read GGUF: the extra `gguf`."""


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a local path names, or the only one in a folder without `config.json`;
    None: the path names no GGUF model.

    Raises:
        ModuleNotFoundError: a GGUF model without the packages of the extra `gguf`.
        ValueError: a folder with several GGUF files, or a file that is not GGUF.
    """
    file = _found(Path(path))
    if file is None:
        return None
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(
                f"model {path!r}: {file.name} does not begin with 'GGUF'; copy or download it again"
            )
    missing = [name for name in PACKAGES if not find_spec(name)]
    if missing:
        raise ModuleNotFoundError(
            f"model {path!r} is a GGUF file, which needs {' and '.join(missing)}; "
            f"pip install 'resae[gguf]'"
        )
    return file


def _found(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"model {str(path)!r}: {len(files)} GGUF files ({', '.join(f.name for f in files)}), "
            f"expected one; name the file itself"
        )
    return files[0] if files else None
