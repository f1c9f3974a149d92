"""Files that are whole or absent: everything is written under a temporary name and then renamed."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial"
"""Ending of the temporary names."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and rename its result to `path`; on any error `path` is untouched.

    Raises:
        OSError: it cannot be written, such as on a full disk; the message names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # or a power failure could leave the name and no content
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path} ({error}); what was there before is untouched; look for free "
            f"space and permissions"
        ) from error


def require_writable(folder: Path) -> None:
    """Raise OSError unless files can be written into a folder, or into the nearest one above it
    that is there; nothing is made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, expected a folder; choose another")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(
            f"cannot write into {there} ({error.strerror}); choose another folder, or look for "
            f"permissions"
        ) from None


def remove_partial(folder: Path) -> None:
    """Remove what writes that were killed left in a folder and below; nobody may be writing."""
    for left_over in folder.rglob(f".*{PARTIAL}"):
        left_over.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def load_json(path: Path, what: str) -> Any:
    """The content of a JSON file; `what` names it in the error."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; is the directory the right one?")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{what}: {path} is not valid JSON ({error}); restore the file") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, on the CPU, contiguous."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary))


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `what` names it in the error."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; is the directory the right one?")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{what}: {path} ({path.stat().st_size} bytes) is truncated or not safetensors "
            f"({error}); copy or download it again"
        ) from None
