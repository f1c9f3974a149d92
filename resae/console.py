"""Output of progress and errors of long-running work."""

import logging
import time

_logger = logging.getLogger("resae")

PROGRESS_SECONDS = 10.0
"""Seconds between two lines of progress where lines stay: in a log, a file, a notebook."""


class Console:
    """Reports to the logger `resae`; the command line has one that prints."""

    traceback = False
    """Print errors with their traceback."""
    _next_progress = 0.0

    def log(self, line: str = "") -> None:
        """Report a line that stays."""
        _logger.info("%s", line)

    def progress(self, line: str) -> None:
        """Report progress, every 10 s at most."""
        if self._progress_is_due():
            _logger.info("%s", line)

    def error(self, line: str) -> None:
        """Report why the process ends."""
        _logger.error("%s", line)

    def _progress_is_due(self) -> bool:
        now = time.monotonic()
        due = now >= self._next_progress
        if due:
            self._next_progress = now + PROGRESS_SECONDS
        return due


class SilentConsole(Console):
    """Reports nothing: for all processes of a training but the first."""

    def log(self, line: str = "") -> None:
        pass

    def progress(self, line: str) -> None:
        pass
