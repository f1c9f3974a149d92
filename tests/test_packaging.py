"""Version, distributions, pins and continuous integration agree with each other."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import resae
import resae_kernels

ROOT = Path(__file__).parent.parent
WHOLE, ALONE = (
    tomllib.loads((folder / "pyproject.toml").read_text())
    for folder in (ROOT, ROOT / "resae_kernels")
)
"""The distribution `resae`, and `resae-kernels`, which holds the kernels alone."""


def test_both_distributions_and_packages_have_one_version():
    assert resae.__version__ == resae_kernels.__version__
    assert WHOLE["project"]["dynamic"] == ALONE["project"]["dynamic"] == ["version"]
    sources = (
        ROOT / WHOLE["tool"]["hatch"]["version"]["path"],
        ROOT / "resae_kernels" / ALONE["tool"]["hatch"]["version"]["path"],
    )
    assert {path.resolve() for path in sources} == {Path(resae_kernels.__file__)}


def test_the_kernels_alone_need_no_more_than_they_import():
    needed = {re.split(r"\W", line)[0]: line for line in ALONE["project"]["dependencies"]}
    assert set(needed) == {"torch", "triton", "numpy"}  # what `test_structure` lets them import
    assert set(needed.values()) <= set(WHOLE["project"]["dependencies"])


def test_the_kernels_alone_have_the_license_of_the_project():
    assert (ROOT / "resae_kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_both_distributions_have_the_same_files_of_the_kernels():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    whole, alone = (
        {
            file.distribution_path
            for file in wheel.WheelBuilder(str(folder)).recurse_included_files()
        }
        for folder in (ROOT, ROOT / "resae_kernels")
    )
    assert alone == {path for path in whole if path.startswith("resae_kernels/")}
    assert {"resae_kernels/py.typed", "resae_kernels/cpu/native.c"} <= alone
    assert {f"resae_kernels/{name}" for name in ("LICENSE", "pyproject.toml")}.isdisjoint(whole)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_template_of_the_report_is_distributed(kind):
    builders = pytest.importorskip(f"hatchling.builders.{kind}")
    builder = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    found = {
        Path(file.relative_path).name
        for file in getattr(builders, builder)(str(ROOT)).recurse_included_files()
        if "resae/report/template/" in f"/{file.relative_path}"
    }
    assert found == {"page.html", "page.css", "page.js", "chain.svg"}


ENCODE = """
import sys
sys.modules |= dict.fromkeys(("resae", "transformers", "datasets", "pyarrow", "safetensors"))
import torch, resae_kernels
from resae_kernels.cpu import native
weight, x = torch.randn(64, 8, requires_grad=True), torch.randn(3, 8)
acts, indices = resae_kernels.topk_encode(x, weight, None, 4)
resae_kernels.sparse_decode(acts, indices, weight).sum().backward()
print(resae_kernels.__file__, native.unavailable(), sep="\\n")
"""


def test_a_wheel_of_the_kernels_alone_encodes_and_decodes(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    built = shutil.ignore_patterns("__pycache__", "*.so")
    project = shutil.copytree(ROOT / "resae_kernels", tmp_path / "project", ignore=built)
    [path] = wheel.WheelBuilder(str(project)).build(
        directory=str(tmp_path / "dist"), versions=["standard"]
    )
    installed = tmp_path / "installed"
    zipfile.ZipFile(path).extractall(installed)
    [info] = installed.glob("*.dist-info")
    assert info.name == f"resae_kernels-{resae_kernels.__version__}.dist-info"
    assert (info / "licenses" / "LICENSE").exists()
    done = subprocess.run(
        [sys.executable, "-c", ENCODE],
        capture_output=True,
        text=True,
        check=False,
        cwd=installed,
    )
    assert done.returncode == 0, done.stderr
    source, unavailable = done.stdout.splitlines()
    assert Path(source) == installed / "resae_kernels" / "__init__.py"
    if platform.machine() == "x86_64" and shutil.which("cc"):
        assert unavailable == "None" or unavailable.startswith("this processor has no")


def test_pre_commit_formats_with_the_version_of_the_gate():
    extras = WHOLE["project"]["optional-dependencies"]
    pinned = [r for r in extras["test"] if r.startswith("ruff")]
    used = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(used) == 2
    assert set(used) == set(pinned)


def test_continuous_integration_runs_the_gate():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
