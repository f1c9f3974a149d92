"""Output of progress and errors of long-running work."""

import logging

_logger = logging.getLogger("resae")


class Console:
    """Reports to the logger `resae`; the command line has one that prints."""

    traceback = False
    """Print errors with their traceback."""

    def log(self, line: str = "") -> None:
        """Report a line that stays."""
        _logger.info("%s", line)

    def progress(self, line: str) -> None:
        """Report progress, which the next such line replaces."""
        _logger.debug("%s", line)

    def error(self, line: str) -> None:
        """Report why the process ends."""
        _logger.error("%s", line)


class SilentConsole(Console):
    """Reports nothing: for all processes of a training but the first."""

    def log(self, line: str = "") -> None:
        pass

    def progress(self, line: str) -> None:
        pass
