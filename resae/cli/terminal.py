"""The console of the command line. Only this package prints."""

import json
import logging
import math
import re
import sys
from typing import Any

from resae.console import Console

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters other than tab and newline, halves of surrogate pairs, and marks that reorder
text: names in a stranger's file could steer a terminal, or be unfit for its encoding."""


class TerminalConsole(Console):
    """Lines that stay, and one progress line: overwritten on a terminal, otherwise every 10 s.

    Args:
        name: of the command, before its errors.
        command_line: the whole command as it was given, for records.
        quiet: print errors and results only.
    """

    def __init__(
        self,
        name: str = "",
        command_line: str = "",
        *,
        quiet: bool = False,
        traceback: bool = False,
    ) -> None:
        self.name = name
        self.command_line = command_line
        self.traceback = traceback
        self._quiet = quiet
        self._pending = False
        self._file = None

    def report_to_stderr(self) -> None:
        """Leave standard output to what `result` prints."""
        self._file = sys.stderr

    def log(self, line: str = "") -> None:
        if self._quiet:
            return
        if self._pending:
            print(file=self._file)
        self._pending = False
        print(printable(line), file=self._file, flush=True)

    def progress(self, line: str) -> None:
        if self._quiet:
            return
        if (self._file or sys.stdout).isatty():
            print(f"\r\033[K{printable(line)}", end="", file=self._file, flush=True)
            self._pending = True
        elif self._progress_is_due():
            print(printable(line), file=self._file, flush=True)

    def result(self, text: str) -> None:
        """Print what was asked for, quiet or not."""
        if self._pending:
            print(file=self._file)
        self._pending = False
        print(printable(text), flush=True)

    def json(self, content: Any) -> None:
        """Print what was asked for as JSON, which has no NaN and no infinity: null."""
        self.result(json.dumps(_finite(content), indent=1, allow_nan=False))

    def error(self, line: str) -> None:
        print(f"resae {self.name}: {printable(line)}", file=sys.stderr, flush=True)


class PrintableFormatter(logging.Formatter):
    """Messages alone, printable."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def printable(text: str) -> str:
    """The text with an escape such as `\\x1b` for each character of `UNPRINTABLE`."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(part) for name, part in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
