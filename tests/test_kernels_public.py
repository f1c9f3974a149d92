import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from measured import assert_same, values_and_gradients

import resae_kernels
from resae_kernels import SparseCode, affine_chain, sparse_decode, topk_encode

DOCUMENTED = {
    "Autoencoding",
    "OnlineStep",
    "ReconstructionError",
    "ScreenedEncoder",
    "EncodeInfo",
    "StepWorkspace",
    "SparseCode",
    "ThresholdCode",
    "Transported",
    "accelerate",
    "affine_chain",
    "autoencode",
    "autoencoder_error",
    "online_step",
    "reconstruction_error",
    "reference",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
    "transport",
}


def run_python(source: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize("op", ["encode", "threshold", "decode", "error", "chain", "screened"])
def test_forward_mode_is_refused_and_the_specification_has_it(op):
    """A tangent of zero would be wrong without a word."""
    W, A, zero = torch.randn(64, 8), torch.randn(8, 8), torch.zeros(8)
    x = torch.randn(5, 8)
    acts, indices = topk_encode(x, W, None, 4)
    encoder = resae_kernels.ScreenedEncoder(torch.randn(4096, 64))

    def chain_of(acts):
        return [(acts, indices)] * 2, [W] * 2, [A], [zero]

    def calls(of):
        return {
            "encode": (lambda x: of.topk_encode(x, W, None, 4).acts, x),
            "threshold": (lambda x: of.threshold_encode(x, W, None, zero[0], 9).acts, x),
            "decode": (lambda acts: of.sparse_decode(acts, indices, W), acts),
            "error": (lambda acts: of.reconstruction_error(acts, indices, W, x)[0], acts),
            "chain": (
                lambda acts: of.affine_chain(*chain_of(acts), b_dec=[zero] * 2)[1],
                acts,
            ),
            "screened": (lambda x: encoder.encode(x, 4).acts, torch.randn(40, 64)),
        }[op]

    function, primal = calls(resae_kernels)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (primal,), (torch.ones_like(primal),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        function(torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal)))
    function(primal)
    if op != "screened":
        function, primal = calls(resae_kernels.reference)
        tangent = torch.func.jvp(function, (primal,), (torch.ones_like(primal),))[1]
        assert tangent.abs().sum() > 0


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
    public = (
        "topk_encode",
        "threshold_encode",
        "sparse_decode",
        "affine_chain",
        "online_step",
        "reconstruction_error",
    )
    for name in (*public, "autoencoder", "autoencoder_gradients", "scatter_outer", "sddmm"):
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.resae, name).default.tags


def test_import_brings_in_neither_the_package_above_nor_its_dependencies():
    run = run_python("""
        import sys, torch
        before = set(sys.modules)
        import resae_kernels
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        unwanted = new & {"resae", "transformers", "datasets", "safetensors", "matplotlib"}
        assert not unwanted, unwanted
    """)
    assert run.returncode == 0, run.stderr


def test_import_prints_nothing():
    run = run_python("import resae_kernels")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_import_touches_no_device_and_no_global_setting():
    run = run_python("""
        import torch

        def settings():
            return (
                torch.get_default_dtype(),
                torch.get_num_threads(),
                torch.initial_seed(),
                torch.is_grad_enabled(),
                torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
                torch.cuda.is_initialized(),
            )

        before = settings()
        import resae_kernels
        assert settings() == before
    """)
    assert run.returncode == 0, run.stderr


def test_import_and_use_read_no_environment():
    # Each read of os.environ is laid to the nearest file on the stack outside os and its prediction
    # class; the probe shows that reads are seen.
    run = run_python("""
        import os, sys, torch

        readers = set()

        class Watched(type(os.environ)):
            def __getitem__(self, key):
                frame = sys._getframe(1)
                while frame.f_globals["__name__"] in ("os", "collections.abc", "_collections_abc"):
                    frame = frame.f_back
                readers.add(frame.f_globals["__name__"])
                return super().__getitem__(key)

        os.environ.__class__ = Watched
        exec("import os; os.getenv('HOME')", {"__name__": "probe"})
        assert "probe" in readers
        import resae_kernels as ops

        x, W = torch.randn(3, 4), torch.randn(8, 4)
        code = ops.topk_encode(x, W, None, 2)
        ops.sparse_decode(*code, W)
        ops.affine_chain([code], [W], [], [], b_dec=[torch.zeros(4)])
        ops.online_step(x, W, None, 2, W, b_dec=torch.zeros(4))
        assert not any(name.startswith("resae_kernels") for name in readers), readers
    """)
    assert run.returncode == 0, run.stderr


def test_inputs_are_left_as_they_were():
    x, weight, bias = torch.randn(5, 4), torch.randn(8, 4), torch.randn(8)
    prediction = torch.randn(5, 4)
    copies = [t.clone() for t in (x, weight, bias, prediction)]
    acts, indices = topk_encode(x, weight, bias, 3, prediction=prediction)
    code_copies = acts.clone(), indices.clone()
    sparse_decode(acts, indices, weight, prediction=prediction)
    affine_chain([(acts, indices)] * 2, [weight] * 2, [x[:4]], [x[0]], b_dec=[x[0]] * 2)
    for now, before in zip((x, weight, bias, prediction), copies, strict=True):
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
        second = topk_encode(x * 2, weight, bias, 2, prediction=y @ A, sorted=False)
        assert isinstance(second, SparseCode)
        return affine_chain([first, second], [W_dec] * 2, [A], [b_dec], b_dec=[b_dec] * 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, on first use
        ours = values_and_gradients(torch.compile(stack, fullgraph=True), inputs)
    assert_same(ours, values_and_gradients(stack, inputs), rtol=1e-5, atol=1e-5)
