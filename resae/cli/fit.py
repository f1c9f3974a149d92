"""Fit the affine maps between layers and measure how well they predict."""

from resae.cli.display import Display
from resae.training.config import FitConfig as Options


def run(options: Options, display: Display) -> int:
    from resae.cli.libraries import quiet_libraries
    from resae.training import fit_maps

    quiet_libraries(options.data)
    out = fit_maps(options, console=display, command=display.command_line)
    display.say(f"written to {out}; next: resae train … --maps {out}")
    return 0
