"""Fit the affine maps between layers and measure how well they predict."""

from resae.cli.terminal import TerminalConsole
from resae.training.config import FitConfig as Options


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.training import fit_maps

    quiet_libraries(options.data)
    out = fit_maps(options, console=console, command=console.command_line)
    console.log(f"written to {out}; next: resae train … --maps {out}")
    return 0
