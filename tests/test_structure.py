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


KERNEL_FLOORS = [
    {"step"},
    {"screened", "chain"},
    {"encode", "decode"},
    {"gradients"},
    {"dense"},
    {"dispatch"},
    {"triton.step"},
    {"triton.encode", "triton.decode", "cpu.encode"},
    {"triton.encode_few"},
    {"triton.residual"},
    {"cpu.sums", "cpu.screening_native", "cpu.screening_torch"},
    {"cpu.selection", "cpu.onednn", "triton.tiles"},
    {"cpu.native", "cpu.screening_bounds", "triton.keys"},
    {"cpu.private_torch", "cpu.build_native", "triton.runtime"},
    {"checks", "memory", "precision", "reference"},
    {"types"},
]
KERNEL_FLOOR_OF = {name: number for number, names in enumerate(KERNEL_FLOORS) for name in names}


def kernel_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "resae_kernels").with_suffix("").parts)


KERNEL_SOURCES = {
    kernel_module(p): p
    for p in sorted((ROOT / "resae_kernels").rglob("*.py"))
    if p.stem != "__init__"
}
PROFILING = {m for m in KERNEL_SOURCES if m.startswith("profiling.")}
"""Above all floors: it may import everything here, and nothing here imports it."""


def kernels_imported(path: Path) -> dict[str, set[str]]:
    """The modules of `resae_kernels` that a file imports, and the names it takes from each."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        package, _, module = (node.module or "").partition(".")
        if package != "resae_kernels":
            continue
        for alias in node.names:
            submodule = f"{module}.{alias.name}".lstrip(".")
            if submodule in KERNEL_SOURCES:
                found.setdefault(submodule, set())
            else:
                found.setdefault(module, set()).add(alias.name)
    return found


@pytest.mark.parametrize("module", [m for m in KERNEL_SOURCES if m not in PROFILING])
def test_imports_of_the_kernels_go_down(module):
    """Backends know neither ops nor each other."""
    backend = module.partition(".")[0]
    for other in kernels_imported(KERNEL_SOURCES[module]):
        assert KERNEL_FLOOR_OF[other] > KERNEL_FLOOR_OF[module], f"{module} imports {other}"
        if backend in ("cpu", "triton"):
            assert not {"cpu", "triton"} - {backend} & {other.partition(".")[0]}, other


NAMED_TUPLE = {"_fields", "_replace", "_asdict", "_make"}
"""Public methods of named tuples, underscored so as not to be taken for fields."""


def test_no_private_name_crosses_the_border_of_a_file():
    for package in ("resae_kernels", "resae", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            for module, names in kernels_imported(path).items():
                private = {name for name in names if name.startswith("_")}
                assert not private, f"{path} takes {private} from resae_kernels.{module}"
            tree = ast.parse(path.read_text())
            modules = {
                alias.asname or alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("resae_kernels")
                for alias in node.names
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
                    private = node.attr.startswith("_") and node.attr not in NAMED_TUPLE
                    assert not private, f"{path}: {ast.unparse(node)}"


def test_private_interfaces_of_torch_are_in_one_file():
    for module, path in KERNEL_SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if module != "cpu.private_torch" and isinstance(node, ast.Attribute):
                root, *rest = ast.unparse(node).split(".")
                private = [name for name in rest if name.startswith("_")]
                assert root != "torch" or not private, f"{module}: {ast.unparse(node)}"


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
