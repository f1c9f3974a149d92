"""Measure which tile sizes of the GPU kernels are fastest, and use them from then on."""

from dataclasses import dataclass
from typing import Annotated

from resae.arguments import device as device_name
from resae.arguments import whole
from resae.cli.terminal import TerminalConsole

EPILOG = (
    "A tile is how much of its work one program of a kernel takes at a time. Nothing but speed "
    "(and rounding) depends on it. The result is kept in ~/.cache/resae/tiles.json, by GPU; remove "
    "that file to go back to the tiles that come with resae."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tuning."""

    device: Annotated[str, device_name] = "cuda"
    """GPU to use: cuda, cuda:1."""
    rounds: Annotated[int, whole(1)] = 20
    """Calls per tile and shape."""
    show: bool = False
    """Only print the tiles in use and where they come from."""


def run(options: Options, console: TerminalConsole) -> int:
    import torch

    from resae_kernels.profiling import active_tiles, tune
    from resae_kernels.triton.tiles import tiles_file

    gpu = torch.device("cuda" if options.device == "auto" else options.device)
    if options.show:
        console.result(active_tiles(gpu if torch.cuda.is_available() else torch.device("cpu")))
        return 0
    chosen = tune(gpu, rounds=options.rounds, say=console.log)
    console.log(
        f"* chosen, by the geometric mean of the last column: the time relative to the tile that "
        f"comes with resae. {len(chosen)} tiles written to {tiles_file()}"
    )
    return 0
