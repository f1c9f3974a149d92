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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and rename its result to `path`; on any error `path` is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
