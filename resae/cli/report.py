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

    folders = list(options.run_directories)
    if len(folders) > 1 and options.out is None:
        raise ValueError(f"{len(folders)} runs to compare; name a folder for the page with --out")
    if len(folders) == 1 and options.out is not None:
        raise ValueError("--out is for the comparison of several runs; one is drawn where it is")
    if options.out is None:
        (folder,) = folders
        page = write_report(folder)
    else:
        page = write_comparison(folders, options.out)
    console.result(str(page))
    return 0
