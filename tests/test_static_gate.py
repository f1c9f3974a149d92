"""Every kernel compiles for the architectures it is meant for, to the machine code it is meant
to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import static_gate


def test_machine_code_of_every_kernel(tmp_path):
    # A process of its own: here kernels are defined for the interpreter. A cache of its own: what
    # is asserted is what is compiled now.
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, static_gate.__file__],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if run.returncode == static_gate.SKIPPED:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
