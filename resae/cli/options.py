"""Command-line options made from settings classes (`resae.settings`)."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

from resae.settings import Setting, settings_of


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line.

    Args:
        fill: adds the options when the parser is first used, so that a command's settings are
            read only where the command is asked for.
    """

    def __init__(self, *, fill: Callable[["Parser"], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._fill = fill

    def arguments(self) -> list[argparse.Action]:
        """The options and positional arguments, in the order of `--help`."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return list(self._actions)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        self.arguments()
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, and not in the parser of all commands, whose message names none
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_settings(parser: argparse.ArgumentParser, cls: type, *, from_file: bool) -> None:
    """Add one option per setting of `cls`, in groups; those that are not given are absent from the
    parsed namespace.

    Args:
        from_file: whether a settings file may hold the required ones.
    """
    groups: dict[str, Any] = {}
    for setting in settings_of(cls):
        group = groups.get(setting.group)
        if group is None:
            group = groups[setting.group] = parser.add_argument_group(setting.group)
        _add(group, setting, required=setting.default is MISSING and not from_file)


def _add(group: Any, setting: Setting, *, required: bool) -> None:
    name = "--" + setting.name.replace("_", "-")
    options: dict[str, Any] = {"help": help_text(setting), "default": argparse.SUPPRESS}
    if setting.parse is None:
        group.add_argument(name, action="store_true", **options)
        return
    options |= {"choices": setting.choices} if setting.choices else {"type": setting.parse}
    shown = setting.shown
    if shown is not None:
        options["metavar"] = shown.metavar
    if shown is not None and shown.positional:
        counts = ("+", "*") if shown.several else (None, "?")
        if setting.choices and setting.default is not MISSING:
            options["default"] = setting.default  # argparse holds a default against the choices
        group.add_argument(setting.name, nargs=counts[not required], **options)
    else:
        group.add_argument(name, required=required, **options)


def help_text(setting: Setting) -> str:
    """The docstring of a setting with its default."""
    text = re.sub(r"\bNone: ", "default: ", setting.help)
    default = setting.default
    told = default is None or default is False or default == () or "default: " in text
    if not told and default is not MISSING:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text.removesuffix('.')} (default: {shown})"
    return text.replace("%", "%%")


def given(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of `cls` that were given on the command line."""
    values = vars(namespace)
    found = {s.name: values[s.name] for s in settings_of(cls) if s.name in values}
    # An optional positional that is left out is there all the same, as SUPPRESS or an empty list.
    return {n: _value(v) for n, v in found.items() if v not in (argparse.SUPPRESS, [])}


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
