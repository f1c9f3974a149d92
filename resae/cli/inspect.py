"""Describe an autoencoder in a file of any format."""

from dataclasses import dataclass
from typing import Annotated, Any

from resae.arguments import filled
from resae.choices import IMPORTS
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown

MOST_SHOWN = 500
"""Characters of a name that are printed; `--json` has them all."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Inspection."""

    source: Annotated[str, filled, Shown("PATH|HUB", positional=True)]
    """A folder, a file, or a repository of the hub, owner/name."""
    format: Annotated[str | None, IMPORTS] = None
    """Its format; None: found out. Pickles (dictionary_learning, openai) are read only if it is
    given."""
    hook_point: Annotated[str | None, filled, Shown("FOLDER")] = None
    """Folder of one autoencoder in the source."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of a repository."""
    json: bool = False
    """Print JSON."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.interop.inspection import describe_file

    facts = describe_file(options.source, options.format, options.hook_point, options.revision)
    if options.json:
        console.json(facts)
    else:
        console.result(_text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{name:<21}{_shown(value)}" for name, value in facts.items() if name != "parts"]
    for name, part in facts.get("parts", {}).items():
        lines += [f"{name}:", *(f"  {line}" for line in _text(part).splitlines())]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown_part(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, str):  # of a stranger's file: one line of bounded length
        return _cut(value if value.isprintable() else ascii(value)[1:-1])
    return f"{value:.4g}" if isinstance(value, float) else str("–" if value is None else value)


def _shown_part(value: Any) -> str:
    return f"({_shown(value)})" if isinstance(value, dict) else _shown(value)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"
