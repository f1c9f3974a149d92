"""Output of progress and errors of long-running work."""

import logging
import time
from collections.abc import Callable

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


class ProgressEstimate:
    """Stages done and stages to come, with the remaining time corrected by the speed so far.

    Stages are given with the seconds they took where they were measured; `at(fraction)` reports how
    far the current one is.
    """

    def __init__(self, stages: dict[str, float], progress: Callable[[str], None]):
        self._stages = stages
        self._progress = progress
        self._began = time.perf_counter()
        self._done = 0.0
        self._current = ""

    def stage(self, name: str) -> None:
        if self._current:
            self._done += self._stages[self._current]
        self._current = name
        self.at(0.0)

    def at(self, fraction: float, detail: str = "") -> None:
        expected = self._done + fraction * self._stages[self._current]
        total = sum(self._stages.values())
        spent = time.perf_counter() - self._began
        # Until something is measured the reference speed has to do; then it fades out.
        pace = (spent + 5.0) / (expected + 5.0)
        left = (total - expected) * pace
        number = list(self._stages).index(self._current) + 1
        self._progress(
            f"[{number}/{len(self._stages)}] {self._current:<42} {fraction:4.0%}  "
            f"{spent:4.0f} s, about {left:.0f} s left  {detail}"
        )
