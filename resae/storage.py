"""Files that are whole or absent: everything is written under a temporary name and then renamed;
and a lock that lets one process at a time write into a folder.

What is read may come from anyone: JSON within limits, safetensors of finite numbers, and no link
out of the folder that is read. Whatever else a file holds is a ValueError of one line.
"""

import errno
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resae import strict_json
from resae_kernels import files
from resae_kernels.files import PARTIAL

log = logging.getLogger(__name__)

LOCK = ".lock"
"""File in a folder that a process is writing into: its process id, host and start time."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating types by their names in safetensors, and the bytes of a number."""
TENSOR_DTYPES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""All types of tensors that are read."""
MOST_HEADER_BYTES = 1 << 22
"""Largest header of a safetensors file, 4 MiB: a checkpoint of 100 layers has a tenth of it."""
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


def load_json(path: Path, what: str, most_bytes: int = strict_json.MOST_BYTES) -> Any:
    """The content of a JSON file; `what` names it in the error. Limits as of `strict_json`.

    Raises:
        FileNotFoundError: no regular file.
        ValueError: not JSON within the limits, or a link that leaves its folder.
    """
    require_file(path, what)
    return strict_json.read(path, f"{what}: {path}", most_bytes)


def safe_file_name(name: str) -> bool:
    """True for the name of a file directly in a folder: no path, not hidden,
    of letters, digits, `_`, `-` and `.`."""
    return re.fullmatch(r"\w[\w.-]{0,199}", name, re.ASCII) is not None


def require_inside(path: Path, what: str) -> None:
    """Raise ValueError for a symbolic link that leads out of its own folder; those of the hub's
    cache, into the files of the same repository, are allowed."""
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    caches = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(root.resolve()) for root in (folder, *caches)):
        raise ValueError(
            f"{what}: {path} is a symbolic link to {target}, outside its folder; put the file "
            f"itself there"
        )


def require_file(path: Path, what: str) -> None:
    """Raise FileNotFoundError for what is no regular file, ValueError for a link that leaves its
    folder."""
    try:
        require_inside(path, what)
        there = path.is_file()
    except OSError as error:  # a circle of links, a name that is too long
        raise ValueError(f"{what}: {path} cannot be read ({error.strerror})") from None
    except RuntimeError:  # a circle of links, in Python 3.11
        raise ValueError(f"{what}: {path} is a symbolic link to itself") from None
    if not there:
        raise FileNotFoundError(f"{what}: no file {path}; is the directory the right one?")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, on the CPU, contiguous."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary))


class Header(NamedTuple):
    """Description of a safetensors file, which precedes its tensors."""

    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    """As safetensors names them, all in `TENSOR_DTYPES`."""
    metadata: dict[str, str]


def load_header(path: Path, what: str) -> Header:
    """Names, shapes, types and metadata of a safetensors file; no tensor is read.

    Raises:
        FileNotFoundError: no regular file.
        ValueError: damaged, with a header above 4 MiB, or with tensors of other types.
    """
    require_file(path, what)
    where = f"{what}: header of {path}"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(_truncated(path, what))
        if length > MOST_HEADER_BYTES:
            raise ValueError(
                f"{where} has {length:,} bytes, expected at most {MOST_HEADER_BYTES:,}"
            )
        try:
            text = file.read(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where} is not UTF-8; copy or download the file again") from None
    content = strict_json.require_fields(
        strict_json.parse(text, where), {"__metadata__": (dict, None)}, where
    )
    metadata = content.pop("__metadata__", None) or {}
    strict_json.require_fields(metadata, dict.fromkeys(metadata, str), f"{where}: __metadata__")
    for name, tensor in content.items():
        named = f"{where}: {strict_json.brief(name)}"
        strict_json.require_fields(tensor, {"dtype": str, "shape": [int]}, named)
        if tensor["dtype"] not in TENSOR_DTYPES:
            raise ValueError(
                f"{named} is of type {strict_json.brief(tensor['dtype'])}, expected one of "
                f"{', '.join(TENSOR_DTYPES)}"
            )
        shape = tensor["shape"]
        if min(shape, default=0) < 0 or len(shape) > 8 or prod(max(1, n) for n in shape) >> 60:
            raise ValueError(f"{named} has shape {strict_json.brief(shape)}, which no tensor has")
    held = sum(TENSOR_DTYPES[t["dtype"]] * prod(t["shape"]) for t in content.values())
    if held != size - 8 - length:  # what is described is allocated before it is read
        raise ValueError(_truncated(path, what))
    return Header(
        {name: tensor["shape"] for name, tensor in content.items()},
        {name: tensor["dtype"] for name, tensor in content.items()},
        metadata,
    )


def load_tensors(path: Path, what: str, *, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `what` names it in the error.

    Args:
        finite: whether NaN and infinity are an error.

    Raises:
        FileNotFoundError: no regular file.
        ValueError: as of `load_header`, or a number that is not finite.
    """
    load_header(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_truncated(path, what, f" ({str(error)[:200]})")) from None
    for name, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(
                f"{what}: {path}: tensor {strict_json.brief(name)} holds NaN or infinity; train or "
                f"download it again"
            )
    return tensors


def _truncated(path: Path, what: str, reason: str = "") -> str:
    return (
        f"{what}: {path} ({path.stat().st_size} bytes) is truncated or not safetensors{reason}; "
        f"copy or download it again"
    )


def _is_finite(tensor: Tensor) -> bool:
    """Without a mask as large as the tensor."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() & most.isfinite())
