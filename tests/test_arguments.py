"""Values of the command line: what is taken, and what one line says of the rest."""

import math
import sys
from argparse import ArgumentTypeError

import pytest

from resae import arguments
from resae.cli.options import Parser


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (arguments.names, "1, blocks.3.hook_mlp_out", ("1", "blocks.3.hook_mlp_out")),
        (arguments.numbers, "8,4,8", (8, 4, 8)),
        (arguments.compared, "4,8,32", (4, 8, 32)),
        (arguments.one_k, "8", 8),
        (arguments.whole(0), "0", 0),
        (arguments.whole(1, 3), "3", 3),
        (arguments.seed, str(2**32 - 1), 2**32 - 1),
        (arguments.real(above=0), "1e-3", 1e-3),
        (arguments.real(least=0, most=1), "1", 1.0),
        (arguments.peaks, "312e12,2e12", (312e12, 2e12)),
        (arguments.device, "cuda:1", "cuda:1"),
        (arguments.device, "auto", "auto"),
    ],
)
def test_good_values_are_read(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (arguments.filled, " ", "is empty"),
        (arguments.names, "", "expected names"),
        (arguments.names, "1,,3", "expected names"),
        (arguments.numbers, "4;8", "expected numbers, for example"),
        (arguments.numbers, "4,0", "from 1 on"),
        (arguments.compared, "8,4", "rising"),
        (arguments.compared, "4,4", "rising"),
        (arguments.one_k, "4,8,32", "--k-per-layer 4,8,32"),
        (arguments.one_k, "0", "from 1 on"),
        (arguments.whole(1), "1.5", "whole number from 1 on"),
        (arguments.whole(0), "-1", "whole number from 0 on"),
        (arguments.whole(1, 3), "4", "from 1 to 3"),
        (arguments.seed, "-1", "from 0 to"),
        (arguments.real(above=0), "0", "above 0"),
        (arguments.real(above=0), "nan", "above 0"),
        (arguments.real(least=0), "inf", "from 0 on"),
        (arguments.real(above=0, most=1), "1.1", "above 0 to 1"),
        (arguments.real(least=0, most=1), "x", "from 0 to 1"),
        (arguments.peaks, "1e12", "FLOP/s and bytes/s"),
        (arguments.peaks, "1e12,0", "FLOP/s and bytes/s"),
        (arguments.device, "gpu", "expected auto, cpu, cuda or cuda:1"),
        (arguments.device, "meta", "expected auto, cpu, cuda or cuda:1"),
    ],
)
def test_other_values_say_what_is_expected(parse, text, message):
    with pytest.raises(ArgumentTypeError, match=message):
        parse(text)


def test_places_to_write_are_tried(tmp_path):
    (tmp_path / "file").write_text("")
    assert arguments.writable(str(tmp_path / "new" / "deep")) == str(tmp_path / "new" / "deep")
    assert arguments.writable_file(str(tmp_path / "trace.json"))
    for text, message in (
        (tmp_path / "file" / "new", "is a file, expected a folder"),
        ("", "empty"),
    ):
        with pytest.raises(ArgumentTypeError, match=message):
            arguments.writable(str(text))
    with pytest.raises(ArgumentTypeError, match="is a folder, expected the name of a file"):
        arguments.writable_file(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files, even from root")
def test_a_folder_that_takes_no_files_is_named():
    with pytest.raises(ArgumentTypeError, match="cannot write into /proc"):
        arguments.writable("/proc/new")


def test_errors_of_the_parser_are_one_line(capsys):
    parser = Parser(prog="resae train")
    parser.add_argument("--lr", type=arguments.real(above=0))
    assert math.isclose(parser.parse_args(["--lr", "0.1"]).lr, 0.1)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--lr", "-1"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "resae train: argument --lr: '-1': expected a number above 0 (see resae train --help)\n"
    )
