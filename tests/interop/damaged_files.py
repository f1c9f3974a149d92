"""Seeded damage to files, and what a reader may answer to it."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch

VALUES = [None, True, -1, 0, 1, 3, 2**31, 10**12, 1e308, "x", "nan", [], [[1]], {}, {"k": 2}]
"""What a setting may be replaced by."""


def damage(folder: Path, rng: random.Random, *, raw: bool = False) -> str:
    """Damage one file of a folder in one way, or (raw) only its bytes; returns what was done."""
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    kinds = [flip, truncate, splice]
    if not raw:
        kinds += {".json": [setting, deep], ".safetensors": [header] * 3}.get(file.suffix, [])
    kind = rng.choice(kinds)
    kind(file, rng)
    return f"{kind.__name__} of {file.name}"


def flip(file: Path, rng: random.Random) -> None:
    """One to eight bits, most often near the beginning, where headers are."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 8)):
        reach = len(data) if rng.random() < 0.3 else min(len(data), 600)
        if reach:
            data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    if file.suffix in (".pt", ".npz") and rng.random() < 0.5 and data:
        data[-rng.randrange(1, min(len(data), 600))] ^= 0xFF  # the directory is at the end
    file.write_bytes(bytes(data))


def truncate(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def splice(file: Path, rng: random.Random) -> None:
    """A piece of the file is put over another one, or random bytes are."""
    data = bytearray(file.read_bytes())
    size = rng.randint(1, 64)
    at, source = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[at : at + size] = (
        data[source : source + size] if rng.random() < 0.5 else rng.randbytes(size)
    )
    file.write_bytes(bytes(data))


def setting(file: Path, rng: random.Random) -> None:
    """A setting gets another value or goes."""
    content = json.loads(file.read_text())
    inner = content
    while True:
        name = rng.choice(sorted(inner)) if inner else "k"
        if isinstance(inner.get(name), dict) and inner[name] and rng.random() < 0.7:
            inner = inner[name]
        else:
            break
    if rng.random() < 0.2:
        inner.pop(name, None)
    else:
        inner[name] = rng.choice(VALUES)
    file.write_text(json.dumps(content))


def deep(file: Path, rng: random.Random) -> None:
    levels = rng.choice([10, 1000, 100_000])
    open_, close = rng.choice([("[", "]"), ('{"metadata":', "}")])
    file.write_text(open_ * levels + "1" + close * levels)


def header(file: Path, rng: random.Random) -> None:
    """A header that promises other shapes, dtypes and places than the data has."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    names = sorted(name for name in entries if name != "__metadata__")
    name = rng.choice(names)
    change = rng.randrange(4)
    if change == 0:
        entries[name]["shape"] = rng.choice([[10**12], [10**6, 10**6], [2**63], [-1], [0], []])
    elif change == 1:
        kinds = ["I64", "BOOL", "F8_E4M3", "F64", "BF16", "U16", "XX"]
        entries[name]["dtype"] = rng.choice(kinds)
    elif change == 2:
        entries[name]["data_offsets"] = [rng.randrange(10**6), rng.choice([0, 10**15])]
    else:
        entries[rng.choice(["../x", "W_skip", ""])] = entries.pop(name)
    new = json.dumps(entries).encode()
    length = rng.choice([len(new), len(new), 2**40, 2**64 - 1])
    file.write_bytes(length.to_bytes(8, "little") + new + data[8 + size :])


def answer(read, original: Path, copy: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a copy of a folder and read it: what was done, and `refused` or `read`. Raises
    AssertionError for any other answer."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    done = damage(copy, rng)
    if rng.random() < 0.2:
        done += f", {damage(copy, rng, raw=True)}"
    try:
        sae = read(copy)
    except (ValueError, FileNotFoundError) as error:
        if len(str(error)) > 2000:
            raise AssertionError(f"{done}: a long message") from error
        return done, "refused"
    except Exception as error:
        raise AssertionError(f"{done}: {type(error).__name__}: {error}") from error
    for t in sae.state_dict().values():
        assert bool(torch.isfinite(t.double()).all()), done
    return done, "read"


def npz(file: Path, shape: str, descr: str = "<f4", data: bytes = b"") -> None:
    """An npz whose array W_enc promises a shape."""
    import zipfile

    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    start = np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode("latin1")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", start + data)
