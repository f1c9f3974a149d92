"""Output of the command line, and its streams."""

import json
import logging

import pytest

from resae.cli import TerminalConsole, main
from resae.console import Console, SilentConsole


def test_quiet_leaves_results_and_errors(capsys):
    console = TerminalConsole("train", quiet=True)
    console.log("a line")
    console.progress("progress")
    console.result("a table")
    console.error("a problem")
    assert capsys.readouterr() == ("a table\n", "resae train: a problem\n")


def test_results_alone_go_to_standard_output(capsys):
    console = TerminalConsole("eval")
    console.report_to_stderr()
    console.log("a line")
    console.result("[]")
    assert capsys.readouterr() == ("[]\n", "a line\n")


def test_control_characters_are_printed_escaped(capsys):
    console = TerminalConsole("eval")
    for write in (console.log, console.result, console.error):
        write("a\tb\x1b[2J\r\x9b\u202e ∆\nc")
    out, err = capsys.readouterr()
    assert out == 2 * "a\tb\\x1b[2J\\r\\x9b\\u202e ∆\nc\n"
    assert err == f"resae eval: {out[: len(out) // 2]}"


def test_on_a_terminal_a_progress_line_is_overwritten(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console = TerminalConsole()
    console.progress("1/2")
    console.progress("2/2")
    console.log("done")
    assert capsys.readouterr().out == "\r\x1b[K1/2\r\x1b[K2/2\ndone\n"


def test_elsewhere_progress_comes_every_ten_seconds(capsys, monkeypatch):
    every_ten_seconds(monkeypatch, TerminalConsole())
    assert capsys.readouterr().out == "a\nc\n"


def test_progress_of_python_is_logged_every_ten_seconds(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="resae")
    every_ten_seconds(monkeypatch, Console())
    assert caplog.messages == ["a", "c"]


def every_ten_seconds(monkeypatch, console):
    """Three lines of progress, five seconds apart."""
    clock = iter([100.0, 105.0, 110.0])
    monkeypatch.setattr("resae.console.time.monotonic", lambda: next(clock))
    for line in "abc":
        console.progress(line)


def test_a_console_of_python_logs_and_a_silent_one_complains_alone(caplog, capsys):
    caplog.set_level(logging.DEBUG, logger="resae")
    for console in (Console(), SilentConsole()):
        console.log("said")
        console.progress("shown")
        console.error("wrong")
    assert caplog.messages == ["said", "shown", "wrong", "wrong"]
    assert capsys.readouterr().out == ""


def test_version_names_the_version_and_the_commit(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    said = capsys.readouterr().out.split()
    assert said[0] == "resae"
    assert said[2:3] in ([], ["commit"])


def test_tables_are_printed_as_json(capsys, monkeypatch):
    plan = ["train", "embedded", "no-data", "--layers", "1,3", "--k", "4", "--out", "no-folder"]
    assert main([*plan, "--plan", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["phases"][0]["name"]
    assert estimate["tokens_per_second"] > 0
    monkeypatch.setattr("resae_kernels.profiling.clock.COLD_BYTES", 1 << 20)
    shape = ["--tokens", "2", "--width", "8", "--latents", "16", "--k", "2", "--rounds", "1"]
    assert main(["profile", "decode", *shape, "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)
    assert measured["roofs"]["copy"] > 0
    assert {row["D"] for row in measured["rows"]} == {8}
    assert printed.err.startswith("device: cpu")


def test_a_settings_file_comes_before_nothing_but_defaults(tmp_path, capsys):
    file = tmp_path / "plan.toml"
    file.write_text(
        'model = "embedded"\ndata = "x"\nlayers = ["1", "3"]\nk = 4\nout = "no-folder"\n'
    )
    for given, k in (([], 4), (["--k", "8"], 8)):
        assert main(["train", "--config", str(file), "--plan", "--json", *given]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["k"] == k
    file.write_text("kk = 4\n")
    assert main(["train", "--config", str(file), "--plan"]) == 2
    assert "did you mean k?" in capsys.readouterr().err
