"""The floors of the house: a file imports only from floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resae
import resae_kernels

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"__main__"},
    {"cli"},
    {"demo", "report"},
    {"evaluate", "plan", "findings"},
    {"train", "replace"},
    {"intervene", "activation_cache", "decode_loop", "distributed"},
    {"stack"},
    {"data", "affine", "sae"},
    {"model"},
    {"metrics", "arguments", "text_record", "watch"},
    {"storage", "environment", "assets", "threads", "choices", "recipes"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(p for p in (ROOT / "resae").glob("*.py") if p.stem != "__init__")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def test_every_source_file_has_a_floor_and_a_test():
    assert {p.stem for p in SOURCES} == set(FLOOR_OF) - {"assets"}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert set(FLOOR_OF) - tests <= {"__main__"}  # one line, seen by test_cli


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_imports_go_down(path):
    for module in imported(path):
        if module.startswith("resae."):
            name = module.split(".")[1]
            assert FLOOR_OF[name] > FLOOR_OF[path.stem], f"{path.stem} imports {name}"


def test_kernels_know_no_model_and_autoencoders_no_transformers():
    for path in (ROOT / "resae_kernels").rglob("*.py"):
        outside = {m.split(".")[0] for m in imported(path)} - sys.stdlib_module_names
        builds = {"hatchling"} if path.stem == "build_native" else set()
        assert outside <= {"torch", "triton", "numpy", "resae_kernels"} | builds, path
    assert not any(m.startswith("transformers") for m in imported(ROOT / "resae" / "sae.py"))
    model = imported(ROOT / "resae" / "model.py")
    assert {m for m in model if m.startswith("resae")} == {"resae.assets"}


def test_nothing_reads_the_environment_or_prints():
    for package in ("resae", "resae_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "environ" not in text.replace("environment", ""), path
            assert "getenv" not in text, path


@pytest.mark.parametrize("package", [resae, resae_kernels], ids=lambda p: p.__name__)
def test_everything_exported_is_there_and_documented(package):
    assert sorted(package.__all__, key=str) == sorted(set(package.__all__), key=str)
    for name in package.__all__:
        thing = getattr(package, name)
        if callable(thing) or isinstance(thing, type):
            assert thing.__doc__, name


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, with these packages, from whatever folder."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


HEAVY = {"torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets", "matplotlib"}
"""What importing costs as much as torch, or nearly; `triton` a tenth of it."""


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import resae_kernels", HEAVY | {"triton"}),
        ("import resae", HEAVY | {"triton", "torch"}),
        ("from resae import *", HEAVY | {"triton"}),
        ("import resae.cli", HEAVY | {"triton", "torch"}),
    ],
)
def test_importing_says_and_loads_nothing_heavy(statement, absent):
    done = run_python(f"{statement}\nimport sys\nassert not {absent} & set(sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["trian"], 2),
        (["train", "embedded", "embedded", "--layrs", "1"], 2),
        (["profile", "encoed"], 2),
        ([], 2),
    ],
)
def test_the_command_line_reads_its_arguments_without_torch(arguments, exit_code):
    done = run_python(
        f"""
import sys
from resae.cli import main
try:
    main({arguments})
except SystemExit as ended:
    assert not {HEAVY | {"torch"}} & set(sys.modules)
    sys.exit(ended.code)
"""
    )
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr


def test_names_imported_on_demand_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "resae" / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        node.module: {alias.name for alias in node.names}
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == {f"resae.{module}": set(names) for module, names in resae._MODULES.items()}
    assert sorted(resae.__all__) == sorted(name for names in seen.values() for name in names)
    assert set(resae.__all__) <= set(dir(resae))


def test_functions_stay_functions_where_modules_of_their_names_are_imported():
    done = run_python(
        """
import resae.evaluate, resae.train
from resae.train import TrainConfig
assert resae.train.__name__ == "train" and callable(resae.train) and callable(resae.evaluate)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_mistyped_name_is_an_error_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'resae' has no attribute 'Resae'"):
        resae.Resae  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Resae' from 'resae'"):
        from resae import Resae  # noqa: F401
