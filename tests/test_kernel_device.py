"""Every kernel test makes its tensors where kernels run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parent
FILES = [
    "test_topk_encode.py",
    "test_sparse_decode.py",
    "test_affine_chain.py",
    "test_online_step.py",
    "test_tuning.py",
]
STRAY = """
import torch
from resae_kernels import sparse_decode

def decode(W_dec):
    stray = torch.ones(2, 3, device="cpu")
    sparse_decode(stray, torch.zeros_like(stray).long(), W_dec, implementation="triton")

def test_on_two_devices(device):
    decode(torch.ones(4, 8))

def test_on_the_cpu_alone(device):
    decode(torch.ones(4, 8, device="cpu"))
"""


def as_with_a_gpu(*files: Path) -> subprocess.CompletedProcess[str]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no device to stand in for a GPU")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_stand_in", "-p", "no:cacheprovider"]
    command += ["-W", "default", "--confcutdir", str(TESTS), *map(str, files)]
    return subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_kernel_tests_make_their_tensors_on_the_gpu():
    done = as_with_a_gpu(*(TESTS / name for name in FILES))
    assert done.returncode == 0, done.stdout[-3000:]
    launched, ran = (
        int(re.search(pattern, done.stdout)[1])
        for pattern in (r"(\d+) tests launched a kernel", r"(\d+) passed")
    )
    assert launched > 0.8 * ran > 50


def test_a_tensor_made_on_the_cpu_is_found():
    path = TESTS / "test_stray_for_one_test.py"
    path.write_text(STRAY)
    try:
        done = as_with_a_gpu(path)
    finally:
        path.unlink()
    assert done.returncode == 1, done.stdout
    for expected in ("needs a CUDA device", "acts on cpu; move one so that both agree"):
        assert expected in done.stdout
