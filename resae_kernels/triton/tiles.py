"""Tiles of the kernels: the tables that come with the package, and those that a user tuned.

A tile is a named tuple of integers and names: the amount of work that one program of a kernel does
at a time, and the variant of the kernel. The type of a tile names its kernel.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from resae_kernels.triton import runtime
from resae_kernels.triton.runtime import tl


class TileChoice(NamedTuple):
    """A tile, and the measurement that chose it."""

    tile: Any
    """A named tuple of integers and names."""
    measured: str | None
    """Device and date; None: chosen from ahead-of-time compilation, not yet measured."""


class TileTable(NamedTuple):
    """The tiles of one kernel."""

    default: TileChoice
    alternatives: tuple[Any, ...]
    """Other tiles that `resae tune` tries; `tests/static_gate.py` compiles each of them."""
    classes: Mapping[str, TileChoice] = MappingProxyType({})
    """Choices of device classes (`sm_90`) that differ from the default."""
    class_alternatives: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    """Other tiles that `resae tune` tries on one device class only: too large for the others."""

    def of(self, device_class: str) -> TileChoice:
        return self.classes.get(device_class, self.default)

    def candidates(self, device_class: str) -> tuple[Any, ...]:
        """Without repetition, the choice for this class first."""
        chosen = self.of(device_class).tile
        of_class = self.class_alternatives.get(device_class, ())
        return tuple(dict.fromkeys((chosen, self.default.tile, *self.alternatives, *of_class)))


class SmallGemmTile(NamedTuple):
    """Latents and dimensions of `weight` that matrix instructions multiply at a time."""

    latents: int
    dimensions: int
    num_stages: int
    num_warps: int
    precision: str = "ieee"
    """Multiplication in fp32: `ieee` on CUDA cores, `tf32x3` three times on tensor cores."""
    residual_launch: int = 0
    """1: a launch before the GEMM forms the residual once; 0: every program forms it."""
    programs_per_multiprocessor: int = 0
    """Programs that stay resident and take block after block of latents; 0: one program a block."""


class GemvTile(NamedTuple):
    """Latents and dimensions of `weight` that a program holds in registers at a time."""

    latents: int
    dimensions: int
    num_warps: int
    num_stages: int = 1  # pipelined loads would pass through shared memory
    residual_launch: int = 0
    """1: a launch before the GEMM forms the residual once; 0: every program forms it."""


class ScreenTile(NamedTuple):
    """Latents and dimensions of an 8-bit copy that matrix instructions multiply at a time."""

    latents: int
    dimensions: int
    num_stages: int
    num_warps: int


class GemmTile(NamedTuple):
    """Tokens, latents and dimensions that a program of the GEMM of more than 16 tokens multiplies
    at a time. All zero: the library's GEMM, and the group maxima by a pass over its scores."""

    tokens: int
    latents: int
    dimensions: int
    num_stages: int
    num_warps: int
    descriptors: int
    """1: blocks are loaded by the tensor memory accelerator; 0: by pointers."""
    persistent: int
    """1: one program per multiprocessor takes block after block; 0: one program a block."""


class SpecialisedGemmTile(NamedTuple):
    """Tokens, latents and dimensions that a program of the warp-specialised GEMM multiplies at a
    time, and the number of such blocks in shared memory. One warp more than `num_warps` loads, and
    with tensor memory (`sm_100`) one more multiplies."""

    tokens: int
    latents: int
    dimensions: int
    buffers: int
    num_warps: int
    device_class: str


LIBRARY_GEMM = GemmTile(0, 0, 0, 0, 0, 0, 0)


class RowTile(NamedTuple):
    """Consecutive entries of a row that one program reads."""

    columns: int
    num_warps: int


class SelectTile(NamedTuple):
    """Scores that the program that selects from one row holds at a time."""

    keys_per_thread: int
    """Group maxima, or members of the best groups, that a thread holds."""
    columns: int
    """Scores at a time whose group maxima the program takes itself; 0: a pass before it does."""


class GatherTile(NamedTuple):
    """Number of gathered rows that a program loads at a time, and the part of each."""

    rows: int
    row_bytes: int
    num_warps: int

    def constants(self, D: int, dtype: torch.dtype) -> dict[str, Any]:
        """Compile-time constants of every kernel that gathers."""
        return {
            "D": D,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "BD": min(self.row_bytes // dtype.itemsize, runtime.next_power_of_2(D)),
        }

    @property
    def loads(self) -> int:
        """128-bit loads of a thread for one pass over the tile."""
        return self.rows * self.row_bytes // (self.num_warps * 512)

    def options(self, registers: int | None = None) -> dict[str, Any]:
        # One stage: pipelined loads would pass through shared memory.
        return runtime.launch_options(self.num_warps, num_stages=1, registers=registers)


GATHER_REGISTERS = 96
"""Registers of a thread that gathers: enough to issue all loads of a tile before the first of them
is used. From ahead-of-time compilation, not measured."""

_NARROW = SmallGemmTile(64, 64, num_stages=4, num_warps=4)
_WIDE = SmallGemmTile(64, 128, num_stages=4, num_warps=4)
_IEEE = SmallGemmTile(64, 32, num_stages=4, num_warps=8)
# Its three products per step are added to the sum outside the tensor cores, which truncate: with
# the longer step there are fewer such additions, and the error stays below plain torch's.
_TF32X3 = SmallGemmTile(64, 64, num_stages=3, num_warps=4, precision="tf32x3")

# To form the residual of 16 tokens in every program takes half as many bytes as the weight; formed
# once, the GEMM takes 48 registers on sm_90 instead of 72. One or two tokens are not worth the
# launch.
_ONCE = {"residual_launch": 1}


def _on_tensor_cores(tile: SmallGemmTile) -> Mapping[str, TileChoice]:
    """The same choice for every class whose shared memory holds wide tiles."""
    return dict.fromkeys(("sm_80", "sm_90", "sm_100"), TileChoice(tile, measured=None))


# A warp loads 512 bytes at once. Where a row's part is 512 bytes a warp, each thread holds its
# columns of all rows: as many loads in flight as rows, and a sum that crosses no thread.
TILES: dict[str, TileTable] = {
    "decode": TileTable(
        default=TileChoice(GatherTile(rows=8, row_bytes=512, num_warps=1), measured=None),
        alternatives=(
            GatherTile(rows=4, row_bytes=512, num_warps=1),
            GatherTile(rows=8, row_bytes=1024, num_warps=2),
        ),
    ),
    "decode_few": TileTable(
        default=TileChoice(GatherTile(rows=64, row_bytes=128, num_warps=4), measured=None),
        alternatives=(
            GatherTile(rows=64, row_bytes=64, num_warps=4),
            GatherTile(rows=32, row_bytes=128, num_warps=4),
        ),
    ),
    "sddmm": TileTable(
        default=TileChoice(GatherTile(rows=8, row_bytes=512, num_warps=1), measured=None),
        alternatives=(
            GatherTile(rows=16, row_bytes=512, num_warps=2),
            GatherTile(rows=16, row_bytes=512, num_warps=4),
        ),
    ),
    "scatter_outer": TileTable(
        default=TileChoice(GatherTile(rows=8, row_bytes=1024, num_warps=2), measured=None),
        alternatives=(
            GatherTile(rows=8, row_bytes=512, num_warps=1),
            GatherTile(rows=4, row_bytes=1024, num_warps=2),
        ),
    ),
    "gemm_2_tokens_16bit": TileTable(
        default=TileChoice(_NARROW, measured=None),
        classes=_on_tensor_cores(_WIDE),
        alternatives=(
            GemvTile(32, 128, num_warps=4),
            SmallGemmTile(64, 128, num_stages=3, num_warps=4),
            _WIDE._replace(programs_per_multiprocessor=2),
        ),
    ),
    "gemm_2_tokens_32bit": TileTable(
        # One LDS.128 and no matrix instruction per 32 FFMA, where ieee tiles take one per 4.
        default=TileChoice(GemvTile(32, 128, num_warps=4), measured=None),
        alternatives=(_TF32X3, _IEEE),
    ),
    "gemm_16_tokens_16bit": TileTable(
        default=TileChoice(_NARROW._replace(**_ONCE), measured=None),
        classes=_on_tensor_cores(_WIDE._replace(**_ONCE)),
        alternatives=(
            _WIDE,
            SmallGemmTile(128, 64, num_stages=4, num_warps=4)._replace(**_ONCE),
            _WIDE._replace(programs_per_multiprocessor=2, **_ONCE),
        ),
    ),
    "gemm_16_tokens_32bit": TileTable(
        default=TileChoice(_TF32X3._replace(**_ONCE), measured=None),
        alternatives=(
            _TF32X3._replace(dimensions=32, num_stages=4, **_ONCE),
            _TF32X3._replace(programs_per_multiprocessor=4, **_ONCE),
            _IEEE,
        ),
    ),
    "screen": TileTable(
        default=TileChoice(ScreenTile(64, 128, num_stages=4, num_warps=4), measured=None),
        alternatives=(
            ScreenTile(128, 128, num_stages=3, num_warps=4),
            ScreenTile(64, 64, num_stages=6, num_warps=4),
        ),
    ),
    # Static reason for the library (not measured): its GEMM overlaps loads, products and stores by
    # warp specialisation, which Triton's compiler does not do for this epilogue. In Gluon it is
    # written out; no device has run that.
    "gemm_many_tokens_16bit": TileTable(
        default=TileChoice(LIBRARY_GEMM, measured=None),
        alternatives=(GemmTile(128, 128, 32, 4, 4, descriptors=0, persistent=0),),
        class_alternatives={
            "sm_80": (GemmTile(128, 256, 32, 4, 8, descriptors=0, persistent=0),),
            "sm_90": (
                GemmTile(128, 256, 64, 3, 8, descriptors=0, persistent=0),
                GemmTile(128, 256, 64, 3, 8, descriptors=1, persistent=0),
                GemmTile(128, 256, 64, 3, 8, descriptors=1, persistent=1),
                SpecialisedGemmTile(128, 256, 64, 4, num_warps=8, device_class="sm_90"),
            ),
            # Accumulators of 256 latents pass through registers at the end, and would spill, but
            # for the specialised GEMM, which takes them from tensor memory strip by strip.
            "sm_100": (
                GemmTile(128, 128, 64, 4, 8, descriptors=1, persistent=0),
                GemmTile(128, 128, 64, 4, 8, descriptors=1, persistent=1),
                SpecialisedGemmTile(128, 256, 64, 4, num_warps=4, device_class="sm_100"),
            ),
        },
    ),
    "group_max": TileTable(
        default=TileChoice(RowTile(4096, num_warps=4), measured=None),
        alternatives=(RowTile(2048, num_warps=2), RowTile(4096, num_warps=8)),
    ),
    # Static reason for a pass of its own (not measured): it reads a row in as many programs as its
    # strips, at full occupancy; the selection's registers leave it a quarter of the warps.
    "select": TileTable(
        default=TileChoice(SelectTile(keys_per_thread=16, columns=0), measured=None),
        alternatives=(
            SelectTile(keys_per_thread=8, columns=0),
            SelectTile(keys_per_thread=16, columns=4096),
        ),
    ),
    "residual": TileTable(
        default=TileChoice(RowTile(1024, num_warps=4), measured=None),
        alternatives=(RowTile(512, num_warps=2), RowTile(2048, num_warps=8)),
    ),
}
"""Tiles of every kernel, by its name."""

_overrides: dict[str, Any] = {}


def tile(kernel: str, device: torch.device) -> Any:
    """The tile to launch `kernel` with."""
    return _overrides.get(kernel) or active_tile(kernel, device)[0].tile


@cache
def active_tile(kernel: str, device: torch.device) -> tuple[TileChoice, str]:
    """The user's tuned choice for this device, else that of its class, else the default; and its
    source: "tuned", the class, or "default"."""
    tuned = _tuned(device_name(device))
    if kernel in tuned:
        return tuned[kernel], "tuned"
    name = device_class(device)
    return TILES[kernel].of(name), name if name in TILES[kernel].classes else "default"


def sizes(tile: Any) -> str:
    """Short, for a name: `8/512/1`."""
    return "/".join(map(str, tile))


@contextmanager
def override_tiles(tiles: Mapping[str, Any]) -> Generator[None]:
    """Launch these kernels with these tiles inside the block, instead of the active ones."""
    before = dict(_overrides)
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_class(device: torch.device) -> str:
    """Compute capability as `sm_90`; `other` for any device but an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tiles_file() -> Path:
    """The user's file, in which `resae tune` stores the fastest tiles."""
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
def _tuned(name: str) -> dict[str, TileChoice]:
    """Tuned choice of each kernel for a device, from the user's file, which is read once."""
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
        names = (*table.classes, *table.class_alternatives, "other")
        known = {t: t._asdict() for name in names for t in table.candidates(name)}
        tile = next((t for t, its_fields in known.items() if its_fields == fields), None)
        if tile is None:
            raise ValueError(
                f"{where}: unknown tile {fields} of {kernel}, expected one of "
                f"{', '.join(map(str, known))}; {remedy}"
            )
        chosen[kernel] = TileChoice(tile, measured=f"{name}, {entry['date']}")
    return chosen


def reload_tiles() -> None:
    """Read the user's file again at the next launch: it has changed."""
    _tuned.cache_clear()
    active_tile.cache_clear()
