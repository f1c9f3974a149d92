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


LOAD = "LDG.E.128 R{0}, desc[UR4][R2.64]"
USE = "FFMA R1, R{0}, R1, R1"


def machine_code(*body: str) -> list[str]:
    """A loop around `body`, behind loads that are in no loop."""
    ahead = [LOAD.format(r) for r in range(4, 44, 4)]
    return [*ahead, "FADD R1, R4, R1", ".L_x_0:", *body, "BRA `(.L_x_0)", "EXIT"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([LOAD.format(4), LOAD.format(8), USE.format(4), USE.format(11)], 2),
        ([LOAD.format(4), USE.format(5), LOAD.format(8), USE.format(8)], 1),
        # An address that was loaded is a use, too.
        ([LOAD.format(4), LOAD.format(8), "LDG.E.128 R12, desc[UR4][R8.64]", USE.format(12)], 2),
        ([LOAD.format(4), "LDG.E.64 R8, desc[UR4][R2.64]", USE.format(4)], 1),
        ([LOAD.format(4), "LDG.E.EF.128 R8, desc[UR4][R2.64]", USE.format(4)], 2),
        ([LOAD.format(4), LOAD.format(8), "FADD R1, R4, R1"], 10),  # no loop multiplies
    ],
)
def test_loads_in_flight_are_those_before_the_first_use(body, expected):
    assert static_gate.loads_in_flight(machine_code(*body)) == expected


def test_the_loop_with_the_fewest_loads_in_flight_counts():
    many = machine_code(LOAD.format(4), LOAD.format(8), USE.format(4))
    few = [".L_x_1:", LOAD.format(4), USE.format(4), "BRA `(.L_x_1)"]
    assert static_gate.loads_in_flight([*many, *few]) == 1
