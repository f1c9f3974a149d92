"""The allocator's setting, seen in the page faults of a fresh process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from resae.environment import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
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
