"""Draw report.json as a page with figures; several of them as a comparison."""

from dataclasses import dataclass
from typing import Annotated

from resae.arguments import filled, writable
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Report."""

    run_directories: Annotated[tuple[str, ...], filled, Shown("RUN", True, several=True)]
    """Directories with report.json; several are compared on one page."""
    out: Annotated[str | None, writable] = None
    """Folder for the report.json and the page of a comparison."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.report.page import write_report
    from resae.report.runs import write_comparison

    first, *others = options.run_directories
    if others and options.out is None:
        raise ValueError(f"{len(others) + 1} runs to compare; name a folder with --out")
    if options.out is None:
        page = write_report(first)
    elif others:
        page = write_comparison([first, *others], options.out)
    else:
        raise ValueError("--out is for the comparison of several runs; one is drawn where it is")
    console.result(str(page))
    return 0
