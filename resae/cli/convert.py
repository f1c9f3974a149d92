"""Rewrite an autoencoder in the format of another library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from resae.arguments import filled, whole
from resae.choices import EXPORTS, IMPORTS
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown

EPILOG = (
    "A folder with several autoencoders (hook points, seeds, a run of resae) is converted as a "
    "whole, or, if one of them cannot be, not at all. Pickles (dictionary_learning, openai) are "
    "read only if --format names them."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversion."""

    source: Annotated[str, filled, Shown("SRC", positional=True)]
    """A folder, a file, or a repository of the hub, owner/name."""
    destination: Annotated[str, filled, Shown("DST", positional=True)]
    """Folder to write, absent or empty."""
    to: Annotated[str, EXPORTS]
    """Format to write."""
    format: Annotated[str | None, IMPORTS] = None
    """Format of the source; None: found out."""
    hook_point: Annotated[str | None, filled, Shown("FOLDER")] = None
    """Folder of one autoencoder in the source."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of a repository."""
    max_active: Annotated[int | None, whole(1)] = None
    """Slots of a code, for autoencoders with a threshold (--to resae)."""
    skip_unsupported: bool = False
    """Leave out those of several autoencoders that cannot be converted, each with a line that tells
    why."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.interop.formats import convert

    if options.max_active is not None and options.to != "resae":
        raise ValueError("--max-active: only resae's own format holds it; add --to resae")

    def skipped(folder: Path, error: Exception) -> None:
        console.error(f"left out: {folder}: {' '.join(str(error).split())}")

    written = convert(
        options.source,
        Path(options.destination),
        options.to,
        format=options.format,
        hook_point=options.hook_point,
        revision=options.revision,
        max_active=options.max_active,
        on_skip=skipped if options.skip_unsupported else None,
    )
    for sae in written:
        console.log(f"{sae.source} ({sae.format}) written to {sae.folder} ({options.to})")
        for what in sae.folded:
            console.log(f"  folded: {what}")
        if sae.input_kind != "activation":
            console.log("  encodes an affine residual: its encode needs a prediction")
    return 0
