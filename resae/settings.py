"""Settings as dataclasses: one declaration is the Python class, the command-line options and the
keys of a settings file.

A field is one setting. Its docstring is its help text; its annotation gives the values:

    steps: Annotated[int, whole(1)] = 50          read by a function of `resae.arguments`
    loop: Annotated[str, Loop]                    one of a closed set of words (`resae.choices`)
    shared: bool = False                          a flag
    model: Annotated[str, filled, Shown("MODEL", positional=True)]

A group of settings is a class of its own; the first line of its docstring is the group's title. A
config class inherits from its groups. Nothing here imports torch.
"""

import ast
import inspect
import json
import textwrap
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from enum import EnumType
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from resae import strict_json

T = TypeVar("T")
MOST_TOML_BYTES = 1 << 20

RENAMED = {"form": "map_type"}
"""Names of settings in files of earlier versions → names now."""


class Shown(NamedTuple):
    """Display of a setting on the command line, where it is not `--name NAME`."""

    metavar: str
    positional: bool = False
    several: bool = False
    """One or more positional values."""


class Setting(NamedTuple):
    """One field of a settings class."""

    name: str
    help: str
    group: str
    """Title of the group that it belongs to."""
    default: Any
    """`MISSING` where a value is required."""
    parse: Callable[[str], Any] | None
    """Reads a value from text; None for a flag."""
    choices: Sequence[str] | None
    shown: Shown | None


def settings_of(cls: type) -> list[Setting]:
    """The settings of a dataclass, group by group in the order of its base classes."""
    groups: dict[str, type] = {}
    for part in reversed(cls.__mro__):
        if is_dataclass(part):
            groups |= dict.fromkeys(vars(part).get("__annotations__", {}), part)
    found = {f.name: _setting(f, groups[f.name], cls) for f in fields(cls) if f.init}
    order = [part for part in cls.__mro__ if is_dataclass(part)]
    return sorted(found.values(), key=lambda s: order.index(groups[s.name]))


def _setting(field: Any, owner: type, cls: type) -> Setting:
    annotation = get_type_hints(owner, include_extras=True)[field.name]
    parse, choices, shown = str, None, None
    for extra in get_args(annotation)[1:] if get_origin(annotation) is Annotated else ():
        if isinstance(extra, Shown):
            shown = extra
        elif isinstance(extra, tuple | EnumType):
            choices = tuple(map(str, extra))
        else:
            assert callable(extra), f"{cls.__name__}.{field.name}: {extra!r} in its annotation"
            parse = extra
    title = (inspect.getdoc(owner) or owner.__name__).splitlines()[0].rstrip(".")
    return Setting(
        field.name,
        field_docstrings(owner).get(field.name, ""),
        title,
        field.default,
        None if annotation in (bool, bool | None) else parse,
        choices,
        shown,
    )


_READ: dict[type, dict[str, str]] = {}


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a class and of its bases, on one line."""
    of_bases = [_own_docstrings(part) for part in reversed(cls.__mro__) if is_dataclass(part)]
    return {name: text for found in of_bases for name, text in found.items()}


def _own_docstrings(cls: type) -> dict[str, str]:
    if cls not in _READ:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        found = {}
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                found[statement.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
        _READ[cls] = found
    return _READ[cls]


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, under their current names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def read_file(path: Path, cls: type) -> dict[str, Any]:
    """Settings of `cls` from a TOML or JSON file, or from the record that a run wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML or JSON, a setting that `cls` does not have, or a value that it does
            not take.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: no file {path}; give a .toml or .json file")
    is_json = path.suffix == ".json"
    content = strict_json.read(path, f"--config: {path}") if is_json else _read_toml(path)
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]  # a record, which holds more than settings
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} holds no settings; expected name = value")
    known = {setting.name: setting for setting in settings_of(cls)}
    values = current_names({name.replace("-", "_"): v for name, v in content.items()})
    if unknown := sorted(values.keys() - known.keys()):
        near = get_close_matches(unknown[0][:100], known, n=1) or list(known)
        names = ", ".join(unknown) if len(unknown) < 5 else f"{len(unknown)} names"
        raise ValueError(
            f"--config: {path} sets {strict_json.brief(names)[1:-1]}, which is no setting "
            f"here; did you mean {' or '.join(near)}?"
        )
    return {n: _checked(known[n], v, path) for n, v in values.items() if v is not None}


def _read_toml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_TOML_BYTES:
        raise ValueError(
            f"--config: {path} is above {MOST_TOML_BYTES:,} bytes; is it the right one?"
        )
    try:
        return tomllib.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--config: {path} is not TOML ({strict_json.brief(str(error))})"
        ) from None


def _checked(setting: Setting, value: Any, path: Path) -> Any:
    """The value of a file as its text on the command line would be read."""
    what = f"--config: {path}: {setting.name} = {_shown(value)}"
    if setting.parse is None:
        if not isinstance(value, bool):
            raise ValueError(f"{what}: expected true or false")
        return value
    if setting.shown is not None and setting.shown.several:
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{what}: expected a list of names")
        return tuple(value)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, bool | dict) or (setting.choices and text not in setting.choices):
        raise ValueError(f"{what}: expected {', '.join(setting.choices or ['one value'])}")
    try:
        return setting.parse(text)
    except ArgumentTypeError as error:
        reason = str(error)  # with the value, which may be long, in its middle
        if len(reason) > 400:
            reason = f"{reason[:100]} … {reason[-250:]}"
        raise ValueError(f"{what}: {' '.join(reason.split())}") from None


def _shown(value: Any) -> str:
    """A value as JSON writes it, in a line."""
    if isinstance(value, dict | list):
        return strict_json.brief(value)
    return json.dumps(value, default=str)[:100]


def make(cls: type[T], values: Mapping[str, Any]) -> T:
    """A config of these values.

    Raises:
        ValueError: a required setting is missing, or the class refuses the values.
    """
    required = [s.name for s in settings_of(cls) if s.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing; give it as an option or in --config")
    return cls(**values)
