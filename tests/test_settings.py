"""Settings classes: read from text, from files, and told in help."""

import json
from argparse import ArgumentTypeError
from dataclasses import MISSING, dataclass, fields, replace
from importlib import import_module
from typing import Annotated

import pytest

from resae.arguments import numbers, whole
from resae.cli import COMMANDS
from resae.cli.options import help_text
from resae.settings import Shown, make, read_file, settings_of
from resae.training import RunConfig, TrainConfig
from resae.training.config import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size. Not part of the title."""

    width: Annotated[int, whole(1), Shown("W", positional=True)]
    """Of each
    row."""


@dataclass(frozen=True, kw_only=True)
class Plot(Size):
    """Plot."""

    style: Annotated[str, ("thin", "thick")] = "thin"
    """How lines are drawn."""
    marks: Annotated[tuple[int, ...] | None, numbers] = None
    """Where points are marked; None: everywhere."""
    grid: bool = False
    """Draw a grid."""


def test_a_setting_is_told_once_in_its_class():
    found = {s.name: s for s in settings_of(Plot)}
    assert list(found) == ["style", "marks", "grid", "width"]
    assert [s.group for s in found.values()] == ["Plot"] * 3 + ["Size. Not part of the title"]
    width, style, marks, grid = (found[name] for name in ("width", "style", "marks", "grid"))
    assert (width.help, width.default, width.shown) == ("Of each row.", MISSING, Shown("W", True))
    assert (style.choices, style.default) == (("thin", "thick"), "thin")
    assert grid.parse is None
    assert marks.parse is numbers
    assert help_text(style) == "How lines are drawn (default: thin)"
    assert help_text(marks) == "Where points are marked; default: everywhere."
    with pytest.raises(ArgumentTypeError, match="from 1 on"):
        width.parse("0")


def test_an_annotation_that_is_no_reader_is_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        """Wrong."""

        size: Annotated[int, 3] = 1
        """Of it."""

    with pytest.raises(AssertionError, match="size: 3"):
        settings_of(Wrong)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command):
    for setting in settings_of(import_module(f"resae.cli.{command}").Options):
        assert setting.help, setting.name
        if setting.default is not MISSING and setting.choices:
            assert setting.default in (None, *setting.choices)


def test_what_a_run_and_its_training_have_in_common_is_declared_once():
    common = {f.name for f in fields(TrainingSettings)}
    for cls in (TrainConfig, RunConfig):
        assert not common & vars(cls).get("__annotations__", {}).keys()
        assert common <= {f.name for f in fields(cls)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plot.toml", 'width = 4\nstyle = "thick"\nmarks = [1, 3]\ngrid = true\n'),
        ("plot.json", '{"width": 4, "style": "thick", "marks": [1, 3], "grid": true}'),
        (
            "run.json",
            '{"command": "plot", "config": '
            '{"width": 4, "style": "thick", "marks": [1, 3], "grid": true}}',
        ),
    ],
)  # fmt: skip
def test_files_give_the_same_settings(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    values = read_file(tmp_path / name, Plot)
    assert make(Plot, values) == Plot(width=4, style="thick", marks=(1, 3), grid=True)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.toml", "widht = 3", ValueError, "sets widht.* did you mean width"),
        ("a.toml", "width = 0", ValueError, "width = 0: '0': expected a whole number from 1 on"),
        ("a.toml", "width = true", ValueError, "width = true: expected"),
        ("a.toml", 'style = "dotted"', ValueError, "expected thin, thick"),
        ("a.toml", "grid = 1", ValueError, "expected true or false"),
        ("a.toml", "width: 3", ValueError, "is not TOML"),
        ("a.json", "{", ValueError, "is not valid JSON"),
        ("a.json", "[1]", ValueError, "holds no settings"),
        ("a.toml", None, FileNotFoundError, "no file"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_hold(name, text, error, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_file(tmp_path / name, Plot)


def test_required_settings_are_named():
    with pytest.raises(ValueError, match="width: missing"):
        make(Plot, {"style": "thick"})


def test_a_run_config_comes_back_from_json(tmp_path):
    config = RunConfig(
        model="embedded",
        data="embedded",
        layers=("1", "blocks.3.hook_mlp_out"),
        k_per_layer=(4, 8),
        d_sae=(64, 96),
        prefix_gain=1 / 3,
        lr=3e-3,
        autocast=True,
        predictor="all_previous",
        out=str(tmp_path / "run"),
    )
    record = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "resume"}
    (tmp_path / "run.json").write_text(json.dumps({"config": record}))
    assert RunConfig.load(tmp_path / "run.json") == config
    other = RunConfig.load(tmp_path / "run.json", seed=3)
    assert other == replace(config, seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None}, "are both missing"),
        ({"k_per_layer": (4, 4)}, "not allowed with each other"),
        ({"maps": "a", "boost": "b"}, "leave one out"),
        ({"cache_dtype": "float16"}, "without --cache"),
        ({"eval_steps": 2, "held_out_rows": 0}, "hold rows out"),
        ({"eval_steps": 2, "model_device": "auto"}, "--model-device auto"),
    ],
)
def test_settings_of_a_run_that_do_not_go_together(changes, message):
    given = {"model": "m", "data": "d", "k": 4, "out": "o"}
    with pytest.raises(ValueError, match=message):
        RunConfig(**given | changes)
