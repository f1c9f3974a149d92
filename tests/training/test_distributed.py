"""Two processes against one on the same global batches."""

import json
import os
import signal
from dataclasses import replace
from string import ascii_lowercase

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors import safe_open
from test_loop import calibration_of, config_of, stop_after

from resae import Moments, ReSAE, StoredActivations, train
from resae.data.activations import capture_tokens
from resae.data.batches import ActivationBatches
from resae.data.rows import TokenRows
from resae.storage import load_tensors, save_tensors
from resae.training.calibration import boost_calibration
from resae.training.distributed import Ranks

BASE = config_of(lr=2e-3, dead_after_tokens=128)
CASES = {
    "data": BASE,
    "clipped": replace(BASE, clip_norm=0.05),
    "pieces": replace(BASE, loop="closed", accumulation_steps=2),
    "shared": replace(BASE, predictor="none", shared=True, d_sae=256),
    "prefixes": replace(BASE, prefixes=(1, 2, 4)),
    "boost": replace(BASE, boost="base", k=(2, 2, 2), d_sae=256),
    "boost-pieces": replace(BASE, boost="base", k=(2, 2, 2), d_sae=256, accumulation_steps=2),
    "sizes": replace(BASE, d_sae=(96, 64, 256)),
    "layers": BASE,
    "layers-sizes": replace(BASE, d_sae=(96, 64, 256)),
    "layers-clipped": replace(BASE, clip_norm=0.05),
    "layers-pieces": replace(BASE, accumulation_steps=2),
    "layers-boost": replace(BASE, boost="base", k=(2, 2, 2), d_sae=256),
}
TEXTS = [text for word in ascii_lowercase for text in (" ".join([word] * 22), *[word] * 11, "")]
"""Documents that fill a row alone, and twelve at a time: rank 1 has half as many tokens a row."""


class Shares(StoredActivations):
    """One rank's share of every batch; `poisoned` names a rank and a batch."""

    def __init__(self, xs, ranks, poisoned=None):
        super().__init__(xs, batch_tokens=64)
        self.ranks, self.poisoned = ranks, poisoned

    def batches(self, start):
        for batch, position in super().batches(start):
            share = [x.chunk(self.ranks.size)[self.ranks.rank] for x in batch]
            if self.poisoned == (self.ranks.rank, position.batch):
                share = [x * float("nan") for x in share]
            yield share, position


def activations():
    lm = tiny.pythia()
    return capture_tokens(lm, tiny.ids(64, 32), lm.hook_points(tiny.LAYERS))


def prepared(case, xs, folder):
    """The configuration and the calibration of a case; the stack to boost is in `folder`."""
    config = CASES[case]
    calibration = calibration_of(xs, config.predictor)
    if config.boost is None:
        return config, calibration
    base = folder / config.boost
    moments = Moments(3, 32)
    moments.add(xs)
    return replace(config, boost=str(base)), boost_calibration(ReSAE.load(base), moments)


def started(name, rank, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)


class KilledAt(ActivationBatches):
    """Batches of a text; a rank that is named dies on its way to the thirteenth."""

    dies = False

    def batches(self, *start):
        for number, found in enumerate(super().batches(*start), start=1):
            if self.dies and number == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found


def on_rows(rank, out, dies=False, resume=False):
    """Train on a text, with checkpoints every five steps."""
    lm = tiny.pythia()
    points = lm.hook_points(tiny.LAYERS)
    sizes = {"batch_tokens": 64, "buffer_tokens": 256, "total_tokens": 64 * 24}
    rows = TokenRows(TEXTS, lm.tokenizer, 24)
    source = KilledAt(lm, rows, points, **sizes, rank=rank, world=2)
    source.dies = dies
    options = {"checkpoint_steps": 5, "keep_checkpoints": 9, "resume": resume}
    train(BASE, source, calibration_of(activations()), out, ranks=Ranks(rank, 2), **options)


def of_two_killed(rank, folder):
    """Rank 1 dies without a word."""
    started("store-killed", rank, folder)
    on_rows(rank, folder / "rows-killed", dies=rank == 1)


def of_two(rank, folder):
    """Everything that two ranks do in these tests; rank 0 writes what is compared."""
    started("store", rank, folder)
    xs = activations()
    on_rows(rank, folder / "rows")
    on_rows(rank, folder / "rows-killed", resume=True)
    for case in CASES:
        ranks = Ranks(rank, 2, "layers" if case.startswith("layers") else "data")
        config, calibration = prepared(case, xs, folder)
        source = Shares(xs, ranks)
        options = {"ranks": ranks, "checkpoint_steps": 6, "log_steps": 6}
        out = folder / case
        stack = train(config, source, calibration, out, **options)
        assert stack.hook_points == list(config.layers)
        if case in ("data", "layers"):  # stopped by one rank alone, and gone on with
            asked = stop_after(7) if rank == 1 else lambda: False
            out = folder / f"{case}-cut"
            assert train(config, source, calibration, out, should_stop=asked, **options) is None
            train(config, source, calibration, out, resume=True, **options)
    # A NaN on one rank stops both.
    poisoned = Shares(xs, ranks, poisoned=(1, 5))
    with pytest.raises(ValueError, match="at step 5.* hold NaN"):
        train(BASE, poisoned, calibration_of(xs), folder / "nan", ranks=Ranks(rank, 2))
    for changes, way, says in (
        ({"loop": "closed"}, "layers", "waits for the one before"),
        ({"batch_tokens": 63}, "data", "multiple"),
        ({"predictor": "none", "shared": True}, "layers", "shared dictionary"),
        ({"layers": BASE.layers[:1], "k": (4,)}, "layers", "1 layers"),
    ):
        config = replace(BASE, **changes)
        with pytest.raises(ValueError, match=says):
            train(config, source, calibration_of(xs), folder / "no", ranks=Ranks(rank, 2, way))
    moments = Moments(3, 32)
    moments.add([x[rank::2] for x in xs])
    ranks.all_reduce_moments_(moments)
    assert moments.count == len(xs[0])
    if rank == 0:
        summed = {f"block.{i}.{j}": block for (i, j), block in moments.blocks.items()}
        save_tensors(folder / "moments", {**summed, "squares": moments.squares})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory, processes):
    folder = tmp_path_factory.mktemp("two")
    xs = activations()
    train(BASE, StoredActivations(xs, batch_tokens=64), calibration_of(xs), folder / "base")
    killed, done = (
        [processes.Process(target=of, args=(rank, folder)) for rank in range(2)]
        for of in (of_two_killed, of_two)
    )
    for pair, last in ((killed, 1), (done, 0)):
        for process in pair:
            process.start()
        pair[last].join(120)
        if pair is killed:
            pair[0].kill()
        for process in pair:
            process.join(30)
            process.kill()
    assert killed[1].exitcode == -signal.SIGKILL
    assert [process.exitcode for process in done] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def xs():
    return activations()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_weights_and_dead_latents_of_one_process(case, two, xs, tmp_path):
    config, calibration = prepared(case, xs, two)
    options = {"checkpoint_steps": 6, "log_steps": 6}
    one = train(config, StoredActivations(xs, batch_tokens=64), calibration, tmp_path, **options)
    pair = ReSAE.load(two / case)
    for (name, a), b in zip(one.state_dict().items(), pair.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5, msg=f"{name}: {(a - b).abs().max()}")
    newest = "checkpoints/step_00000024.safetensors"
    counted, of_two = (load_tensors(f / newest, "") for f in (tmp_path, two / case))
    assert counted.keys() == of_two.keys()
    for name in counted:
        if "tokens_since_fired" in name:
            assert torch.equal(counted[name], of_two[name])
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (tmp_path, two / case)]
    for ours, theirs in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for a, b in zip(ours["layers"], theirs["layers"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
            assert a["dead_fraction"] == b["dead_fraction"]
    assert ours["layers"][-1]["dead_fraction"] > 0
    assert ours["layers"][-1]["auxk"] > 0


@pytest.mark.parametrize("case", ["data", "layers"])
def test_two_ranks_stopped_by_one_of_them_and_resumed_end_in_the_same_bits(case, two):
    whole, cut = (ReSAE.load(two / name).state_dict() for name in (case, f"{case}-cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_two_ranks_that_were_killed_go_on_each_where_it_was(two):
    """Resumed, both end in the bits of ranks that nothing stopped, though each had read another
    number of rows."""
    whole, resumed = (ReSAE.load(two / name).state_dict() for name in ("rows", "rows-killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    names = ["step_00000005.safetensors", "step_00000010.safetensors"]
    for folder in ("rows", "rows-killed"):
        checkpoints = sorted((two / folder / "checkpoints").iterdir())
        assert [path.name for path in checkpoints[:2]] == names
    with safe_open(checkpoints[1], framework="pt") as file:
        first, second = json.loads(file.metadata()["positions"])
    assert first != second


def test_a_nan_of_one_rank_stops_both_and_the_batch_is_saved(two):
    saved = [
        load_tensors(two / "nan" / f"nan_batch.rank{i}.safetensors", "batch", finite=False)
        for i in (0, 1)
    ]
    assert [int(share["step"]) for share in saved] == [5, 5]
    assert [bool(share[tiny.NAMES[0]].isfinite().all()) for share in saved] == [True, False]


def test_moments_add_up_in_float64(two, xs):
    moments = Moments(3, 32)
    moments.add(xs)
    summed = load_tensors(two / "moments", "moments")
    torch.testing.assert_close(summed.pop("squares"), moments.squares, rtol=1e-12, atol=0)
    for (i, j), block in moments.blocks.items():
        torch.testing.assert_close(summed.pop(f"block.{i}.{j}"), block, rtol=1e-9, atol=1e-9)
    assert not summed


def test_only_as_many_ranks_as_before_go_on(two, xs):
    source = StoredActivations(xs, batch_tokens=64)
    with pytest.raises(ValueError, match="is of 2 ranks, here are 1"):
        train(BASE, source, calibration_of(xs), two / "data", resume=True)
