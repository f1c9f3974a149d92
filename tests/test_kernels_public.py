import subprocess
import sys
import warnings

import pytest
import torch
from measured import assert_same, values_and_gradients

import resae_kernels
from resae_kernels import TopK, affine_chain, sparse_decode, topk_encode

DOCUMENTED = {
    "TopK",
    "Transported",
    "affine_chain",
    "reference",
    "sparse_decode",
    "topk_encode",
    "transport",
}


def run_python(source: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:resae_kernels", "-c", source],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_exported_members_are_the_documented_ones():
    assert set(resae_kernels.__all__) == DOCUMENTED
    assert list(resae_kernels.__all__) == sorted(resae_kernels.__all__)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_exported_member_is_importable_and_documented(name):
    assert getattr(resae_kernels, name).__doc__


def test_star_import_brings_the_documented_names_alone():
    namespace: dict[str, object] = {}
    exec("from resae_kernels import *", namespace)
    assert set(namespace) - {"__builtins__"} == DOCUMENTED


def test_ops_are_registered_in_the_namespace_resae():
    for name in ("topk_encode", "sparse_decode", "affine_chain", "latent_outer", "sampled_product"):
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.resae, name).default.tags


def test_import_brings_in_neither_the_package_above_nor_its_dependencies():
    run = run_python(
        "import sys, torch; before = set(sys.modules); import resae_kernels\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "unwanted = {'resae', 'transformers', 'datasets', 'safetensors', 'matplotlib'}\n"
        "sys.exit(f'imported {new & unwanted}' if new & unwanted else 0)"
    )
    assert run.returncode == 0, run.stderr


def test_import_prints_nothing():
    run = run_python("import resae_kernels")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_touches_no_device_and_no_global_setting():
    run = run_python(
        "import torch\n"
        "def settings():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),\n"
        "            torch.is_grad_enabled(), torch.get_float32_matmul_precision(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.cuda.is_initialized())\n"
        "before = settings(); import resae_kernels; assert settings() == before"
    )
    assert run.returncode == 0, run.stderr


def test_import_and_use_read_no_environment():
    # Every read of os.environ is laid to the first file on the stack that is not the standard
    # library's own; none may be of this package.
    run = run_python(
        "import os, sys, torch\n"
        "readers = set()\n"
        "library = os.path.dirname(os.__file__)\n"
        "class Watched(type(os.environ)):\n"
        "    def __getitem__(self, key):\n"
        "        frame = sys._getframe(1)\n"
        "        while frame.f_code.co_filename.startswith((library + '/os', library + '/_co', '<')):\n"
        "            frame = frame.f_back\n"
        "        readers.add(frame.f_code.co_filename)\n"
        "        return super().__getitem__(key)\n"
        "os.environ.__class__ = Watched\n"
        "exec(compile(\"import os; os.getenv('HOME')\", '/probe.py', 'exec'))\n"
        "assert '/probe.py' in readers\n"
        "import resae_kernels as ops\n"
        "x, W = torch.randn(3, 4), torch.randn(8, 4)\n"
        "code = ops.topk_encode(x, W, None, 2)\n"
        "ops.affine_chain([code], [W], [], [], b_dec=[torch.zeros(4)])\n"
        "ops.sparse_decode(*code, W)\n"
        "assert not [name for name in readers if 'resae_kernels' in name], readers"
    )
    assert run.returncode == 0, run.stderr


def test_inputs_are_left_as_they_were():
    x, weight, bias = torch.randn(5, 4), torch.randn(8, 4), torch.randn(8)
    base = torch.randn(5, 4)
    copies = [t.clone() for t in (x, weight, bias, base)]
    acts, indices = topk_encode(x, weight, bias, 3, base=base)
    code_copies = acts.clone(), indices.clone()
    sparse_decode(acts, indices, weight, base=base)
    affine_chain([(acts, indices)] * 2, [weight] * 2, [x[:4]], [x[0]], b_dec=[x[0]] * 2)
    for now, before in zip((x, weight, bias, base), copies, strict=True):
        assert torch.equal(now, before)
    assert torch.equal(acts, code_copies[0])
    assert torch.equal(indices, code_copies[1])


def test_stack_of_autoencoders_compiles_to_the_same_numbers():
    """Encode, decode and chain in one graph, with strides and dtypes as the compiler plans them."""
    inputs = {
        name: torch.randn(shape)
        for name, shape in {
            "x": (2, 3, 4),
            "weight": (8, 4),
            "bias": (8,),
            "W_dec": (8, 4),
            "A": (4, 4),
            "b_dec": (4,),
        }.items()
    }

    def stack(x, weight, bias, W_dec, A, b_dec):
        first = topk_encode(x, weight, bias, 3, pre_bias=b_dec)
        y = sparse_decode(*first, W_dec, bias=b_dec)
        second = topk_encode(x * 2, weight, bias, 2, base=y @ A, sorted=False)
        assert isinstance(second, TopK)
        return affine_chain([first, second], [W_dec] * 2, [A], [b_dec], b_dec=[b_dec] * 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, on first use
        ours = values_and_gradients(torch.compile(stack, fullgraph=True), inputs)
    assert_same(ours, values_and_gradients(stack, inputs), rtol=1e-5, atol=1e-5)
