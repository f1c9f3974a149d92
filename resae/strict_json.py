"""JSON that others wrote, read within bounds: size, depth and numbers are limited, a repeated name
is an error, and entries have the types that are expected of them.

    parse            text → content
    read             a regular file → content
    require_fields   the types of an object's entries

Every error is a ValueError of one short line.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

MOST_BYTES = 1 << 24
"""Largest file that is read, 16 MiB: parsed it may take twenty times as much memory."""
MOST_DEPTH = 100
LARGEST_INTEGER = 2**63 - 1

_repr = Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxlevel = 4


def brief(value: object) -> str:
    """`repr` of a value in at most a line, for messages."""
    return _repr.repr(value).encode("ascii", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 500 characters and fit for any encoding; its
    type if it has none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
    return line.encode(errors="backslashreplace").decode()


def parse(text: str, what: str) -> Any:
    """The content of JSON text; `what` begins the error.

    Raises:
        ValueError: not JSON, a name given twice, numbers beyond 64 bits or not finite, or lists and
            objects nested more than 100 deep.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply; restore the file") from None
    except ValueError as error:
        reason = str(error).encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{what} is not valid JSON ({reason}); restore the file") from None
    if _deeper_than(content, MOST_DEPTH):
        raise ValueError(f"{what} is nested more than {MOST_DEPTH} deep; restore the file")
    return content


def read(path: Path, what: str, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file; errors as of `parse`, and of a file above `most_bytes`."""
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(
            f"{what} has {size:,} bytes, expected at most {most_bytes:,}; is it the right file?"
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not valid JSON (not UTF-8 at byte {error.start:,}); restore the file"
        ) from None
    return parse(text, what)


def require_fields(content: Any, expected: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Raise ValueError unless `content` is an object whose entries have the expected types.

    Args:
        expected: name → `str`, `bool`, `int`, `float` (an integer too), `dict`, a list of one type
            for lists of it, or a tuple of these; `None` among them: null, or no entry.

    Returns:
        `content`.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{what}: got {brief(content)}, expected names and values")
    for name, kind in expected.items():
        value = content.get(name)
        if name not in content and not _is_a(None, kind):
            raise ValueError(f"{what} has no {name}, expected {_named(kind)}")
        if not _is_a(value, kind):
            raise ValueError(f"{what}: {name} = {brief(value)}, expected {_named(kind)}")
    return content


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(_is_a(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_a(entry, kind[0]) for entry in value)
    if kind is None:
        return value is None
    return type(value) in ((int, float) if kind is float else (kind,))


NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"} | {
    dict: "names and values",
    None: "null",
}


def _named(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_named, kind))
    return f"a list, each {_named(kind[0])}" if isinstance(kind, list) else NAMES[kind]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {brief(twice)} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST_INTEGER:
        raise ValueError(f"the number {text[:20]}… is beyond 64 bits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is beyond 64 bits")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _deeper_than(content: Any, depth: int) -> bool:
    """True if lists and objects are nested deeper than this; without recursion."""
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(depth):
        entries = (
            entry
            for value in level
            for entry in (value.values() if isinstance(value, dict) else value)
        )
        level = [entry for entry in entries if isinstance(entry, (dict, list))]
    return bool(level)
