"""Print a script that completes commands and options in a shell.

The script is made from the parsers of the commands, so that a new option is completed without being
named here. It holds all words: pressing the tab key starts no Python.
"""

from argparse import Action
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from resae.cli.options import Parser
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown

SHELLS = ("bash", "zsh", "fish")
EPILOG = (
    'bash and zsh: add the line eval "$(resae completion bash)", with the name of your shell, to '
    "~/.bashrc or ~/.zshrc. fish: resae completion fish > ~/.config/fish/completions/resae.fish"
)

BASH = """\
_resae() {
    local word=${COMP_WORDS[COMP_CWORD]} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words='%(first)s'
    else
        case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in
%(cases)s
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _resae resae
"""
"""Script for bash. The shell completes names of files if no word is found."""
OF_COMMAND = """\
        '%(command)s '*)
            case $word in
                -*) words='%(options)s' ;;
                *) words='%(values)s' ;;
            esac ;;"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""
"""Has zsh take the script of bash."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Script."""

    shell: Annotated[str, SHELLS, Shown("SHELL", positional=True)]
    """bash, zsh or fish."""


def run(options: Options, console: TerminalConsole) -> int:
    from resae.cli import full_parser

    root = full_parser()
    if options.shell == "fish":
        console.result(_fish(root))
    else:
        console.result((ZSH if options.shell == "zsh" else "") + _bash(root))
    return 0


def _options(parser: Parser) -> list[Action]:
    return [action for action in parser.arguments() if action.option_strings]


def _commands(root: Parser) -> Mapping[str, Parser]:
    """The parser of each command."""
    (commands,) = (a.choices for a in root.arguments() if not a.option_strings)
    assert isinstance(commands, Mapping)
    return commands


def _names(parser: Parser) -> list[str]:
    return [name for action in _options(parser) for name in action.option_strings]


def _values(action: Action) -> str:
    """The words that an argument takes; none where it takes any."""
    return " ".join(map(str, action.choices or ()))


def _positional_values(parser: Parser) -> str:
    return " ".join(filter(None, (_values(a) for a in parser.arguments() if not a.option_strings)))


def _bash(root: Parser) -> str:
    commands, cases = _commands(root), []
    for command, parser in commands.items():
        after: dict[str, list[str]] = {}  # by the values: the options that take them
        for action in (a for a in _options(parser) if a.nargs != 0):
            names = (f"'{command} {name}'" for name in action.option_strings)
            after.setdefault(_values(action), []).extend(names)
        cases += [f"        {'|'.join(n)}) words='{values}' ;;" for values, n in after.items()]
        of_command = {"options": " ".join(_names(parser)), "values": _positional_values(parser)}
        cases.append(OF_COMMAND % {"command": command, **of_command})
    first = " ".join([*commands, *_names(root)])
    return BASH % {"first": first, "cases": "\n".join(cases)}


def _fish(root: Parser) -> str:
    commands = _commands(root)
    lines = [_fish_line("__fish_use_subcommand", _fish_option(a), a) for a in _options(root)]
    for command, parser in commands.items():
        described = f"-f -a {command} -d {_fish_quoted(parser.description or '')}"
        lines.append(f"complete -c resae -n __fish_use_subcommand {described}")
        when = f"'__fish_seen_subcommand_from {command}'"
        lines += [_fish_line(when, _fish_option(a), a) for a in _options(parser)]
        if values := _positional_values(parser):
            lines.append(f"complete -c resae -n {when} -f -a '{values}'")
    return "\n".join(lines)


def _fish_option(action: Action) -> str:
    names = (
        ("-l " if n.startswith("--") else "-s ") + n.lstrip("-") for n in action.option_strings
    )
    return " ".join(names)


def _fish_line(when: str, names: str, action: Action) -> str:
    takes = "" if action.nargs == 0 else " -r"
    takes += f" -f -a '{_values(action)}'" if action.choices else ""
    told = _fish_quoted((action.help or "").replace("%%", "%"))
    return f"complete -c resae -n {when} {names}{takes} -d {told}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
