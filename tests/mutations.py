"""Damage and malice for files of ours: seeded mutations of bytes, of JSON and of safetensors."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**62, 10**40, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "y" * 5_000, "none", "topk"),
    *([], {}, [[]], [1, "a"], {"a": {"b": []}}, [None], [2**70], ["..", "."], "blocks.0.hook_x"),
)
"""What stands in a file in place of something else."""


def mutated(content: bytes, suffix: str, random_: random.Random) -> bytes:
    """`content` of a file of this suffix with a change at a random place."""
    if suffix == ".json" and random_.random() < 0.7:
        return mutated_json(content, random_)
    if suffix == ".safetensors" and random_.random() < 0.7:
        return mutated_header(content, random_)
    return mutated_bytes(content, random_)


def mutated_bytes(content: bytes, random_: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random_.choice((1, 1, 3, 30))):
        at = random_.randrange(len(changed) + 1)
        way = random_.randrange(5)
        if way == 0 and changed:
            changed[at % len(changed)] = random_.randrange(256)
        elif way == 1:
            changed[at:at] = random_.randbytes(random_.randrange(1, 9))
        elif way == 2:
            del changed[at : at + random_.randrange(1, 99)]
        elif way == 3:
            changed[at : at + 8] = random_.choice(
                (b"\xff" * 8, b"\0" * 8, b'"', b"[", b"{" * 2_000)
            )
        else:
            del changed[at:]
    return bytes(changed)


def mutated_json(content: bytes, random_: random.Random) -> bytes:
    """One entry is replaced, removed, renamed, given twice or nested."""
    value = json.loads(content)
    places: list[tuple[dict | list, str | int]] = []

    def collect(node: object) -> None:
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                collect(node[key])

    collect(value)
    if not places:
        return json.dumps(random_.choice(VALUES)).encode()
    node, key = random_.choice(places)
    way = random_.randrange(8)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[random_.choice(("x", "..", "a\nb", "__metadata__"))] = node.pop(key)
    elif way == 2:
        return json.dumps(random_.choice(VALUES)).encode()
    elif way == 3:
        text = json.dumps(value)
        return text.replace(
            "{", '{"model": 1, "model": 2, "dtype": "F32", "dtype": "F64",', 1
        ).encode()
    elif way == 4:
        node[key] = "deep"
        deep = "[" * 5_000 + "]" * 5_000
        return json.dumps(value).replace('"deep"', deep).encode()
    elif way == 5 and isinstance(node[key], list):
        node[key] = node[key] * random_.choice((0, 2, 50))
    else:
        node[key] = random_.choice(VALUES)
    return json.dumps(value).encode()


def mutated_header(content: bytes, random_: random.Random) -> bytes:
    """A safetensors file with another header, or with other numbers."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], bytearray(content[8 + length :])
    if random_.random() < 0.3 and len(body) >= 8:
        at = random_.randrange(len(body) // 4) * 4
        number = random_.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1.0))
        body[at : at + 4] = struct.pack("<f", number)
    else:
        header = mutated_json(header, random_)
    length = len(header)
    if random_.random() < 0.1:
        length = random_.choice((0, 2**63, 2**40, length + 8, length - 1))
    return (length % 2**64).to_bytes(8, "little") + header + body


def try_mutations(
    folder: Path, read: Callable[[], object], *, count: int, seed: int
) -> tuple[int, int]:
    """Mutate one file of a folder at a time, and read.

    Returns:
        How many mutations were refused, by a ValueError or OSError of one short line, and how many
        were read all the same. Any other exception is raised.
    """
    random_ = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for number in range(count):
        path = random_.choice(files)
        path.write_bytes(mutated(whole[path], path.suffix, random_))
        try:
            read()
        except (ValueError, OSError) as error:
            message = str(error)
            assert 0 < len(message) < 2_000, message[:500]
            assert "\n" not in message, message[:500]
            message.encode()
            refused += 1
        except Exception as error:
            error.add_note(f"mutation {number} of {path.name}, seed {seed}")
            raise
        finally:
            path.write_bytes(whole[path])
    return refused, count - refused
