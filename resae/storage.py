"""Files that are whole or absent: everything is written under a temporary name and then renamed;
and a lock that lets one process at a time write into a folder."""

import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resae_kernels import files
from resae_kernels.files import PARTIAL

log = logging.getLogger(__name__)

LOCK = ".lock"
"""File in a folder that a process is writing into: its process id, host and start time."""
LARGEST_JSON = 64 << 20
"""Bytes of the largest JSON file that is read."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and rename its result to `path`; on any error `path` is untouched.

    Raises:
        OSError: it cannot be written, such as on a full disk; the message names the file.
    """

    def guarded(temporary: Path) -> None:
        try:
            write(temporary)
        except SafetensorError as error:  # its own, such as on a full disk
            raise OSError(str(error)) from error

    files.write_atomically(path, guarded)


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


def is_unused(folder: Path) -> bool:
    """True for a folder that is absent or empty, but for a lock and what killed writes left."""
    if not folder.exists():
        return True
    return all(path.name == LOCK or path.name.endswith(PARTIAL) for path in folder.iterdir())


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Make the folder and hold its lock, so that no other process writes there.

    The operating system keeps the lock and releases it when the process ends, however that happens:
    a lock file that a killed process or an earlier boot left behind holds nobody up. A folder that
    nothing was written into is removed again.

    Raises:
        BlockingIOError: another process is writing there; the message names it.
        OSError: the folder cannot be made or written.
    """
    path = folder.resolve() / LOCK
    made = [parent for parent in path.parents if not parent.exists()]
    descriptor = _open_locked(folder, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _open_locked(folder: Path, path: Path) -> int:
    """A descriptor of the lock file that holds its lock as long as it is open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(
            f"cannot write into {folder} ({error}); choose another folder, or look for permissions"
        ) from error
    if not _take(descriptor, folder):
        os.close(descriptor)
        raise BlockingIOError(
            f"{_holder(path)} is writing into {folder}; wait for it, or choose another folder"
        )
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            return descriptor
    os.close(descriptor)  # its holder removed it while we opened it
    return _open_locked(folder, path)


def _take(descriptor: int, folder: Path) -> bool:
    """Lock an open file, if nobody has."""
    try:
        import fcntl  # POSIX alone has it

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ModuleNotFoundError, OSError) as error:
        if isinstance(error, BlockingIOError):
            return False
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): start no second run into it", folder, error)
    return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']},"
    except (OSError, ValueError, KeyError):  # gone, or about to be written
        return "another process"


def save_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def load_json(path: Path, what: str) -> Any:
    """The content of a JSON file; `what` names it in the error."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; is the directory the right one?")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{what}: {path} has {size} bytes, expected at most {LARGEST_JSON}")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError(f"{what}: {path} is nested too deep; restore the file") from None
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
