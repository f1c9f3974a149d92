"""Upload the stack of a run to the hub, with a model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from resae.arguments import filled
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Upload."""

    run_directory: Annotated[str, filled, Shown("RUN", positional=True)]
    """A run directory; the table of the card is of its report.json, where there is one."""
    repository: Annotated[str, filled, Shown("REPO", positional=True)]
    """Repository on the hub, owner/name; made where there is none."""
    license: Annotated[str | None, filled] = None
    """Licence of the weights, as the hub names licences, for example apache-2.0; None: the card
    names none."""
    private: bool = False
    """Make the repository a private one."""
    branch: Annotated[str | None, filled] = None
    """Branch to upload to; None: main."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.storage import load_json
    from resae.training.runs import open_run

    folder = Path(options.run_directory)
    _, stack = open_run(folder, "cpu")
    report = folder / "report.json"
    uploaded = stack.push_to_hub(
        options.repository,
        license=options.license,
        report=load_json(report, "report") if report.exists() else None,
        private=options.private or None,
        branch=options.branch,
    )
    console.result(str(uploaded))
    return 0
