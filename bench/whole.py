"""Whole processes: wall time, CPU time and peak memory of a command, start-up included."""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Resources used by one process, including its threads and children."""

    wall: float
    """Seconds from start to end."""
    cpu: float
    """Seconds of user and system time."""
    peak_mib: float
    """Resident memory at most."""


def run(
    command: Sequence[str],
    *,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    exit_codes: Sequence[int] = (0,),
) -> Usage:
    """Run a command in `folder` and wait for it.

    Raises:
        RuntimeError: it ended with none of `exit_codes`; the message ends with what it printed.
    """
    with tempfile.TemporaryFile("w+") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in exit_codes:
            printed.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {printed.read()[-3000:]}")
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10)


def median(usages: Sequence[Usage]) -> Usage:
    """Median of each number separately."""
    return Usage(*(statistics.median(numbers) for numbers in zip(*usages, strict=True)))
