"""Output of progress and errors of long-running work."""

import logging

log = logging.getLogger("resae")


class Console:
    """Reports to the logger `resae`; the command line has one that prints."""

    traceback = False
    """Print errors with their traceback."""

    def say(self, line: str = "") -> None:
        """Report a line that stays."""
        log.info("%s", line)

    def show(self, line: str) -> None:
        """Report progress, which the next such line replaces."""
        log.debug("%s", line)

    def complain(self, line: str) -> None:
        """Report why the process ends."""
        log.error("%s", line)


class SilentConsole(Console):
    """Reports nothing: for all processes of a training but the first."""

    def say(self, line: str = "") -> None:
        pass

    def show(self, line: str) -> None:
        pass
