"""Fixtures of every test: one seed, one thread; uninitialised memory poisoned on request."""

import gc
import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest
import torch
from hypothesis import HealthCheck, settings
from interpreter import make_faster
from kernel_device import KERNEL_DEVICE

from resae.cli import GC_THRESHOLD

# Without a device the kernels themselves run all the same, in Triton's interpreter. Read when a
# kernel is defined: set before any test imports one.
if KERNEL_DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    make_faster()

# As in the command line: `torch.compile` makes objects by the million.
gc.set_threshold(GC_THRESHOLD)

# The shapes here are tiny: a second thread gains nothing, and loses much where cores are shared.
torch.set_num_threads(1)

settings.register_profile(
    "resae",
    deadline=None,
    derandomize=True,
    max_examples=40,
    # The seed and the poison hold for all examples of a test; drawing them anew would change none.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("resae")

LONGEST = ("static_gate", "demo", "cli", "decode_loop", "context", "sparse_decode", "topk_encode")
LONGEST += ("watch", "distributed", "loop", "kernel_device", "readme", "hooked", "tuning")
LONGEST += ("triton_encode", "kernels_public", "triton_screening", "affine_chain", "online_step")
"""Files that take more than ten seconds, the longest first. With `--dist loadfile` they are given
out in this order, so that at the end no worker waits for a long one."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Device of the Triton kernels. A test that names no other makes its tensors there."""
    if KERNEL_DEVICE.type == "cpu":  # tensors are made there anyway
        yield KERNEL_DEVICE
        return
    with KERNEL_DEVICE:
        yield KERNEL_DEVICE


@pytest.fixture
def implementation(request):
    """`torch` or `triton`, as parametrized; with `triton` a test's tensors are on `device`."""
    if request.param == "triton":
        request.getfixturevalue("device")
    return request.param


@pytest.fixture
def poisoned_memory(request):
    """Whatever an op leaves unwritten in fresh memory reads as NaN, or as the largest integer."""
    request.node.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(params=["native", "torch"])
def screened_at_any_size(request, monkeypatch):
    """Let the screened encoder screen what its rules leave to the exact path: small shapes. By
    both implementations."""
    screen_at_any_size(request.param, monkeypatch)
    return request.param


@pytest.fixture
def screened_by_torch_at_any_size(monkeypatch):
    screen_at_any_size("torch", monkeypatch)


@pytest.fixture
def screened_by_triton_at_any_size(monkeypatch):
    """Let encoders that ask for it screen small shapes by Triton."""
    from resae_kernels import screened as screened_encode

    rules = {
        dtype: rule._replace(entries=0, width=0)
        for dtype, rule in screened_encode.RULES["triton"].items()
    }
    monkeypatch.setitem(screened_encode.RULES, "triton", rules)


def screen_at_any_size(implementation: str, monkeypatch) -> None:
    from resae_kernels import screened as screened_encode

    reason = screened_encode.unavailable(implementation)
    if reason is not None:
        pytest.skip(reason)
    rules = {
        dtype: rule._replace(entries=0, width=0, training_rows=0, certain_rows=screened_encode.ANY)
        for dtype, rule in screened_encode.RULES[implementation].items()
    }
    monkeypatch.setitem(screened_encode.RULES, implementation, rules)
    monkeypatch.setattr(
        screened_encode.ScreenedEncoder, "implementation", property(lambda _: implementation)
    )


@pytest.fixture(scope="session")
def processes():
    """A `multiprocessing` context whose processes come, with everything imported, from a clean
    one: importing torch and transformers takes as long as most trainings here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "datasets", "resae.training.pipeline"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules where we do
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model folder and a text file, as a user has them."""
    import tiny  # loads transformers, which most tests do without

    folder = tmp_path_factory.mktemp("material")
    lm = tiny.pythia()
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    other = tiny.pythia()
    other.model.resize_token_embeddings(1024, mean_resizing=False)
    other.model.save_pretrained(folder / "other")
    lm.tokenizer.save_pretrained(folder / "other")
    words = " ".join(f"The {w} sat by number {i}." for i, w in enumerate(["cat", "dog"] * 900))
    (folder / "text.txt").write_text(words)
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes("Wörter ".encode("latin1") * 900)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (folder / "integers.jsonl").write_text('{"text": 1}\n')
    (folder / "nulls.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text(words)
    (folder / "mixed" / "b.jsonl").write_text('{"text": "a"}\n')
    lm.model.save_pretrained(folder / "no-tokenizer")
    return folder
