"""What the ops share before any work is launched: Triton where there is one, the choice of
implementation, the tiles of the kernels, argument checks in one wording, op registration.

Every message says what, got, expected, and what to do, in the names of the public arguments.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor


class Kernel:
    """A Triton kernel that imports Triton when it is first launched.

    The import takes a tenth of the time of importing torch, and on a CPU no kernel is launched.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__name__ = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        return self.load()[grid]

    def load(self) -> Any:
        """The kernel as `triton.jit` makes it.

        Triton looks names up among the globals of a kernel: its module gets the real `triton`,
        `tl` and all its kernels at once, and later launches find those.
        """
        names = self.function.__globals__
        if names[self.__name__] is self:
            real = import_module("triton")
            kernels = {name: value for name, value in names.items() if isinstance(value, Kernel)}
            loaded = {
                name: real.jit(kernel.function)
                if kernel.function.__globals__ is names
                else kernel.load()
                for name, kernel in kernels.items()
            }
            names.update(loaded, triton=real, tl=import_module("triton.language"))
        return names[self.__name__]


class _Lazy:
    """A module that is imported when anything is asked for but what stands in for it here."""

    def __init__(self, module: str, **stand_ins: Any):
        self._module = module
        vars(self).update(stand_ins)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


triton: Any = _Lazy("triton", jit=Kernel)
if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = _Lazy("triton.language", constexpr="constexpr")  # Triton knows an annotation by this word

LIBRARY = torch.library.Library("resae", "DEF")
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Default bound on what an op holds at once of tokens × latents, by device type: about a CPU's
last-level cache; on a GPU thousands of rows, so that a dictionary is not read again for every few
of them."""


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define `resae::<schema>` with one implementation for every device and its fake function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resae::{name}", fake, lib=LIBRARY)


def workspace_bytes(tensor: Tensor) -> int:
    """The bound on the tensor's device."""
    return WORKSPACE_BYTES.get(tensor.device.type, WORKSPACE_BYTES["cuda"])


def implementation_for(op: str, tensor: Tensor, implementation: str | None) -> str:
    """`torch` or `triton`: as asked, or by the device of the input (CUDA: triton)."""
    if implementation is None:
        return "triton" if tensor.is_cuda else "torch"
    if implementation not in ("torch", "triton"):
        raise ValueError(
            f"{op}: implementation={implementation!r}, expected 'torch', 'triton' or None "
            f"(by device)"
        )
    if implementation == "triton" and not find_spec("triton"):  # it has wheels for Linux only
        raise ValueError(
            f"{op}: implementation='triton', but Triton is not installed; pip install it"
        )
    if implementation == "triton" and tensor.device.type == "cpu" and not _interpreted():
        raise ValueError(
            f"{op}: implementation='triton' needs a CUDA device, the input is on cpu; move it, or "
            f"pass 'torch'"
        )
    return implementation


def _interpreted() -> bool:
    """Do kernels run in Triton's interpreter, on CPU tensors? (Tests do.)"""
    return triton.knobs.runtime.interpret


# -- tiles -----------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """A tile, and what speaks for it."""

    tile: Any
    """A named tuple of integers."""
    measured: str | None
    """Device and date; None: chosen from ahead-of-time compilation, not yet measured."""


class TileTable(NamedTuple):
    """The tiles of one kernel."""

    default: Chosen
    alternatives: tuple[Any, ...]
    """What else `resae tune` tries; `tests/static_gate.py` compiles each of them."""
    classes: Mapping[str, Chosen] = MappingProxyType({})
    """By device class (`sm_90`), where the default is not the choice."""

    def of(self, device_class: str) -> Chosen:
        return self.classes.get(device_class, self.default)

    def candidates(self, device_class: str) -> tuple[Any, ...]:
        """Without repetition, the choice for this class first."""
        chosen = self.of(device_class).tile
        return tuple(dict.fromkeys((chosen, self.default.tile, *self.alternatives)))


TILES: dict[str, TileTable] = {}
"""By kernel; every module with kernels adds its own."""

_forced: dict[str, Any] = {}


def tile(kernel: str, device: torch.device) -> Any:
    """The tile to launch `kernel` with."""
    return _forced.get(kernel) or tile_in_force(kernel, device)[0].tile


@cache
def tile_in_force(kernel: str, device: torch.device) -> tuple[Chosen, str]:
    """The user's own choice for this device, else that of its class, else the default; and which
    of these it is."""
    tuned = _tuned(device_name(device))
    if kernel in tuned:
        return tuned[kernel], "tuned"
    name = device_class(device)
    return TILES[kernel].of(name), name if name in TILES[kernel].classes else "default"


def sizes(tile: Any) -> str:
    """Short, for a name: `8/512/1`."""
    return "/".join(map(str, tile))


@contextmanager
def forced_tiles(tiles: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these kernels are launched with these tiles, whatever is in force."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_class(device: torch.device) -> str:
    """`sm_90` and the like; `other` for what is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tiles_file() -> Path:
    """Where `resae tune` keeps what it measured."""
    return Path.home() / ".cache" / "resae" / "tiles.json"


def stored_tiles() -> dict[str, dict[str, Any]]:
    """The content of the user's file, by device name; empty where there is none."""
    path = tiles_file()
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"tiles: {path} is not valid JSON ({error}); remove it, then `resae tune` again"
        ) from None
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise ValueError(
            f"tiles: {path} has no object per device; remove it, then `resae tune` again"
        )
    return stored


@cache
def _tuned(name: str) -> dict[str, Chosen]:
    """By kernel, what the user's file holds for a device. Read once, at the first launch."""
    entry = stored_tiles().get(name)
    if entry is None:
        return {}
    where = f"tiles: {tiles_file()}, device {name!r}"
    remedy = "run `resae tune` again"
    tiles = entry.get("tiles")
    if not isinstance(tiles, dict) or not isinstance(entry.get("date"), str):
        raise ValueError(f"{where}: expected a date and an object of tiles; {remedy}")
    chosen = {}
    for kernel, fields in tiles.items():
        if kernel not in TILES:
            raise ValueError(
                f"{where}: unknown kernel {kernel!r}, expected {', '.join(TILES)}; {remedy}"
            )
        table = TILES[kernel]
        others = (choice.tile for choice in table.classes.values())
        known = {t: t._asdict() for t in (table.default.tile, *table.alternatives, *others)}
        tile = next((t for t, its_fields in known.items() if its_fields == fields), None)
        if tile is None:
            raise ValueError(
                f"{where}: unknown tile {fields} of {kernel}, expected one of "
                f"{', '.join(map(str, known))}; {remedy}"
            )
        chosen[kernel] = Chosen(tile, measured=f"{name}, {entry['date']}")
    return chosen


def forget_tiles() -> None:
    """Look tiles up anew: the user's file has changed."""
    _tuned.cache_clear()
    tile_in_force.cache_clear()


def launch_options(num_warps: int, num_stages: int = 3) -> dict[str, Any]:
    """Of every launch. Fusion is named since Triton's default changes with its versions."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


# -- compilation ahead of time ---------------------------------------------------------------------


class AotCase(NamedTuple):
    """A kernel as it is launched, to be compiled ahead of time (`tests/static_gate.py`)."""

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    """Type of each argument that is no constexpr: `*bf16:16`, `i32`, or a tuple of such. `:16` says
    that the launcher finds it divisible by 16: a pointer's address, a size."""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    expect: Mapping[str, int | bool]
    """What the machine code must show, in the words of `tests/static_gate.py`."""
    architectures: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")


# -- arguments -------------------------------------------------------------------------------------


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected one of float32, float64, bfloat16, "
            f"float16; convert it first"
        )


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must have the dtype and device of `like`."""
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, {like_name} has {like.dtype}; "
            f"convert one so that both agree"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {like_name} on {like.device}; "
            f"move one so that both agree"
        )


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)} ({why})"
        )


def check_codes(op: str, acts: Tensor, indices: Tensor, at: str = "") -> None:
    """`acts` and `indices` must be the two halves of one code."""
    check_floating(op, f"acts{at}", acts)
    if acts.ndim == 0:
        raise ValueError(f"{op}: acts{at} has shape [], expected [..., k]")
    if indices.dtype != torch.int64:
        raise TypeError(
            f"{op}: indices{at} has dtype {indices.dtype}, expected int64; use indices.long()"
        )
    check_shape(op, f"indices{at}", indices, tuple(acts.shape), f"the shape of acts{at}")
    if indices.device != acts.device:
        raise ValueError(
            f"{op}: indices{at} is on {indices.device}, acts{at} on {acts.device}; "
            f"move one so that both agree"
        )


def autocasts(device: str) -> bool:
    """Is autocast on for this device type? Some, as meta, know no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors (but float64) to the autocast dtype of the first one's device."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors)
