"""Record of a process's environment; devices; and the allocator's setting, seen in the page faults
of a fresh process."""

import json
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from resae import environment

PROGRAM = """
import resource, torch
from resae.environment import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# glibc's thread cache first takes up to 7 remainders of aligned blocks, each of which keeps a freed
# block apart from the top of the heap.
for _ in range(10):
    torch.ones(12 << 20)
before = faults()
for _ in range(10):
    torch.ones(12 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    def faults(keep):
        command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults(True) * 10 < faults(False)


def git(*arguments, folder):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_source_that_runs_is_recorded(tmp_path, monkeypatch):
    source = tmp_path / "resae" / "environment.py"
    source.parent.mkdir()
    shutil.copy(environment.__file__, source)
    monkeypatch.setattr(environment, "__file__", str(source))
    git("init", "-q", folder=tmp_path)
    git("add", "-A", folder=tmp_path)
    git("commit", "-qm", "first", folder=tmp_path)
    git("tag", "-am", "a tag has no say", "v1", folder=tmp_path)
    head = git("rev-parse", "HEAD", folder=tmp_path)
    assert environment.commit() == environment.environment()["commit"] == head
    source.write_text("changed")
    assert environment.commit() == f"{head}-dirty"


def test_the_commit_of_an_installed_package_is_where_it_came_from(tmp_path, monkeypatch):
    class Installed:
        files = {"direct_url.json": json.dumps({"vcs_info": {"commit_id": "abc"}})}

        def read_text(self, name):
            return self.files.get(name)

    monkeypatch.setattr(environment, "__file__", str(tmp_path / "resae" / "environment.py"))
    monkeypatch.setattr(environment, "distribution", lambda _: Installed())
    assert environment.commit() == "abc"
    Installed.files = {}
    assert environment.commit() is None


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.find_device("auto") == "cuda"
    assert environment.find_device("cuda:1") == "cuda:1"
    assert environment.find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"device 'cuda:2'.*finds 2 GPUs.*cuda:0 to cuda:1"):
        environment.find_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.find_device("auto") == "cpu"
    with pytest.raises(ValueError, match=r"device 'cuda': torch .* finds 0 GPUs; choose cpu"):
        environment.find_device("cuda")
