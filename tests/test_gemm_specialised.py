"""The warp-specialised GEMM without a device: its source runs as Python, each kind of warps as a
thread, over a model of barriers, loads and products that are as late as they may be."""

import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from kernel_device import KERNEL_DEVICE
from torch import Tensor

from resae_kernels import topk_encode
from resae_kernels.triton import gemm_specialised as module
from resae_kernels.triton.gemm_specialised import launch_specialised_gemm, specialised_constants
from resae_kernels.triton.keys import KEYS
from resae_kernels.triton.tiles import (
    TILES,
    SpecialisedGemmTile,
    device_class,
    override_tiles,
    sizes,
)

SECONDS = 20.0
LATE = {"load": 0.0, "product": 1e-4, "read": 1e-4}
"""Seconds before a block is loaded, a product is computed, and tensor memory is read."""
TILE = SpecialisedGemmTile(128, 256, 64, buffers=4, num_warps=8, device_class="sm_90")
CLASSES = ("sm_90", "sm_100")


def small_tile(buffers: int, its_class: str) -> SpecialisedGemmTile:
    return SpecialisedGemmTile(16, 32, 16, buffers, num_warps=4, device_class=its_class)


class Block(Tensor):
    """A tensor of Gluon."""

    def to(self, dtype, bitcast=False):  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)


class Pointer:
    def __init__(self, tensor: Tensor, offsets: Tensor | None = None):
        self.tensor, self.offsets = tensor, offsets
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offsets: Tensor) -> "Pointer":
        return Pointer(self.tensor, offsets)


class Barrier:
    """Complete after one arrival and all bytes that are expected; then its next phase begins."""

    def __init__(self):
        self.phase, self.bytes, self.changed = 0, 0, threading.Condition()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, SECONDS):
                raise TimeoutError

    def complete(self) -> None:
        with self.changed:
            self.phase += 1
            self.changed.notify_all()


class OpenBarrier(Barrier):
    """One that nobody waits for."""

    def wait(self, parity: int) -> None:
        del parity


class Ring(list):
    def index(self, i):  # type: ignore[override]
        return self[i]


class Sum:
    """Products that are not waited for read their blocks as late as possible."""

    def __init__(self, value: Tensor, pending: tuple = ()):
        self.value, self.pending = value, pending

    def completed(self, outstanding: int) -> "Sum | Tensor":
        last = len(self.pending) - outstanding
        value = self.value
        for a, b in self.pending[: max(0, last)]:
            value = value + a.float() @ b.float()
        rest = self.pending[max(0, last) :]
        return Sum(value, rest) if outstanding else value.as_subclass(Block)


def multiply(a: Tensor, b: Tensor, total: Sum, *, is_async: bool) -> Sum:
    assert is_async
    return Sum(total.value, (*total.pending, (a, b)))


class Half:
    """One of two halves of tensor memory, that is read late."""

    def __init__(self, tokens: int, latents: int):
        self.value, self.columns = torch.full((tokens, latents), torch.nan), slice(None)

    def multiply(self, a: Tensor, b: Tensor, use_acc: bool) -> None:
        self.value = a.float() @ b.float() + (self.value if use_acc else 0)

    def slice(self, start: int, length: int) -> "Half":
        self.columns = slice(start, start + length)
        return self

    def load(self, _layout) -> Tensor:
        time.sleep(LATE["read"])
        return self.value[:, self.columns].clone().as_subclass(Block)


class TensorUnit:
    """Products and commits, one after another on a thread of their own."""

    def __init__(self):
        self.todo: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (task := self.todo.get()) is not None:
            time.sleep(LATE["product"])
            task()

    def multiply(self, a: Tensor, b: Tensor, half: Half, *, use_acc: bool, mbarriers) -> None:
        self.todo.put(lambda: half.multiply(a, b, use_acc))
        for barrier in mbarriers:
            self.commit(barrier)

    def commit(self, barrier: Barrier) -> None:
        self.todo.put(barrier.complete)


def arrive(barrier: Barrier, *, count: int, pred: bool = True) -> None:
    assert count == 1
    if pred:
        barrier.complete()


def expect(barrier: Barrier, count: int) -> None:
    barrier.bytes += count


def async_load(matrix: Tensor, at: list[int], barrier: Barrier, block: Tensor) -> None:
    time.sleep(LATE["load"])
    rows, columns = block.shape
    part = matrix[at[0] : at[0] + rows, at[1] : at[1] + columns]
    block.zero_()
    block[: part.shape[0], : part.shape[1]] = part
    barrier.bytes -= block.nbytes
    if barrier.bytes == 0:
        barrier.complete()


def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    found = pointer.tensor[pointer.offsets.clamp(max=len(pointer.tensor) - 1)]  # type: ignore[union-attr]
    return torch.where(mask, found, other).as_subclass(Block)


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    assert pointer.offsets is not None
    where = pointer.offsets[mask].long().as_subclass(Tensor)
    assert len(where.unique()) == len(where)
    pointer.tensor.view(-1)[where] = value[mask].as_subclass(Tensor).to(pointer.tensor.dtype)


def model(program: int, programs: int, unit: TensorUnit) -> dict:
    """Names of the kernel's module for one program."""
    mbarrier = SimpleNamespace(
        wait=lambda barrier, parity: barrier.wait(parity), expect=expect, arrive=arrive
    )
    hopper = SimpleNamespace(
        mbarrier=mbarrier,
        warpgroup_mma=multiply,
        warpgroup_mma_wait=lambda n, deps: deps[0].completed(n),
    )
    layout = lambda *_: None  # noqa: E731
    gl = SimpleNamespace(
        **{name: getattr(torch, name) for name in ("float32", "int16", "int32", "int64", "where")},
        program_id=lambda _axis: program,
        num_programs=lambda _axis: programs,
        cdiv=lambda a, b: -(-a // b),
        zeros=lambda shape, dtype, _layout: Sum(torch.zeros(shape, dtype=dtype)),
        arange=lambda a, b, _layout: torch.arange(a, b, dtype=torch.int32).as_subclass(Block),
        expand_dims=lambda t, axis: t.unsqueeze(axis),
        max=lambda t, axis: t.amax(axis),
        convert_layout=lambda t, _layout: t,
        load=load,
        store=store,
        static_range=range,
        NVMMADistributedLayout=layout,
        BlockedLayout=layout,
        SliceLayout=layout,
    )
    blackwell = SimpleNamespace(tcgen05_mma=unit.multiply, tcgen05_commit=unit.commit)
    names = {"gl": gl, "hopper": hopper, "async_load": async_load, "blackwell": blackwell}
    return names | {"_write": source(module._write)}


def source(kernel):
    """A kernel as Python: before and after Triton has loaded it, or this already."""
    return getattr(kernel, "function", None) or getattr(kernel, "fn", kernel)


def until_stuck(kernel, arguments: tuple, stuck: list[str]) -> None:
    try:
        source(kernel)(*arguments)
    except TimeoutError:
        stuck.append(kernel.__name__)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: SpecialisedGemmTile,
    group: int,
    programs: int,
    patch: pytest.MonkeyPatch,
    without: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and keys of group maxima, as the programs write them one after another; nobody waits
    for the barriers named `without`.

    Raises:
        TimeoutError: a barrier that is waited for is not completed.
    """
    (n, D), M = x.shape, weight.shape[0]
    groups = -(-M // group)
    scores = torch.full((n, M), torch.nan, dtype=x.dtype)
    best = torch.full((n, groups), -7, dtype=torch.int16)
    c = specialised_constants(tile, M, group, x.dtype)
    sizes = [c[name] for name in ("BN", "BL", "BK", "BUFFERS")]
    blocks = [
        Ring(torch.full((rows, tile.dimensions), torch.nan).to(x) for _ in range(tile.buffers))
        for rows in (tile.tokens, tile.latents)
    ]
    for program in range(programs):
        unit = TensorUnit()
        for name, value in model(program, programs, unit).items():
            patch.setattr(module, name, value)
        numbers = {"ready": tile.buffers, "free": tile.buffers, "whole": 2, "read": 2}
        ready, free, whole, read = (
            Ring((OpenBarrier if name == without else Barrier)() for _ in range(number))
            for name, number in numbers.items()
        )
        handed = [*blocks, ready, free]
        sums = Ring(Half(tile.tokens, tile.latents) for _ in range(2))
        others = [(module._load_blocks, (x, weight, *handed, n, D, M, *sizes))]
        to = None if bias is None else Pointer(bias), Pointer(scores), Pointer(best)
        last = [c[name] for name in ("WARPS", "WHOLE_GROUPS", "INF", "TOP")]
        if tile.device_class == "sm_90":
            args = (*to, *handed, n, D, M, groups, M, group, *sizes, *last)
            main = module._multiply, args
        else:
            given = sums, *handed, whole, read, n, D, M, *sizes
            others.append((module._multiply_in_tensor_memory, given))
            args = (*to, sums, whole, read, n, M, groups, M, group, *sizes[:2], c["STRIP"], *last)
            main = module._write_tiles, args
        stuck: list[str] = []
        threads = [threading.Thread(target=until_stuck, args=(*o, stuck)) for o in others]
        for thread in threads:
            thread.start()
        until_stuck(*main, stuck)
        for thread in threads:
            thread.join(2 * SECONDS)
            assert not thread.is_alive()
        unit.todo.put(None)
        unit.thread.join(SECONDS)
        if stuck:
            raise TimeoutError(f"{stuck} wait for ever")
    return scores, best


@pytest.mark.parametrize("its_class", CLASSES)
@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize(("n", "D", "M", "programs"), [(40, 48, 96, 1), (17, 80, 100, 3)])
def test_every_score_and_maximum_is_written_once_and_right(
    buffers, n, D, M, programs, its_class, monkeypatch
):
    monkeypatch.setattr(module, "STRIP", 16)
    group, tile = 8, small_tile(buffers, its_class)
    x, weight, bias = (
        (torch.randint(-8, 9, shape) / 8).bfloat16() for shape in ((n, D), (M, D), (M,))
    )
    x[3], x[4, 0] = torch.nan, torch.inf
    for b in (bias, None):
        scores, best = run(x, weight, b, tile, group, programs, monkeypatch)
        exact = x.float() @ weight.float().T + (0 if b is None else b.float())
        torch.testing.assert_close(scores, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
        keys = KEYS[torch.bfloat16]
        bits = scores.view(torch.int16).int()
        bits = torch.where((bits & keys.top) > keys.inf, keys.top, bits)
        bits = torch.nn.functional.pad(bits, (0, -M % group), value=0)
        expected = bits.view(n, -1, group).amax(2).clamp(min=0)
        assert torch.equal(best.int().clamp(min=0), expected)


def test_a_buffer_that_is_freed_too_early_is_seen(monkeypatch):
    """The model is able to fail: a product that reads its blocks after they were overwritten."""
    tile = small_tile(2, "sm_90")
    x, weight = torch.ones(16, 96).bfloat16(), torch.ones(32, 96).bfloat16()
    x *= torch.arange(96).bfloat16()
    late = Sum.completed
    monkeypatch.setattr(Sum, "completed", lambda self, n: late(self, n + 1 if n else 0))
    scores, _ = run(x, weight, None, tile, 8, 1, monkeypatch)
    assert not torch.equal(scores, (x.float() @ weight.float().T).bfloat16())


@pytest.mark.parametrize(
    ("barrier", "late"),
    [("ready", "load"), ("free", "product"), ("whole", "product"), ("read", "read")],
)
def test_tensor_memory_needs_every_barrier(barrier, late, monkeypatch):
    """The model is able to fail: without the wait, what is late comes too late."""
    monkeypatch.setattr(module, "STRIP", 16)
    monkeypatch.setitem(LATE, late, 4e-3)
    x, weight = torch.rand(48, 64).bfloat16(), torch.rand(64, 64).bfloat16()
    exact, tile = x.float() @ weight.float().T, small_tile(2, "sm_100")
    given = x, weight, None, tile, 8, 1, monkeypatch
    torch.testing.assert_close(run(*given)[0].float(), exact, rtol=1e-2, atol=0)
    monkeypatch.setattr("test_gemm_specialised.SECONDS", 0.5)
    try:
        scores, _ = run(*given, without=barrier)
    except TimeoutError:
        return
    assert not torch.allclose(scores.float(), exact, rtol=1e-2)


def test_other_devices_refuse_it():
    x, weight = (torch.ones(n, 64, dtype=torch.bfloat16, device="cpu") for n in (20, 256))
    for tile in (TILE, TILE._replace(num_warps=4, device_class="sm_100")):
        wanted = f"tile {sizes(tile)} is for GPUs of class {tile.device_class}, got other"
        with pytest.raises(ValueError, match=wanted):
            launch_specialised_gemm(x, weight, None, x, x, 8, tile, 1)


@pytest.mark.gpu
@pytest.mark.skipif(
    device_class(KERNEL_DEVICE) not in CLASSES, reason="needs compute capability 9.0 or 10.0"
)
@pytest.mark.parametrize("tokens", [129, 1000])
@pytest.mark.parametrize("biased", [True, False])
def test_codes_are_those_of_the_librarys_gemm(device, tokens, biased):
    draw = lambda *shape: (torch.randint(-8, 9, shape) / 8).bfloat16()  # noqa: E731
    x, weight = draw(tokens, 256).to(device), draw(5000, 256).to(device)
    bias = draw(5000).to(device) if biased else None
    expected = topk_encode(x, weight, bias, 16)
    candidates = TILES["gemm_many_tokens_16bit"].candidates(device_class(device))
    (tile,) = (t for t in candidates if isinstance(t, SpecialisedGemmTile))
    with override_tiles({"gemm_many_tokens_16bit": tile}):
        code = topk_encode(x, weight, bias, 16)
    assert torch.equal(code.acts, expected.acts)
    assert torch.equal(code.indices, expected.indices)
