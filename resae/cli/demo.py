"""Everything on the embedded model and corpus, with a report to look at."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from resae.arguments import compared, names, whole, writable
from resae.arguments import seed as seed_number
from resae.cli.terminal import TerminalConsole
from resae.demo.recipes import EXTRA_METHODS, METHOD_GROUPS

EPILOG = f"Names that --methods takes: {', '.join(EXTRA_METHODS)}."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Demo."""

    out: Annotated[str, writable] = "resae-demo"
    """Folder to write into."""
    seed: Annotated[int, seed_number] = 0
    """Fixes initial directions and the order of the data."""
    k: Annotated[tuple[int, ...], compared] = (4, 8, 32)
    """Active latents per layer, compared."""
    layers: Annotated[tuple[str, ...], names] = ("1", "3", "5")
    """Blocks to replace."""
    methods: Annotated[tuple[str, ...], names] = ()
    """Further methods besides raw SAEs, identity residuals and ReSAE: all (20 to 30 minutes), fair
    (rows without an advantage for ReSAE, longer training among them), online (every stack tuned
    online, and as many more steps of training), elsewhere (other hook points), learning_rates (a
    grid), or the names below."""
    train_tokens: Annotated[int, whole(1)] = 200_000
    """Tokens that each stack is trained on; fewer for a quick look."""
    tune_tokens: Annotated[int | None, whole(1)] = None
    """Tokens that ReSAE is tuned on online; None: as many as each stack is trained on."""
    held_out_rows: Annotated[int, whole(1)] = 64
    """Rows to evaluate on."""
    threads: Annotated[int, whole(1)] = 1
    """Torch CPU threads (more hardly helps at this size)."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.storage import is_unused, locked

    out = Path(options.out)
    with locked(out):
        if not is_unused(out) and not (out / "report.json").exists():
            raise ValueError(f"{out} exists and is not an earlier demo; choose another --out")
        return _run_into(out, options, console)


def _run_into(out: Path, options: Options, console: TerminalConsole) -> int:
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.demo.comparison import run_demo
    from resae.demo.stages import DemoConfig
    from resae.environment import describe_device
    from resae.report.page import write_report

    quiet_libraries()
    # The model is so small that a second thread gains a third, and loses far more than that where
    # another process is using its core.
    torch.set_num_threads(options.threads)
    console.log(f"device: {describe_device('cpu')}, where the demo always runs")
    named = (METHOD_GROUPS.get(name, (name,)) for name in options.methods)
    config = DemoConfig(
        layers=options.layers,
        k=options.k,
        seed=options.seed,
        methods=tuple(dict.fromkeys(chain.from_iterable(named))),
        train_tokens=options.train_tokens,
        tune_tokens=options.tune_tokens,
        held_out_rows=options.held_out_rows,
    )
    report = run_demo(out, config, log=console.log, progress=console.progress)
    page = write_report(out)
    console.log()
    for sentence in report.findings:
        console.log(f"• {sentence}")
    console.log()
    console.log(f"report: {page}   rows: {out / 'report.json'}   stacks: {out / 'stacks'}")
    return 0
