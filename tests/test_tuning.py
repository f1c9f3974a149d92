import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_device import KERNEL_DEVICE as DEVICE

from resae.cli import main
from resae_kernels import sparse_decode
from resae_kernels.profiling import Case
from resae_kernels.profiling import tuning as module
from resae_kernels.profiling.clock import Timer
from resae_kernels.profiling.tuning import Timing, fastest, measure, store
from resae_kernels.triton import tiles as kernel_tiles
from resae_kernels.triton.encode_few import FEW_TOKENS, GEMV_TOKENS
from resae_kernels.triton.selection import selection_layout

NAME, CLASS = kernel_tiles.device_name(DEVICE), kernel_tiles.device_class(DEVICE)
SMALL = {  # kernel: an op that launches it, at a size the interpreter can bear
    "gemm_2_tokens_16bit": Case("encode", 2, 32, 192, 4, "bfloat16"),
    "gemm_2_tokens_32bit": Case("encode", 1, 32, 192, 4),
    "gemm_16_tokens_16bit": Case("encode", 3, 32, 192, 4, "bfloat16"),
    "gemm_16_tokens_32bit": Case("encode", 3, 32, 192, 4),
    "gemm_many_tokens_16bit": Case("encode", 18, 16, 192, 4, "bfloat16"),
    "screen": Case("encode", 2, 32, 512, 4, "bfloat16"),
    "group_max": Case("encode", 18, 16, 192, 4),
    "select": Case("encode", 18, 16, 192, 4),
    "residual": Case("encode", 18, 32, 64, 2, "bfloat16"),
    "decode": Case("decode", 18, 40, 64, 5),
    "decode_few": Case("decode", 2, 40, 64, 5, "bfloat16"),
    "sddmm": Case("train", 3, 40, 64, 20),
    "scatter_outer": Case("train", 5, 40, 16, 5),
}
kernels = pytest.mark.parametrize("kernel", module.TUNABLES)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """A user without tuned tiles."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kernel_tiles.reload_tiles()
    yield tmp_path
    monkeypatch.undo()
    kernel_tiles.reload_tiles()


def write(content: object) -> Path:
    path = kernel_tiles.tiles_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    kernel_tiles.reload_tiles()
    return path


def tuned(tiles: object) -> dict[str, object]:
    return {NAME: {"date": "2026-01-31", "torch": "2", "triton": "3", "tiles": tiles}}


def decode() -> torch.Tensor:
    acts, W_dec = torch.ones(20, 3, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    return sparse_decode(acts, torch.zeros_like(acts).long(), W_dec, implementation="triton")


def eagerly(seconds):
    """A timer by a function that times one call."""
    return lambda call: Timer(lambda: seconds(call))


# -- tables ----------------------------------------------------------------------------------------


def test_every_kernel_with_tiles_can_be_tuned_and_has_alternatives():
    assert set(module.TUNABLES) == set(kernel_tiles.TILES) == set(SMALL)
    for table in kernel_tiles.TILES.values():
        for tile in table.candidates("other"):
            assert all(isinstance(value, int | str) for value in tile._asdict().values())
        assert len(table.candidates("other")) > 1
        assert table.candidates("other")[0] == table.default.tile


def test_the_choice_of_a_class_comes_before_the_default():
    table = kernel_tiles.TILES["gemm_16_tokens_16bit"]
    assert table.of("sm_90") == table.classes["sm_90"] != table.default
    assert table.of("sm_75") == table.default
    assert table.candidates("sm_90")[0] == table.classes["sm_90"].tile
    assert set(table.candidates("sm_90")) >= set(table.candidates("other"))


@kernels
def test_tiles_are_looked_up_at_every_launch(kernel):
    asked = []

    class Recording(dict):
        def get(self, name, default=None):
            asked.append(name)
            return super().get(name, default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_tiles, "_overrides", Recording())
        inputs = module.make_inputs(SMALL[kernel], DEVICE)
        module.TUNABLES[kernel].run(SMALL[kernel], inputs, "triton")
    assert kernel in asked


@kernels
def test_representative_shapes_are_of_the_kernel_they_tune(kernel):
    for case in module.TUNABLES[kernel].cases:
        assert case.op != "encode" or selection_layout(case.M, case.k) is not None
        any_few = kernel in ("decode_few", "screen")
        few = any_few or "2_tokens" in kernel or "16_tokens" in kernel
        assert (case.N <= FEW_TOKENS) == few
        assert (case.N <= GEMV_TOKENS) == ("2_tokens" in kernel) or any_few
        if "bit" in kernel:
            assert kernel.endswith({"float32": "32bit", "bfloat16": "16bit"}[case.dtype])


# -- the user's file -------------------------------------------------------------------------------


def test_without_a_file_the_package_chooses():
    chosen, source = kernel_tiles.active_tile("decode", DEVICE)
    assert (chosen, source) == (kernel_tiles.TILES["decode"].default, "default")


def test_a_tuned_tile_is_preferred_and_says_where_it_was_measured():
    tile = kernel_tiles.TILES["decode"].alternatives[0]
    write(tuned({"decode": tile._asdict()}))
    assert kernel_tiles.tile("decode", DEVICE) == tile
    chosen, source = kernel_tiles.active_tile("decode", DEVICE)
    assert (chosen.measured, source) == (f"{NAME}, 2026-01-31", "tuned")
    # Kernels that the file does not name, and other devices, keep theirs.
    assert kernel_tiles.tile("decode_few", DEVICE) == kernel_tiles.TILES["decode_few"].default.tile
    assert (
        kernel_tiles.tile("decode", torch.device("meta"))
        == kernel_tiles.TILES["decode"].default.tile
    )


def test_the_file_is_read_once(monkeypatch):
    write(tuned({}))
    reads = []
    stored = kernel_tiles.stored_tiles
    monkeypatch.setattr(kernel_tiles, "stored_tiles", lambda: reads.append(1) or stored())
    for _ in range(2):
        for kernel in kernel_tiles.TILES:
            kernel_tiles.tile(kernel, DEVICE)
    assert reads == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "is not valid JSON", id="truncated"),
        pytest.param([1], "no object per device", id="list"),
        pytest.param({NAME: 3}, "no object per device", id="number"),
        pytest.param({NAME: {}}, "expected a date and an object of tiles", id="empty"),
        pytest.param(tuned([]), "expected a date and an object of tiles", id="no tiles"),
        pytest.param(tuned({"fly": {}}), "unknown kernel 'fly', expected decode", id="kernel"),
        pytest.param(
            tuned({"decode": {"rows": 7}}), "unknown tile {'rows': 7} of decode", id="tile"
        ),
        pytest.param(tuned({"decode": None}), "unknown tile None of decode", id="null"),
    ],
)
def test_a_damaged_file_is_named(content, message):
    path = write(content)
    with pytest.raises(ValueError, match="tune` again") as raised:
        decode()
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


def test_importing_reads_no_file():
    write("{")
    code = (
        "from pathlib import Path\n"
        "def refuse(): raise AssertionError('home was asked for')\n"
        "Path.home = refuse\n"
        "import resae.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_forced_tiles_come_first_and_end_with_their_block():
    table = kernel_tiles.TILES["decode"]
    write(tuned({"decode": table.alternatives[0]._asdict()}))
    with kernel_tiles.override_tiles({"decode": table.default.tile}):
        with kernel_tiles.override_tiles({"decode": table.alternatives[1]}):
            assert kernel_tiles.tile("decode", DEVICE) == table.alternatives[1]
        assert kernel_tiles.tile("decode", DEVICE) == table.default.tile
    assert kernel_tiles.tile("decode", DEVICE) == table.alternatives[0]


# -- measuring -------------------------------------------------------------------------------------


@kernels
def test_candidates_are_right_and_timed_in_turns(kernel):
    times = iter(range(1, 100))
    calls = []

    def seconds(call):
        calls.append(dict(kernel_tiles._overrides)[kernel])
        call()
        return float(next(times))

    timings = measure(kernel, SMALL[kernel], device=DEVICE, rounds=2, timer=eagerly(seconds))
    tiles = kernel_tiles.TILES[kernel].candidates(CLASS)
    n = len(tiles)
    assert calls == [*tiles, *tiles]
    assert [t.tile for t in timings] == list(tiles)
    assert [t.ms for t in timings] == [1e3 * (i + 1 + n / 2) for i in range(n)]
    assert [t.relative for t in timings] == [t.ms / timings[0].ms for t in timings]


def test_tiles_are_compared_by_their_graphs_where_all_are_captured():
    tiles = kernel_tiles.TILES["decode"].candidates(CLASS)

    def measured(captured):
        def timer(_call):
            tile = kernel_tiles.tile("decode", DEVICE)  # of the capture
            slow = float(tiles.index(tile) + 1)
            return Timer(lambda: 5.0, (lambda: slow) if captured(tile) else None, "no")

        return measure("decode", SMALL["decode"], device=DEVICE, rounds=2, timer=timer)

    relatives = [t.relative for t in measured(lambda _tile: True)]
    assert relatives == [float(i + 1) for i in range(len(tiles))]
    assert [t.relative for t in measured(lambda tile: tile == tiles[0])] == [1.0] * len(tiles)


def test_tuning_covers_the_widest_dictionary_of_the_readme():
    tokens_of = {
        f"gemm_{n}_tokens_{bits}bit": tokens
        for n, tokens in ((2, {1, 2}), (16, {4, 16}))
        for bits in (16, 32)
    }
    tokens_of |= {"decode_few": {1, 16}, "screen": {1, 16}}
    tokens_of |= dict.fromkeys(("decode", "sddmm", "scatter_outer"), {8192})
    for kernel, tokens in tokens_of.items():
        wide = [c for c in module.TUNABLES[kernel].cases if (c.D, c.M) == (2048, 65536)]
        assert {case.N for case in wide} == tokens, kernel


def test_a_wrong_answer_is_not_timed(monkeypatch):
    def wrong(case, inputs, implementation):
        (out,) = module._decode(case, inputs, implementation)
        return [out * 1.001 if implementation == "triton" else out]

    monkeypatch.setitem(module.TUNABLES, "decode", module.Tunable(wrong, ()))
    with pytest.raises(ValueError, match="decode with GatherTile.* is wrong on decode N=18"):
        measure(
            "decode",
            SMALL["decode"],
            device=DEVICE,
            rounds=1,
            timer=lambda _call: Timer(lambda: 1.0),
        )


def test_the_user_s_file_does_not_move_the_yardstick():
    write(tuned({"fly": {}}))  # nor does a stale one stand in the way of its replacement
    timings = measure(
        "decode", SMALL["decode"], device=DEVICE, rounds=1, timer=lambda _call: Timer(lambda: 1.0)
    )
    assert timings[0].tile == kernel_tiles.TILES["decode"].default.tile


@pytest.mark.parametrize(
    ("relatives", "winner"),
    [
        pytest.param({"b": [0.5, 1.5]}, "b", id="mean"),
        pytest.param({"b": [0.5, 2.1]}, "a", id="slower"),
        pytest.param({"b": [0.99, 0.99]}, "a", id="within the margin"),
        pytest.param({"b": [0.9, 0.9], "c": [0.8, 0.8]}, "c", id="best"),
    ],
)
def test_the_fastest_over_all_shapes_wins(relatives, winner):
    timings = [
        Timing("decode", SMALL["decode"], tile, 1.0, relative, 1.0)
        for tile, values in ({"a": [1.0, 1.0]} | relatives).items()
        for relative in values
    ]
    assert fastest(timings) == winner


def test_winners_are_stored_and_used_and_other_devices_kept():
    tile = kernel_tiles.TILES["decode"].alternatives[0]
    path = write({"another GPU": {"date": "2026-01-31", "tiles": {}}})
    assert kernel_tiles.tile("decode", DEVICE) != tile
    store(DEVICE, {"decode": tile})
    assert kernel_tiles.tile("decode", DEVICE) == tile
    stored = json.loads(path.read_text())
    assert set(stored) == {"another GPU", NAME}
    assert stored[NAME]["tiles"] == {"decode": tile._asdict()}
    assert stored[NAME]["torch"] == torch.__version__
    assert {"date", "triton"} <= set(stored[NAME])
    assert decode().eq(3).all()


# -- the command -----------------------------------------------------------------------------------


def tiny_tunables(monkeypatch) -> None:
    monkeypatch.setattr(
        module,
        "TUNABLES",
        {name: t._replace(cases=(SMALL[name],)) for name, t in module.TUNABLES.items()},
    )


def test_every_kernel_is_measured_and_the_faster_tile_stored(monkeypatch):
    tiny_tunables(monkeypatch)
    monkeypatch.setattr(module, "_require_gpu", lambda _device: None)
    faster = kernel_tiles.TILES["scatter_outer"].alternatives[0]
    lines = []

    def seconds(call):
        call()
        return 0.5 if kernel_tiles._overrides["scatter_outer"] == faster else 1.0

    chosen = module.tune(DEVICE, rounds=1, timer=eagerly(seconds), say=lines.append)
    # Only where that tile is under measurement does the clock show a difference.
    assert chosen["scatter_outer"] == faster
    assert all(
        tile == kernel_tiles.TILES[kernel].of(CLASS).tile
        for kernel, tile in chosen.items()
        if kernel != "scatter_outer"
    )
    assert [line.splitlines()[0] for line in lines] == list(module.TUNABLES)
    assert "* N=5 D=40 M=16 k=5 float32" in lines[-1]
    assert "0.500" in lines[-1]
    assert kernel_tiles.tile("scatter_outer", DEVICE) == faster
    assert f"{'scatter_outer':<23}rows=8 row_bytes=512" in module.active_tiles(DEVICE)


def test_a_damaged_file_stops_tuning_before_it_starts(monkeypatch):
    monkeypatch.setattr(module, "_require_gpu", lambda _device: None)
    path = write("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        module.tune(DEVICE, rounds=1, timer=lambda _call: pytest.fail("measured"))
    assert path.read_text() == "{"


def test_without_a_gpu_one_line_says_so(capsys, home):
    assert main(["tune", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("resae tune: there is nothing to tune without a GPU")
    assert captured.err.count("\n") == 1
    assert not (home / ".cache").exists()


def test_show_prints_every_tile_and_its_source(capsys):
    tile = kernel_tiles.TILES["decode"].alternatives[0]
    path = write(tuned({"decode": tile._asdict()}))
    assert main(["tune", "--show"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert str(path) in first
    assert [line.split()[0] for line in lines] == list(kernel_tiles.TILES)
    shown = {line.split()[0]: line for line in lines}
    assert shown["decode"].endswith(f"tuned    {NAME}, 2026-01-31")
    assert shown["residual"].endswith("default  not measured")
