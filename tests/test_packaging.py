"""Version, pins and continuous integration agree with `pyproject.toml` and the gate."""

import os
import re
import tomllib
from pathlib import Path

import resae
import resae_kernels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_both_packages_have_the_version_of_the_project():
    assert resae.__version__ == resae_kernels.__version__ == PROJECT["version"]


def test_pre_commit_formats_with_the_version_of_the_gate():
    pinned = [r for r in PROJECT["optional-dependencies"]["test"] if r.startswith("ruff")]
    used = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(used) == 2
    assert set(used) == set(pinned)


def test_continuous_integration_runs_the_gate():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
