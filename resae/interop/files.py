"""Bounded reading of files from strangers: JSON, safetensors, npz, and pickles of tensors alone.

Every function raises FileNotFoundError or ValueError, and asks for no more memory than a small
multiple of the file's size: sizes that a header promises are held against the file first.
"""

import logging
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resae.storage import load_json, load_tensors, require_file
from resae.strict_json import brief, require_fields

log = logging.getLogger(__name__)

SCALE_OF_A_TOKEN = (
    "it divides each token by a scale of its own, by which decode has to multiply again; a code "
    "(acts, indices) does not carry that scale, so there is no form for it here"
)
"""Reason for the refusal of autoencoders that normalise every token."""

LARGEST_PICKLE = 8 << 20
"""Bytes of the part of a `.pt` file that is a program, tensors not counted."""
LARGEST_EXPANSION = 8
"""Times that a compressed archive may grow."""
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
GLOBALS |= {"torch._utils _rebuild_parameter", "torch Size"}
FLOATS = ("<f2", "<f4", "<f8")


def has(path: Path, *names: str) -> bool:
    """True if a folder has all of these files."""
    return path.is_dir() and all((path / name).is_file() for name in names)


def read_settings(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file."""
    file = path / name
    return require_fields(load_json(file, "SAE"), {}, f"SAE {file}")


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, whose library holds its header against its size."""
    file = path / name
    try:
        return load_tensors(file, "SAE", finite=False)
    except (RuntimeError, KeyError, TypeError, OverflowError) as error:  # dtypes torch lacks
        raise ValueError(f"SAE {file}: not readable as tensors ({error})") from None


def read_npz(file: Path) -> dict[str, Tensor]:
    """All arrays of an npz file, which have to be floating point."""
    require_file(file, "SAE")
    try:
        with zipfile.ZipFile(file) as archive:
            _require_bounded(file, archive)
            return {
                info.filename.removesuffix(".npy"): _read_npy(archive, info)
                for info in archive.infolist()
            }
    except FileNotFoundError:
        raise
    # Damaged archives raise errors of many kinds: BadZipFile, zlib.error, EOFError, struct.error …
    except Exception as error:
        raise ValueError(f"SAE {file}: not a readable npz ({_line(error)})") from None


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    with archive.open(info) as data:
        version = np.lib.format.read_magic(data)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{info.filename}: npy version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](data)
        if dtype.str not in FLOATS:
            raise ValueError(f"{info.filename}: dtype {dtype}, expected a floating one")
        promised = dtype.itemsize
        for size in shape:
            promised *= size
        left = info.file_size - data.tell()
        if any(size < 0 for size in shape) or promised != left:
            raise ValueError(
                f"{info.filename}: its header promises {promised} bytes, and {left} are there"
            )
        flat = np.frombuffer(bytearray(data.read()), dtype)
        return torch.from_numpy(flat.reshape(shape, order="F" if fortran else "C"))


def read_pickled_tensors(file: Path) -> dict[str, Any]:
    """The state dict of a `.pt` file: by `torch.load(weights_only=True)`, if the file names no
    function but those that make tensors."""
    require_file(file, "SAE")
    try:
        with zipfile.ZipFile(file) as archive:
            _require_bounded(file, archive)
            _require_plain_pickle(archive)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # A damaged pickle raises whatever its operations happen to meet.
    except Exception as error:
        raise ValueError(
            f"SAE {file}: not a readable state dict of tensors ({_line(error)})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"SAE {file}: holds {type(state).__name__}, expected a state dict")
    for name, t in state.items():
        # A view may repeat one number a million million times.
        if isinstance(t, Tensor) and (
            t.layout != torch.strided or t.numel() * t.element_size() > t.untyped_storage().nbytes()
        ):
            raise ValueError(f"SAE {file}: {name} is larger than its data")
    return state


def _require_bounded(file: Path, archive: zipfile.ZipFile) -> None:
    total = sum(info.file_size for info in archive.infolist())
    if total > LARGEST_EXPANSION * file.stat().st_size:
        raise ValueError(
            f"{file.stat().st_size} bytes expand to {total}, more than {LARGEST_EXPANSION} times"
        )


def _require_plain_pickle(archive: zipfile.ZipFile) -> None:
    programs = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
    if len(programs) != 1 or programs[0].file_size > LARGEST_PICKLE:
        raise ValueError(f"expected one data.pkl of at most {LARGEST_PICKLE} bytes")
    for operation, argument, _ in pickletools.genops(archive.read(programs[0])):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            raise ValueError(f"its pickle makes objects ({operation.name})")
        if operation.name == "GLOBAL":
            known = argument in GLOBALS or (
                str(argument).startswith("torch ") and str(argument).endswith("Storage")
            )
            if not known:
                raise ValueError(f"its pickle names {argument}, which no state dict needs")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# -- settings --------------------------------------------------------------------------------------


def setting(
    cfg: Mapping[str, Any], name: str, types: Any, where: object, default: Any = None
) -> Any:
    """A setting of the expected type; null counts as left out.

    Raises:
        ValueError: it has another type, or is out of bounds for a number.
    """
    value = cfg.get(name)
    if value is None:
        return default
    wrong = not isinstance(value, types) or (isinstance(value, bool) and types is not bool)
    if wrong or (isinstance(value, int) and abs(value) >= 2**31):
        shown = repr(value)
        raise ValueError(
            f"SAE {where}: {name} = {shown[:80]}, expected {getattr(types, '__name__', types)}"
        )
    return value


def required(cfg: Mapping[str, Any], name: str, types: Any, where: object) -> Any:
    """As `setting`, of one that has to be there."""
    value = setting(cfg, name, types, where)
    if value is None:
        raise ValueError(f"SAE {where}: its settings have no {name}")
    return value


def require_sizes(cfg: Mapping[str, Any], sizes: Mapping[str, int], where: object) -> None:
    """Raise ValueError for sizes in the settings that are not those of the tensors."""
    for name, size in sizes.items():
        if setting(cfg, name, int, where, size) != size:
            raise ValueError(
                f"SAE {where}: its settings say {name} = {cfg[name]}, its tensors {size}; restore "
                f"the files"
            )


def take(tensors: Mapping[str, Tensor], name: str, ndim: int, where: object) -> Tensor:
    """A tensor of a file.

    Raises:
        ValueError: it is not there, or has another number of dimensions.
    """
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"SAE {where}: no tensor {name}, only {', '.join(map(repr, tensors))[:300]}"
        )
    if tensor.ndim != ndim:
        raise ValueError(f"SAE {where}: {name} is {list(tensor.shape)}, expected {ndim} dimensions")
    return tensor


def refuse_others(tensors: Mapping[str, Any], known: set[str], where: object) -> None:
    """Raise ValueError for tensors that would be left out."""
    if others := sorted(tensors.keys() - known):
        raise ValueError(
            f"SAE {where}: has {', '.join(map(brief, others))[:300]}, which no kind of autoencoder "
            f"here takes into account"
        )


def warn_if_unset(threshold: float, where: object) -> None:
    """Log a warning if the threshold of a BatchTopK autoencoder is that from before training."""
    if threshold <= 0:
        log.warning(
            "SAE %s: its BatchTopK threshold is %g, as before training: every positive latent is "
            "active, also in its own library; train it until the threshold is set "
            "(dictionary_learning: step threshold_start_step), or set it before the import",
            where,
            threshold,
        )
