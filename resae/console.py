"""Where a long piece of work reports to."""

import logging
import time

log = logging.getLogger("resae")

PROGRESS_SECONDS = 10.0
"""Between two lines of progress where lines stay: in a log, a file, a notebook."""


class Console:
    """Reports to the logger `resae`; the command line has one that prints."""

    traceback = False
    """Whether an error shows where it happened."""
    _next_progress = 0.0

    def say(self, line: str = "") -> None:
        """Report a line that stays."""
        log.info("%s", line)

    def show(self, line: str) -> None:
        """Report progress, every 10 s at most."""
        if self._progress_is_due():
            log.info("%s", line)

    def complain(self, line: str) -> None:
        """Report why the process ends."""
        log.error("%s", line)

    def _progress_is_due(self) -> bool:
        now = time.monotonic()
        due = now >= self._next_progress
        if due:
            self._next_progress = now + PROGRESS_SECONDS
        return due


class SilentConsole(Console):
    """Reports nothing: for all processes of a training but the first."""

    def say(self, line: str = "") -> None:
        pass

    def show(self, line: str) -> None:
        pass
