"""The floors of the house: a file imports only from floors below its own."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import resae
import resae_kernels
from resae.sae.registry import KINDS

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"__main__"},
    {"cli"},
    {"reproduce"},
    {"demo"},
    {"latents"},
    {"report"},
    {"training"},
    {"evaluation"},
    {"replacements"},
    {"stack"},
    {"interop"},
    {"data", "sae"},
    {"models"},
    {*("arguments", "assets", "choices", "console", "environment", "lazy", "settings", "storage")}
    | {"strict_json", "threads"},
]
"""Packages and single files of `resae`, from the top of the house down."""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(p for p in (ROOT / "resae").rglob("*.py") if p != ROOT / "resae" / "__init__.py")
ALLOWED = {
    "choices": {"strict_json"},
    "arguments": {"storage"},
    "settings": {"strict_json"},
    "storage": {"strict_json"},
}
"""Imports within the lowest floor."""


def module_of(path: Path) -> str:
    """Dotted name of a source file, below its package: `training.loop`."""
    parts = path.relative_to(ROOT / "resae").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


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


TESTED_BY = {
    "cli/test_cli.py": "__main__ cli.demo cli.eval cli.fit cli.generate cli.libraries "
    "cli.opened_runs cli.profile cli.report cli.train cli.tune training.baselines "
    "training.loggers training.runs",
    "cli/test_terminal.py": "console",
    "latents/test_cards.py": "latents.ablation latents.directions latents.prompt "
    "latents.records models.final_norm",
    "latents/test_collect.py": "latents.firings latents.index latents.passages",
    "latents/test_latents_page.py": "latents.neuronpedia latents.page",
    "data/test_batches.py": "data.activations data.config data.rows data.texts",
    "demo/test_demo.py": "demo.comparison demo.stages",
    "data/test_labelled.py": "data.public_labelled",
    "evaluation/test_comparison.py": "evaluation.methods evaluation.passes evaluation.rows",
    "evaluation/test_probing.py": "cli.probe evaluation.linear_probes "
    "evaluation.pooling evaluation.scores",
    "interop/test_formats.py": "cli.convert cli.inspect interop.dictionary_learning "
    "interop.gemma_scope interop.hub interop.inspection interop.mlsae interop.openai interop.own "
    "interop.saelens interop.sparsify",
    "interop/test_hostile_formats.py": "interop.files sae.files",
    "models/test_hooked.py": "models.points models.splice",
    "replacements/test_context.py": "replacements.active replacements.counts "
    "replacements.generation replacements.settings",
    "replacements/test_edits.py": "evaluation.effects",
    "report/test_graph_page.py": "cli.graph report.graph_record",
    "report/test_page.py": "evaluation.labels report.content report.figures report.headline "
    "report.rows report.sections report.styles report.tables report.words",
    "reproduce/test_claims.py": "reproduce.losses",
    "reproduce/test_study.py": "cli.reproduce reproduce.expected reproduce.figure "
    "reproduce.results reproduce.settings reproduce.summary",
    "sae/test_topk.py": "sae.base sae.boosted sae.losses sae.prefix sae.record sae.registry",
    "stack/test_affine.py": "evaluation.predictors stack.fit",
    "stack/test_foreign.py": "interop.objects",
    "stack/test_hub.py": "cli.push stack.card",
    "stack/test_stack.py": "models.identity stack.files stack.prepared",
    "test_arguments.py": "cli.options",
    "test_assets.py": "assets.build",
    "test_structure.py": "lazy",
    "training/test_loop.py": "training.calibration training.checkpoints training.loss "
    "training.start training.step",
    "training/test_online.py": "cli.finetune training.finetuning training.low_rank",
    "training/test_pipeline.py": "training.maps",
    "test_notebook.py": "stack.notebook",
    "test_settings.py": "training.config",
}
TESTED_IN = {module: file for file, modules in TESTED_BY.items() for module in modules.split()}
"""Modules without a test file of their own name, and the file that tests them."""


def test_every_source_file_has_a_floor_and_a_test():
    assert {module_of(p).split(".")[0] for p in SOURCES} == set(FLOOR_OF)
    for module in (module_of(p) for p in SOURCES if p.name != "__init__.py"):
        *package, name = module.split(".")
        own = Path(*package, f"test_{name}.py")
        assert (ROOT / "tests" / TESTED_IN.get(module, own)).exists(), module
        assert module not in TESTED_IN or not (ROOT / "tests" / own).exists(), module


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down(path):
    own = module_of(path).split(".")[0]
    for module in imported(path):
        if module.startswith("resae."):
            name = module.split(".")[1]
            below = FLOOR_OF[name] > FLOOR_OF[own] or name in ALLOWED.get(own, ())
            assert below or name == own, f"{module_of(path)} imports {module}"


def test_files_of_a_package_import_each_other_in_no_circle():
    graph = {}
    for path in SOURCES:
        modules = {m.removeprefix("resae.") for m in imported(path) if m.startswith("resae.")}
        graph[module_of(path)] = modules - {module_of(path)}
    TopologicalSorter(graph).prepare()


def test_no_module_bears_the_name_of_a_public_function():
    # A file of the command line bears the name of its command.
    modules = {
        m for path in SOURCES for m in module_of(path).split(".") if path.parent.name != "cli"
    }
    assert not modules & set(resae.__all__)
    for path in (p for p in SOURCES if p.name == "__init__.py"):
        package = importlib.import_module(f"resae.{module_of(path)}")
        for name in dir(package):
            if path.with_name(f"{name}.py").exists() or (path.parent / name).is_dir():
                assert isinstance(getattr(package, name), ModuleType), f"{package}.{name}"


def test_kernels_know_no_model_and_autoencoders_no_transformers():
    for path in (ROOT / "resae_kernels").rglob("*.py"):
        outside = {m.split(".")[0] for m in imported(path)} - sys.stdlib_module_names
        builds = {"hatchling"} if path.stem == "build_native" else set()
        assert outside <= {"torch", "triton", "numpy", "resae_kernels"} | builds, path
    for path in (ROOT / "resae" / "sae").glob("*.py"):
        modules = imported(path)
        assert not any(m.startswith(("transformers", "resae.models")) for m in modules), path
    for path in (ROOT / "resae" / "models").glob("*.py"):
        inside = {m for m in imported(path) if m.startswith("resae")}
        assert all(m == "resae.assets" or m.startswith("resae.models") for m in inside), path


def test_only_the_registry_asks_which_kind_an_autoencoder_is():
    kinds = {cls.__name__ for cls in KINDS.values()}
    for path in (p for p in SOURCES if p.stem != "registry"):
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass"):
                asked = {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)}
                assert not asked & kinds, f"{module_of(path)}, line {call.lineno}"


KERNEL_FLOORS = [
    {"step", "dropin", "autoencode"},
    {"accelerated"},
    {"screened", "chain"},
    {"threshold"},
    {"encode", "decode"},
    {"gradients"},
    {"dense"},
    {"dispatch"},
    {"triton.step"},
    {"triton.encode", "triton.decode", "triton.screening", "cpu.encode"},
    {"triton.gemm", "triton.selection", "triton.encode_few"},
    {"triton.residual", "triton.gemm_specialised"},
    {"cpu.sums", "cpu.screening_native", "cpu.screening_torch"},
    {"cpu.selection", "cpu.onednn", "triton.tiles"},
    {"cpu.native", "triton.keys"},
    {"triton.runtime"},
    {"cpu.private_torch", "cpu.build_native"},
    {"screening_bounds"},
    {"checks", "memory", "precision", "reference"},
    {"types", "files"},
    {"notebook"},
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
"""Modules whose import costs about as much as torch's; `triton` costs a tenth of it."""


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


def test_modules_and_functions_of_training_have_names_of_their_own():
    done = run_python(
        """
import resae.training.loop as t, resae.evaluation.comparison as e
assert callable(t.train) and callable(e.evaluate)
import resae
assert resae.train is t.train and resae.evaluate is e.evaluate
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_mistyped_name_is_an_error_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'resae' has no attribute 'Resae'"):
        resae.Resae  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Resae' from 'resae'"):
        from resae import Resae  # noqa: F401  # pyright: ignore
