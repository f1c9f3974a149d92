"""The scripts that complete commands and options: bash's runs, those of zsh and fish are read."""

import re
import shutil
import subprocess

import pytest

from resae.cli import COMMANDS, main

ASK = """
ask() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _resae
    echo "${COMPREPLY[@]}"
}
"""


def script(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def options_in_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = re.findall(r"^  (-.+?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"(?:^|, )(--?[a-z][\w-]*)", line)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_values(capsys):
    asked = {
        "resae t": "train tune",
        "resae --v": "--version",
        "resae train --lo": "--loop --log-steps",
        "resae train --loop ": "open closed",
        "resae train model data --loop c": "closed",
        "resae train --out ": "",
        "resae train mod": "",  # names of files, by the shell
        "resae profile enc": "encode",
        "resae completion ": "bash zsh fish",
        "resae unknown --l": "",
    }
    asked |= {f"resae {command} -": None for command in COMMANDS}
    lines = [" ".join(f"'{word}'" for word in line.split(" ")) for line in asked]
    program = script("bash", capsys) + ASK + "\n".join(f"ask {line}" for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-uc", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    for (line, expected), found in zip(asked.items(), done.stdout.splitlines(), strict=True):
        if expected is None:
            assert set(found.split()) == options_in_help(line.split()[1], capsys), line
        else:
            assert found.split() == expected.split(), line


def test_zsh_takes_the_script_of_bash(capsys):
    head, _, rest = script("zsh", capsys).partition("_resae()")
    assert "bashcompinit\n" in head
    assert "_resae()" + rest == script("bash", capsys)


def test_fish_has_a_line_for_every_command_and_option(capsys):
    lines = script("fish", capsys).splitlines()
    assert all(line.startswith("complete -c resae -n ") for line in lines)
    for command in COMMANDS:
        assert sum(f"-f -a {command} -d " in line for line in lines) == 1
        of_command = [line for line in lines if f"seen_subcommand_from {command}'" in line]
        names = {
            ("--" if kind == "l" else "-") + name
            for line in of_command
            for kind, name in re.findall(r" -(l|s) (\S+)", line.partition(" -d ")[0])
        }
        assert names == options_in_help(command, capsys), command
    [loop] = [line for line in lines if "from train' -l loop" in line]
    assert " -r -f -a 'open closed' -d " in loop
    assert "'__fish_seen_subcommand_from train' -l shared -d " in "\n".join(lines)  # takes no value


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "csh"])
    assert stop.value.code == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
