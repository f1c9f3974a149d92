"""The READMEs: their Python blocks run, their commands parse or run, links and numbers hold."""

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from resae.cli import main

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "resae_kernels/README.md",
    "resae/README.md",
    "bench/README.md",
    ".github/CONTRIBUTING.md",
)
SMALL = {
    "fit": "--calibration-tokens 2048 --held-out-rows 4",
    "train": "--train-tokens 4096 --calibration-tokens 2048 --held-out-rows 4 --d-sae 64",
    "finetune": "--train-tokens 4096",
    "eval": "--held-out-rows 4",
    "report": "",
    "convert": "",
    "inspect": "",
    "generate": "--max-new-tokens 4",
}
"""Commands that run as they stand but for these options, appended. All others are parsed only."""
ELSEWHERE = "EleutherAI/"
"""A command on a model of this hub name needs a download: it is parsed only."""
TOOLS = ("pip", "pre-commit", "pytest", "ruff", "pyright", "pdoc")
"""Programs that are not run: what their commands name must be there."""
WORDS = {"install", "pre-commit", "check", "format", "loadfile"}
"""Arguments of these that name no file."""


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    """Line number of its first line of code, counted from 1."""
    source: str


def blocks_of(text: str) -> list[Block]:
    found = re.finditer(r"^```(python|bash|json)\n(.*?)^```$", text, re.M | re.S)
    return [Block(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


class Page:
    """Runs the blocks of one README in order, with one set of names."""

    def __init__(self, path: Path):
        self.path = path
        self.blocks = blocks_of(path.read_text())
        self.names: dict[str, Any] = {"__name__": "readme"}
        self.done = 0

    def run(self, index: int) -> None:
        """Run every block up to this one that has not run yet."""
        while self.done <= index:
            block = self.blocks[self.done]
            self.done += 1
            if block.language == "python":
                padding = "\n" * (block.line - 1)  # so that a traceback names lines of the README
                exec(compile(padding + block.source, str(self.path), "exec"), self.names)
            elif block.language == "bash":
                for words in commands_of(block.source):
                    check_command(words)
            else:
                json.loads(block.source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder in which the commands of all pages run: a page may continue a run of another one."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def pages():
    return {path: Page(ROOT / path) for path in PAGES}


ALL_BLOCKS = [
    pytest.param(path, index, id=f"{path}:{block.line}")
    for path in PAGES
    for index, block in enumerate(blocks_of((ROOT / path).read_text()))
]


@pytest.mark.parametrize(("path", "index"), ALL_BLOCKS)
def test_block_of_readme(path, index, pages, folder, monkeypatch):
    monkeypatch.chdir(folder)
    pages[path].run(index)


# -- commands --------------------------------------------------------------------------------------


def commands_of(source: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments and `NAME=value` in front."""
    found = []
    for line in source.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            found.append(command)
    return found


def check_command(words: list[str]) -> None:
    """Run or parse one command.

    Raises:
        AssertionError: a program that this test does not know, or a command that is wrong.
    """
    program, *arguments = words
    if program == "resae":
        if arguments[0] in SMALL and not any(word.startswith(ELSEWHERE) for word in words):
            run_small(tuple(arguments), Path.cwd())
        else:
            parse_only(main, arguments, "resae")
    elif words[:3] == ["python", "-m", "venv"] or program == ".":
        pass
    elif program == "python":
        script = ROOT / arguments[0]
        assert script.is_file(), script
        if script.parent.name == "bench":
            parse_only(main_of(script), arguments[1:], script.name)
    elif program in TOOLS:
        check_tool(words)
    else:
        script = ROOT / program
        assert os.access(script, os.X_OK), f"unknown program {program!r}"


@cache
def run_small(arguments: tuple[str, ...], folder: Path) -> None:  # noqa: ARG001
    """Run a command of `resae`, made small; the same one in the same folder only once."""
    try:
        code = main([*arguments, *SMALL[arguments[0]].split()])
    except SystemExit as ended:
        code = ended.code
    assert code == 0, f"resae {shlex.join(arguments)}: exit code {code}"


class Parsed(Exception):
    """Arguments were read without complaint."""


def parse_only(run, arguments: list[str], name: str) -> None:
    """Call `run`, which reads `arguments`, and stop it when it has read them."""
    read = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        read(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            run()
        except Parsed:
            return
        except SystemExit as ended:
            pytest.fail(f"{shlex.join([name, *arguments])}: exit code {ended.code}")
    pytest.fail(f"{name} read no arguments")


def main_of(script: Path):
    """`main` of a script of bench/, imported under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"readme_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up
        spec.loader.exec_module(module)
    return module.main


def check_tool(words: list[str]) -> None:
    """Look up the extras, files and modules that a command names."""
    for before, word in pairwise(words):
        extras = re.fullmatch(r"\.\[(.+)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(project()["optional-dependencies"]), word
        elif (
            re.fullmatch(r"(\./)?[a-z][\w/-]*(\.py)?", word)
            and before != "-o"
            and word not in WORDS
        ):
            assert (ROOT / word).exists(), word


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "command",
    [
        "resae trian embedded",
        "resae train embedded embedded --layrs 1",
        "python bench/ops.py --outt results",
        "python bench/gone.py --out results",
        'pip install -e ".[plotz]"',
        "pytest tests/test_gone.py",
        "rease demo",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(shlex.split(command))


def test_a_failing_block_is_found_by_its_line(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("Text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    broken = Page(readme)
    broken.run(0)
    with pytest.raises(AssertionError) as failure:
        broken.run(1)
    assert (failure.traceback[-1].path, failure.traceback[-1].lineno + 1) == (readme, 8)


# -- what the pages say ----------------------------------------------------------------------------


def test_front_page_is_short_and_names_the_commands_of_the_gate():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "\npip install torch==2.13.0 -e . && resae demo\n" in text
    install, test = re.findall(r'^(pip install .*\.\[test\]") && (pytest .*)$', text, re.M)[0]
    gate = (ROOT / ".ci" / "run").read_text()
    assert f"\n{test}\n" in gate
    assert "torch==2.13.0" in install
    assert "torch==2.13.0" in gate


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_files(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), f"{path}: {target}"


def table_under(path: str, header: str) -> list[list[str]]:
    """The cells of each row of the table whose header line begins so, without marks of bold."""
    lines = iter((ROOT / path).read_text().splitlines())
    assert any(line.startswith(header) for line in lines), header
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


METHODS = {
    "raw SAEs": ("raw", None),
    "raw SAEs, equal total k": ("raw_equal_total", None),
    "identity residual": ("identity", "closed"),
    "identity residual, closed loop": ("identity", "closed"),
    "identity residual, open loop": ("identity", "open"),
    "ReSAE": ("resae", "closed"),
    "ReSAE, closed loop": ("resae", "closed"),
    "ReSAE, open loop": ("resae", "open"),
}
"""Method and loop in `report.json` of the rows that the tables name so."""


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "bench/results/demo/report.json").read_text())


def lost(report, method: str, loop: str | None, mode: str, k: int | None) -> str:
    """Δ CE with all layers of the demo replaced, as the tables print it."""
    [row] = [
        row
        for row in report["replacement"]
        if (row["method"], row["loop"], row["mode"], row["k"]) == (method, loop, mode, k)
        and len(row["layers"]) == 3
    ]
    return f"{row['delta_ce']:.2f}"


FRONT_PAGE = {
    "raw SAEs": ("raw", "raw", None),
    "raw SAEs, equal total k": ("raw_equal_total", "raw_equal_total", None),
    "identity residual": ("identity_closed", "identity", "closed"),
    "ReSAE": ("resae_closed", "resae", "closed"),
    "ReSAE, tuned online": (None, "resae_online", "closed"),
    "affine maps alone": ("affine_only", "affine_only", None),
}
"""Row of the table → method of the study, method and loop of the demo."""


def test_losses_on_the_front_page_are_those_measured(report):
    study = json.loads((ROOT / "bench/results/real/smollm2-135m/results.json").read_text())
    losses = {
        (row["method"], row["mode"]): row["delta_ce"]
        for row in study["methods"]
        if (row["spacing"], row["k"], row["loop"]) == ("far", 32, "closed")
    }
    modes = ("online", "teacher_forced")
    for name, *cells in table_under("README.md", "| | SmolLM2, online |"):
        studied, method, loop = FRONT_PAGE[name]
        of_study = []
        for mode in modes:
            loss = losses.get((studied, mode))
            interval = "" if loss is None else f" [{loss['low']:.2f}, {loss['high']:.2f}]"
            of_study.append("–" if loss is None else f"{loss['value']:.2f}{interval}")
        k = None if method == "affine_only" else 8
        assert cells == [*of_study, *(lost(report, method, loop, mode, k) for mode in modes)], name


def test_shares_of_accelerated_forwards_are_those_measured():
    measured = {}
    for line in (ROOT / "bench/results/cpu/xeon/dropin.md").read_text().splitlines():
        if line.startswith("| ") and " forward " in line:
            library, D, M, _, tokens, *_, share = (
                cell.strip() for cell in line.strip("|").split("|")
            )
            measured[library, f"{int(D):,}, {M}", tokens] = share
    libraries = ("sae_lens", "sparsify", "dictionary_learning")
    for sizes, *cells in table_under("README.md", "| D, M | SAELens 6.54, 1 token |"):
        expected = [measured[library, sizes, n] for library in libraries for n in ("1", "256")]
        assert cells == expected, sizes


def test_losses_and_cosines_of_the_method_are_those_of_the_report(report):
    cosines = {(r["method"], r["k"]): r["mean_max_cos"] for r in report["redundancy"]}
    *methods, _ = table_under("resae/README.md", "| | online k=4 |")
    for row, *cells in methods:
        method, loop = METHODS[row]
        modes = ("online", "teacher_forced")
        measured = [lost(report, method, loop, mode, k) for mode in modes for k in (4, 8, 32)]
        measured += [f"{cosines[method, k]:.2f}" for k in (4, 8, 32)]
        assert cells == measured, row


FAIR = ("raw", "raw_equal_total", "raw_matched", "raw_wide", "identity", "resae")


def test_fair_rows_are_those_measured():
    methods = json.loads((ROOT / "bench/results/demo/methods.json").read_text())
    rows = {row["method"]: row for row in methods["fair"] if row["k"] == 8}
    table = table_under("resae/README.md", "| | latents by layer |")
    for method, (name, latents, *cells) in zip(FAIR, table, strict=True):
        assert latents == ", ".join(map(str, rows[method]["d_sae"])), name
        for suffix, cell in zip(("", "_best_lr", "_long"), cells, strict=True):
            row = rows[method + suffix]
            measured = f"{row['online']:.2f} ({row['teacher_forced']:.2f})"
            rate = f", {row['lr'][0]:.1e}".replace("e-0", "e-") if suffix == "_best_lr" else ""
            assert cell.replace("*", "") == measured + rate, f"{name}{suffix}"


@pytest.mark.parametrize(
    ("path", "providers"),
    [
        (
            "bench/README.md",
            "resae, encoder GEMM, oneDNN, sparsify, SAELens, SAELens sparse, dictionary_learning",
        ),
    ],
)
def test_times_in_the_tables_are_those_measured(path, providers):
    for case, tokens, *cells in table_under(path, "| model, D, M, dtype |"):
        _, D, M, dtype = (part.replace(",", "") for part in case.split(", "))
        results = ROOT / "bench/results/cpu/real" / dtype / "ops.csv"
        with results.open(newline="") as lines:
            ms = {
                row["provider"]: float(row["ms_p50"])
                for row in csv.DictReader(lines)
                if (row["op"], row["N"], row["D"], row["M"], row["k"], row["cache"])
                == ("forward", tokens.replace(",", ""), D, M, "32", "hot")
            }
        for provider, cell in zip(providers.split(", "), cells, strict=True):
            assert cell == (f"{ms[provider]:.3g}" if provider in ms else "–"), (case, provider)


@pytest.mark.parametrize(
    ("path", "dtypes", "ops", "latents"),
    [
        ("README.md", "float32", "encode forward", range(4096, 1 << 20)),
        ("bench/README.md", "float32", "encode forward", range(4096, 1 << 20)),
        ("bench/README.md", "bfloat16", "encode forward", range(4096, 1 << 20)),
        ("bench/README.md", "float32 bfloat16", "decode", range(4096, 1 << 20)),
        ("bench/README.md", "float32 bfloat16", "decode", range(512, 513)),
    ],
)
def test_shares_of_the_fastest_peers_time_are_those_measured(path, dtypes, ops, latents):
    shares = []
    for dtype in dtypes.split():
        with (ROOT / "bench/results/cpu/real" / dtype / "ops.csv").open(newline="") as lines:
            shares += [
                float(row["x_peer"])
                for row in csv.DictReader(lines)
                if row["provider"] == "resae"
                and row["op"] in ops.split()
                and int(row["M"]) in latents
            ]
    assert f"{min(shares):.2f} to {max(shares):.2f}" in (ROOT / path).read_text()


def test_shares_of_a_threshold_encode_are_those_measured():
    with (ROOT / "bench/results/cpu/xeon/threshold/ops.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = ("encoder GEMM", "SAELens JumpReLU", "dense PyTorch", "oneDNN")
    table = table_under("bench/README.md", "| D, M, dtype | tokens | ours, ms |")
    assert len(table) == len({(row["D"], row["M"], row["dtype"], row["N"]) for row in rows}) == 24
    for case, tokens, ours, *shares in table:
        key = *(part.replace(",", "") for part in case.split(", ")), tokens.replace(",", "")
        by = {r["provider"]: r for r in rows if (r["D"], r["M"], r["dtype"], r["N"]) == key}
        assert ours == f"{float(by['resae']['ms_p50']):.3g}", case
        assert shares == [f"{float(by[name]['ours_x']):.2f}" for name in names], case
    for path, providers in (
        ("bench/README.md", ("encoder GEMM", "SAELens JumpReLU", "oneDNN")),
        ("resae_kernels/README.md", ("SAELens JumpReLU",)),
    ):
        for provider in providers:
            for dtype in ("float32", "bfloat16"):
                found = [
                    float(row["ours_x"])
                    for row in rows
                    if (row["provider"], row["dtype"]) == (provider, dtype)
                ]
                text = f"{min(found):.2f} to {max(found):.2f}"
                assert text in " ".join((ROOT / path).read_text().split()), (path, provider)


def test_speed_of_generation_is_that_measured():
    places = {
        "Pythia-160m shape, Xeon": "xeon/generate.csv",
        "embedded, Xeon": "xeon/embedded/generate.csv",
        "Pythia-160m shape, AMD EPYC, earlier commit": "generate.csv",
    }
    for case, *cells in table_under("bench/README.md", "| | ours | hooks, dense PyTorch |"):
        where, rows = case.rsplit(", ", 1)
        with (ROOT / "bench/results/cpu" / places[where]).open(newline="") as lines:
            found = [row for row in csv.DictReader(lines) if row["batch"] == rows.split()[0]]
        speeds = {row["provider"]: float(row["tokens_per_s"]) for row in found}
        plain = speeds.pop("plain")
        assert cells == [f"{speed / plain:.2f}" for speed in speeds.values()], case
