"""Draw report.json as a page with figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from resae.arguments import filled
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Report."""

    run_directory: Annotated[str, filled, Shown("RUN", positional=True)]
    """A directory with report.json."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.report.page import write_report

    console.result(str(write_report(Path(options.run_directory))))
    return 0
