"""The command line: `resae COMMAND`, one of `COMMANDS`.

One file per command: its settings are the class `Options`, from which its options are made, and
`run` does the work. Only this package prints. Bad input ends in one line, what was wrong and what
to do, and exit code 2. Arguments are read without torch: each command imports what it needs when it
runs, so that `--help` and a mistyped option answer at once.
"""

import argparse
import gc
import io
import logging
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from resae.cli.options import Parser, add_settings, given
from resae.cli.terminal import PrintableFormatter, TerminalConsole
from resae.environment import commit, installed_version, keep_freed_memory
from resae.settings import make, read_file

COMMANDS = {
    "demo": "everything on the embedded model and corpus, with a report to look at",
    "reproduce": "measure the paper's claims on a language model, in a study that goes on where it "
    "was interrupted",
    "fit": "fit the affine maps between layers and measure how well they predict",
    "train": "fit the affine maps and train one autoencoder per layer",
    "finetune": "train a finished run further, with all its layers replaced in the running model",
    "eval": "replace layers on held-out text and measure the cost",
    "probe": "measure what single latents tell about labelled texts: sparse probing, targeted "
    "perturbation, spurious correlations",
    "latents": "show each latent: the text it fires on, its effects, its nearest relatives",
    "generate": "continue a prompt with and without the layers replaced",
    "graph": "draw the direct effects between latents that lead to the next token of a prompt",
    "convert": "rewrite an autoencoder in the format of another library",
    "inspect": "describe an autoencoder in a file of any format",
    "report": "draw report.json as a page with figures",
    "push": "upload the stack of a run to the Hugging Face hub, with a model card",
    "profile": "time one op at one shape against roofs and alternatives",
    "tune": "measure which tile sizes of the GPU kernels are fastest on your GPU, and use them "
    "from then on",
    "completion": "print a script that completes commands and options in your shell",
}

GC_THRESHOLD = 20_000
"""New objects between two searches for reference cycles. Python's 700 is met a thousand times while
torch and transformers are imported and once per training step: 4 % of a short training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    from_file = any(a == "--config" or a.startswith("--config=") for a in arguments)
    parsed = full_parser(from_file=from_file).parse_args(arguments)
    console = TerminalConsole(
        parsed.command,
        shlex.join(["resae", *arguments]),
        quiet=parsed.quiet,
        traceback=parsed.traceback,
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows \u2013 for a dash
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if parsed.verbose else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    keep_freed_memory()
    gc.set_threshold(GC_THRESHOLD)
    command = import_module(f"resae.cli.{parsed.command}")
    try:
        values = {} if parsed.config is None else read_file(Path(parsed.config), command.Options)
        values |= given(parsed, command.Options)
        return command.run(make(command.Options, values), console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if parsed.traceback:
            raise
        console.error(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130


def full_parser(*, from_file: bool = False) -> Parser:
    """The parser of the whole command line.

    Args:
        from_file: whether a settings file may hold the required settings.
    """
    parser = Parser(
        prog="resae",
        description="Sparse autoencoders for several layers of a language model at once: fit "
        "affine maps between the layers, train an autoencoder on what each map leaves, replace "
        "all layers while the model runs.",
        epilog="Start with `resae demo`; then `resae train embedded embedded --layers 1,3,5 --k 8 "
        "--out runs/first`, `resae eval runs/first`, `resae report runs/first`.",
    )
    parser.add_argument("--version", action=_Version, help="print version and commit, and end")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, text in COMMANDS.items():
        commands.add_parser(
            name, help=text, description=text, fill=partial(_fill, name=name, from_file=from_file)
        )
    return parser


def _fill(parser: Parser, *, name: str, from_file: bool) -> None:
    """Add the options of one command, and those that all commands have."""
    module = import_module(f"resae.cli.{name}")
    parser.epilog = getattr(module, "EPILOG", None)
    add_settings(parser, module.Options, from_file=from_file)
    every = parser.add_argument_group("Every command")
    every.add_argument(
        "--config",
        metavar="FILE",
        help="read settings from a TOML or JSON file, or from the record of a run (run.json, "
        "fit.json); options on the command line come before it",
    )
    every.add_argument(
        "--traceback", action="store_true", help="on an error, show where it happened"
    )
    every.add_argument("-v", "--verbose", action="store_true", help="show the libraries' messages")
    every.add_argument("-q", "--quiet", action="store_true", help="print errors and results only")


class _Version(argparse.Action):
    """Asks git only where the version is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        of = commit()
        print(f"resae {installed_version('resae')}" + (f", commit {of}" if of else ""))
        parser.exit()
