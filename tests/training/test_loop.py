import errno
import itertools
import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from resae import ReSAE, StoredActivations, TrainConfig, train, train_step
from resae.data.activations import capture_tokens
from resae.data.batches import ActivationBatches, Position
from resae.data.rows import TokenRows
from resae.models.identity import ModelIdentity
from resae.stack.fit import Moments
from resae.storage import load_header, load_tensors
from resae.training.calibration import Calibration, boost_calibration, calibrate
from resae.training.checkpoints import resumed_config
from resae.training.loss import stack_loss
from resae.training.start import initial_state

TEXT = ["The cat sat on the mat, and the dog sat by the door. " * 40]


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def xs(lm):
    return capture_tokens(lm, tiny.ids(64, 32), lm.hook_points(tiny.LAYERS))


def config_of(**changes):
    settings = {
        "layers": tuple(tiny.NAMES),
        "k": (4, 4, 4),
        "d_sae": 64,
        "train_tokens": 64 * 24,
        "batch_tokens": 64,
        "buffer_tokens": 256,
    }
    return TrainConfig(**{**settings, **changes})


def calibration_of(xs, kind="previous") -> Calibration:
    moments = Moments(len(xs), xs[0].shape[1])
    moments.add(xs)
    return calibrate(kind, moments, ridge=1e-4)


def run(xs, out, config=None, **options):
    config = config or config_of()
    source = StoredActivations(xs, batch_tokens=config.batch_tokens, seed=config.seed)
    return train(config, source, calibration_of(xs, config.predictor), out, **options)


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("kind", ["none", "identity", "previous", "all_previous"])
def test_training_lowers_the_loss_of_every_layer(xs, tmp_path, kind, loop):
    seen = []
    config = config_of(predictor=kind, loop=loop, train_tokens=64 * 80)
    run(xs, tmp_path, config, log_steps=5, on_progress=seen.append)
    for layer in range(3):
        assert seen[-1].layers[layer].fvu < 0.9 * seen[0].layers[layer].fvu
        assert 0 < seen[-1].layers[layer].l0 <= 4


def test_decoder_rows_keep_norm_1(xs, tmp_path):
    stack = run(xs, tmp_path)
    for layer in range(3):
        torch.testing.assert_close(stack.sae(layer).W_dec.norm(dim=1), torch.ones(64))


def test_saved_stack_reconstructs_raw_activations_as_the_trained_one_scaled(xs, tmp_path):
    """Folding the scales in is exact: same latents, same reconstruction up to rounding."""
    config, calibration = config_of(train_tokens=64 * 8), calibration_of(xs)
    state = initial_state(config, calibration, None, "cpu")
    batches = StoredActivations(xs, batch_tokens=64).batches()
    scale = calibration.scale
    for _ in range(config.steps):
        raw, _ = next(batches)
        train_step(state, config, [x / s for x, s in zip(raw, scale, strict=True)])
    stack = train(config, StoredActivations(xs, batch_tokens=64), calibration, tmp_path)
    with torch.no_grad():
        scaled = state.stack([x / s for x, s in zip(xs, scale, strict=True)])
        folded = stack(xs)
    for layer, s in enumerate(scale):
        same = scaled.codes[layer].indices == folded.codes[layer].indices
        assert same.float().mean() > 0.99
        error = (folded.x_hats[layer] - s * scaled.x_hats[layer]).norm()
        assert float(error / folded.x_hats[layer].norm()) < 0.01


def test_b_dec_starts_at_the_mean_where_nothing_is_predicted(xs):
    for kind, expected in (("none", [True] * 3), ("previous", [True, False, False])):
        calibration = calibration_of(xs, kind)
        stack = initial_state(config_of(predictor=kind), calibration, None, "cpu").stack
        for layer, has_mean in enumerate(expected):
            mean = xs[layer].mean(0) / calibration.scale[layer]
            target = mean if has_mean else torch.zeros_like(mean)
            torch.testing.assert_close(stack.sae(layer).b_dec.data, target, atol=1e-5, rtol=1e-4)


def test_every_layer_starts_from_its_own_directions(xs):
    stack = initial_state(config_of(), calibration_of(xs), None, "cpu").stack
    assert float((stack.sae(0).W_dec @ stack.sae(1).W_dec.T).detach().max()) < 0.99


def test_latents_count_as_dead_by_tokens_and_are_revived_by_the_auxiliary_loss(xs):
    config = config_of(dead_after_tokens=64)
    state = initial_state(config, calibration_of(xs), None, "cpu")
    sae = state.stack.sae(0)
    sae.encoder.bias.data[:8] = -100.0
    state.tokens_since_fired[0][:8] = 64
    batch = [x[:64] / s for x, s in zip(xs, calibration_of(xs).scale, strict=True)]
    before = sae.encoder.weight[:8].detach().clone()
    _, metrics = train_step(state, config, batch)
    assert float(metrics[0].dead_fraction) == 8 / 64
    assert int(state.tokens_since_fired[0][:8].min()) == 128
    # A bias that low keeps the dead silent in the auxiliary code too: nothing to learn from.
    assert torch.equal(sae.encoder.weight[:8], before)
    sae.encoder.bias.data[:8] = 0.0
    _, metrics = train_step(state, config, batch)
    assert not torch.equal(sae.encoder.weight[:8], before)
    assert float(metrics[0].auxk) > 0


def test_learning_rate_rises_stays_and_falls():
    config = config_of(train_tokens=64 * 200)
    rates = [config.lr_at(step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(config.peak_lr / 10)
    assert max(rates) == rates[100] == config.peak_lr
    assert rates[-1] == pytest.approx(config.peak_lr / 40)
    assert config_of(d_sae=2048).peak_lr == pytest.approx(4e-3)
    assert config_of(lr=1e-3).peak_lr == 1e-3


def test_log_has_the_numbers_of_the_progress_lines(xs, tmp_path):
    seen = []
    run(xs, tmp_path, log_steps=6, on_progress=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert lines[-1]["layers"][2]["fvu"] == seen[-1].layers[2].fvu
    assert "step 24/24" in seen[-1].line()
    assert "tok/s" in seen[-1].line()


def weights(folder):
    return ReSAE.load(folder).state_dict()


def stop_after(n):
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == n

    return should_stop


@pytest.mark.parametrize("interrupted_at", [1, 7, 23])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(lm, tmp_path, interrupted_at):
    config = config_of(dead_after_tokens=128)
    rows = TokenRows(TEXT, lm.tokenizer, 24)
    points = lm.hook_points(tiny.LAYERS)
    calibration = calibration_of(capture_tokens(lm, tiny.ids(16, 16), points))

    def attempt(out, **options):
        source = ActivationBatches(lm, rows, points, batch_tokens=64, buffer_tokens=256)
        return train(
            config, source, calibration, out, identity=ModelIdentity.of(lm), log_steps=3, **options
        )

    attempt(tmp_path / "whole")
    assert attempt(tmp_path / "cut", should_stop=stop_after(interrupted_at)) is None
    assert not (tmp_path / "cut" / "resae.json").exists()
    attempt(tmp_path / "cut", resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "cut")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("length", [0, 500, -1])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(xs, tmp_path, caplog, length):
    whole = run(xs, tmp_path / "whole").state_dict()
    run(xs, tmp_path / "cut", checkpoint_steps=5, should_stop=stop_after(13))
    newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    assert newest.name == "step_00000013.safetensors"
    newest.write_bytes(newest.read_bytes()[:length])
    resumed = run(xs, tmp_path / "cut", resume=True).state_dict()
    assert "step_00000013" in caplog.text
    assert "damaged" in caplog.text
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_the_last_checkpoints_are_kept(xs, tmp_path):
    for keep in (1, 2, 3):
        run(xs, tmp_path / str(keep), checkpoint_steps=4, keep_checkpoints=keep)
        names = sorted(p.name for p in (tmp_path / str(keep) / "checkpoints").iterdir())
        assert names == [f"step_000000{n}.safetensors" for n in (16, 20, 24)[-keep:]]


@pytest.mark.parametrize(
    "name", ["keep_checkpoints", "checkpoint_steps", "log_steps", "eval_steps"]
)
def test_intervals_of_nothing_are_refused_before_anything_is_written(xs, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0, expected at least 1"):
        run(xs, tmp_path / "run", **{name: 0})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("ridge", -1.0),
        ("auxk_coefficient", math.inf),
        ("dead_after_tokens", 0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}, expected"):
        config_of(**{name: value})


def test_a_resolved_configuration_trains_the_same_and_says_with_what():
    config = config_of()
    resolved = config.resolved()
    assert config.lr is config.dead_after_tokens is None
    assert resolved.lr == pytest.approx(8e-3 * math.sqrt(512 / 64))
    assert resolved.dead_after_tokens == 64 * 24 // 8
    assert [resolved.lr_at(step) for step in range(24)] == [config.lr_at(s) for s in range(24)]


def test_a_latent_counts_as_dead_after_some_mean_distances_between_its_firings():
    """Whatever the length of the training, but for short ones; of unequal layers the largest."""
    config = config_of(train_tokens=10**6)
    assert config.dead_tokens == 64 * 64 // 4
    assert replace(config, train_tokens=10**8).dead_tokens == config.dead_tokens
    assert replace(config, d_sae=(64, 640, 64), k=(4, 5, 1)).dead_tokens == 64 * 128
    assert replace(config, train_tokens=800).dead_tokens == 100
    assert replace(config, dead_after_tokens=7).dead_tokens == 7


def test_resuming_a_finished_run_changes_nothing(xs, tmp_path):
    before = run(xs, tmp_path).state_dict()
    after = run(xs, tmp_path, resume=True).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_without_a_checkpoint_says_that_it_starts_over(xs, tmp_path, caplog):
    run(xs, tmp_path, resume=True)
    assert "no checkpoint" in caplog.text
    with pytest.raises(FileNotFoundError, match="no folder .*mistyped to resume from"):
        run(xs, tmp_path / "mistyped", resume=True)
    assert not (tmp_path / "mistyped").exists()


BEGUN = config_of()
LONGER = replace(BEGUN, train_tokens=64 * 40)
AS_BEGUN = {"warmup_steps": 0.05 * 24, "dead_after_tokens": 64 * 24 // 8}


@pytest.mark.parametrize("interrupted_at", [10, 22, None])
@pytest.mark.parametrize("buffer", [4, 16])
def test_a_run_resumed_with_more_tokens_ends_as_one_of_that_length_from_the_start(
    lm, tmp_path, interrupted_at, buffer
):
    """To the bit, but for its warm-up; also where the learning rate had begun to fall, or the last
    buffer was smaller than in the longer run."""
    rows = TokenRows(TEXT, lm.tokenizer, 24)
    points = lm.hook_points(tiny.LAYERS)
    calibration = calibration_of(capture_tokens(lm, tiny.ids(16, 16), points))

    def attempt(config, name, **options):
        config = replace(config, buffer_tokens=64 * buffer)
        sizes = {"batch_tokens": 64, "buffer_tokens": config.buffer_tokens}
        source = ActivationBatches(lm, rows, points, total_tokens=config.train_tokens, **sizes)
        options = {"checkpoint_steps": 7, "log_steps": 2, **options}
        return train(config, source, calibration, tmp_path / name, **options)

    attempt(replace(LONGER, **AS_BEGUN), "whole")
    options = {} if interrupted_at is None else {"should_stop": stop_after(interrupted_at)}
    attempt(BEGUN, "cut", **options)
    checkpoints = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir())
    if interrupted_at != 10:
        common = {4: 20, 16: 16}[buffer]
        assert checkpoints == [
            f"step_000000{n}.safetensors" for n in (common, interrupted_at or 24)
        ]
    assert attempt(LONGER, "cut", resume=True, should_stop=stop_after(6)) is None
    assert not (tmp_path / "cut" / "resae.json").exists()
    attempt(LONGER, "cut", resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    (tmp_path / "cut" / "checkpoints" / "step_00000040.safetensors").unlink()
    attempt(replace(LONGER, **AS_BEGUN), "cut", resume=True)  # said or left open, it is the same
    with pytest.raises(ValueError, match=r"other settings \(warmup_steps=1.2"):
        attempt(replace(LONGER, warmup_steps=2.0), "cut", resume=True)
    with pytest.raises(ValueError, match=r"train_tokens=2560.*may rise"):
        attempt(BEGUN, "cut", resume=True)


def test_a_run_that_kept_no_checkpoint_from_before_the_fall_is_not_resumed_with_more_tokens(
    xs, tmp_path
):
    run(xs, tmp_path, BEGUN, keep_checkpoints=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="no checkpoint of .* is from before step 20"):
        run(xs, tmp_path, LONGER, resume=True)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_shorter_than_a_buffer_shares_nothing_with_a_longer_one_and_starts_over(
    xs, tmp_path, caplog
):
    short = config_of(train_tokens=64 * 3)
    assert short.common_steps == 0
    run(xs, tmp_path / "short", short)
    resumed = run(xs, tmp_path / "short", LONGER, resume=True).state_dict()
    assert "training starts from step 0" in caplog.text
    settings = {"warmup_steps": 0.05 * 3, "dead_after_tokens": 64 * 3 // 8}
    whole = run(xs, tmp_path / "whole", replace(LONGER, **settings)).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("steps", [1, 2, 5, 24, 63, 64, 100, 977])
def test_the_steps_in_common_are_those_of_the_same_learning_rate(steps):
    begun = config_of(train_tokens=64 * steps)
    common = begun.common_steps
    longer = replace(begun, train_tokens=64 * 10 * steps, warmup_steps=begun.rising_steps)
    alike = [begun.lr_at(i) == longer.lr_at(i) for i in range(steps)]
    assert all(alike[:common])
    # What stops it is the rate, or the last buffer of four batches.
    assert common in (sum(alike), steps // 4 * 4)
    assert common <= min(sum(alike), steps // 4 * 4)


def test_a_run_resumed_by_a_version_with_other_defaults_goes_on_as_it_began(
    xs, tmp_path, monkeypatch
):
    """Dead latents: earlier versions waited for an eighth of the training, and wrote no number."""
    config = config_of(train_tokens=64 * 200)
    assert config.dead_tokens == 1_024 < config.train_tokens // 8
    run(xs, tmp_path, config, should_stop=stop_after(3))
    monkeypatch.setattr("resae.training.config.IDLE_FIRINGS", 7)
    assert resumed_config(config, tmp_path).dead_after_tokens == 1_024
    path = tmp_path / "checkpoints" / "step_00000003.safetensors"
    metadata = load_header(path, "checkpoint").metadata
    earlier = json.loads(metadata["config"]) | {"dead_after_tokens": None}
    del earlier["sink_factor"]
    tensors = load_tensors(path, "checkpoint")
    save_file(tensors, path, metadata | {"config": json.dumps(earlier)})
    assert resumed_config(config, tmp_path).dead_after_tokens == config.train_tokens // 8


def test_resuming_with_other_settings_is_refused(xs, tmp_path):
    run(xs, tmp_path, should_stop=stop_after(3))
    with pytest.raises(ValueError, match="other settings.*seed=0"):
        run(xs, tmp_path, replace(config_of(), seed=1), resume=True)


class Poisoned(StoredActivations):
    """Everything of one batch is multiplied by `factor`."""

    def __init__(self, xs, step, factor):
        super().__init__(xs, batch_tokens=64)
        self.step, self.factor = step, factor

    def batches(self, start=None):
        for i, (batch, position) in enumerate(super().batches(start or Position()), start=1):
            yield [x * self.factor for x in batch] if i == self.step else batch, position


@pytest.mark.parametrize(
    ("step", "factor", "says"),
    [
        pytest.param(10, math.nan, "loss is nan at step 10.* hold NaN", id="due-for-a-checkpoint"),
        pytest.param(8, math.nan, "loss is nan at step 8.* hold NaN", id="between"),
        pytest.param(
            8, 1e30, "loss is .* at step .* are finite: train with a lower lr", id="large"
        ),
    ],
)
def test_nan_stops_the_run_with_its_batch_saved_and_no_stack(xs, tmp_path, step, factor, says):
    source = Poisoned(xs, step, factor)
    with pytest.raises(ValueError, match=says):
        train(config_of(), source, calibration_of(xs), tmp_path, log_steps=7, checkpoint_steps=5)
    assert not (tmp_path / "resae.json").exists()
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step_00000005.safetensors"]  # not one of the poisoned step
    saved = load_tensors(tmp_path / "nan_batch.safetensors", "batch", finite=False)
    assert saved["step"] == step
    batch = next(itertools.islice(source.batches(), step - 1, None))[0]
    for name, x in zip(tiny.NAMES, batch, strict=True):
        torch.testing.assert_close(saved[name], x, rtol=0, atol=0, equal_nan=True)


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_is(xs, tmp_path, monkeypatch):
    def step(state, *rest):
        state.stack.sae(1).b_dec.data[3] = math.inf if state.step == 4 else 0
        return train_step(state, *rest)

    monkeypatch.setattr("resae.training.loop.train_step", step)
    with pytest.raises(ValueError, match="at step 5, or the weights after it are not finite"):
        run(xs, tmp_path, checkpoint_steps=5)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_named_and_the_checkpoint_before_is_gone_on_from(
    xs, tmp_path, monkeypatch, error
):
    whole = run(xs, tmp_path / "whole").state_dict()

    def until_full(tensors, path, metadata):
        if metadata["step"] == "10":
            path.write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("resae.training.checkpoints.save_file", until_full)
    said = r"cannot write .*step_00000010.*No space left.*step_00000005\.safetensors is intact"
    with pytest.raises(OSError, match=said):
        run(xs, tmp_path / "cut", checkpoint_steps=5)
    names = [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert names == ["step_00000005.safetensors"]
    monkeypatch.undo()
    resumed = run(xs, tmp_path / "cut", resume=True).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_calibration_comes_back(xs, tmp_path):
    calibration = calibration_of(xs)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors", "previous")
    assert loaded.scale == calibration.scale
    assert all(torch.equal(a, b) for a, b in zip(loaded.mean, calibration.mean, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.predictor.A, calibration.predictor.A, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"k": (4, 4)}, "2 k for 3 layers", id="k-count"),
        pytest.param({"k": (4, 65, 4)}, "k=65 for d_sae=64", id="k-above-M"),
        pytest.param({"k": (0, 4, 4)}, "1 ≤ k", id="k-zero"),
        pytest.param({"d_sae": (64, 64)}, "2 d_sae for 3 layers", id="d_sae-count"),
        pytest.param({"d_sae": (64, 3, 64)}, "k=4 for d_sae=3", id="k-above-own-M"),
        pytest.param(
            {"shared": True, "predictor": "none", "d_sae": (64, 64, 96)},
            r"d_sae=\(64, 64, 96\); a dictionary of all layers .* one k and d_sae",
            id="shared-d_sae",
        ),
        pytest.param({"predictor": "magic"}, "predictor='magic', expected 'none'", id="predictor"),
        pytest.param({"loop": "round"}, "loop='round'", id="loop"),
        pytest.param({"shared": True}, "predictor 'none' and one k", id="shared-predicted"),
        pytest.param({"shared": True, "predictor": "none", "k": (4, 4, 5)}, "one k", id="shared-k"),
        pytest.param({"prefixes": (1, 2)}, r"prefixes=\(1, 2\).*end with it", id="prefixes-end"),
        pytest.param({"prefixes": (2, 1, 4)}, "rising", id="prefixes-order"),
        pytest.param({"prefixes": (0, 4)}, "from 1 on", id="prefixes-zero"),
        pytest.param({"prefixes": ()}, "prefixes=", id="prefixes-none"),
        pytest.param({"prefixes": (1, 4), "k": (4, 8, 4)}, "one k", id="prefixes-k"),
        pytest.param({"prefix_gain": -1.0}, "prefix_gain=-1", id="prefixes-gain"),
        pytest.param({"train_tokens": 0}, "train_tokens=0", id="tokens"),
        pytest.param({"buffer_tokens": 32}, "below batch_tokens=64", id="buffer"),
        pytest.param({"clip_norm": 0.0}, "clip_norm=0.0", id="clip"),
        pytest.param({"accumulation_steps": 65}, "accumulation_steps=65", id="accumulation"),
    ],
)
def test_impossible_settings_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


SIZES = (32, 64, 96)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_layers_of_different_sizes_are_trained_resumed_and_saved(xs, tmp_path, loop):
    config = config_of(d_sae=SIZES, loop=loop, dead_after_tokens=128)
    whole = run(xs, tmp_path / "whole", config)
    assert whole.d_sae == SIZES
    assert [len(whole.sae(layer).W_dec) for layer in range(3)] == list(SIZES)
    assert run(xs, tmp_path / "cut", config, should_stop=stop_after(9)) is None
    resumed = run(xs, tmp_path / "cut", config, resume=True).state_dict()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.state_dict().items())
    with pytest.raises(ValueError, match=r"other settings \(d_sae=\(32, 64, 96\)"):
        run(xs, tmp_path / "cut", replace(config, d_sae=64), resume=True)


def test_equal_sizes_per_layer_are_one_size_to_the_bit(xs, tmp_path):
    one, each = (run(xs, tmp_path / str(d), config_of(d_sae=d)) for d in (64, (64, 64, 64)))
    assert one.d_sae == each.d_sae == 64
    assert all(torch.equal(t, each.state_dict()[n]) for n, t in one.state_dict().items())


def test_the_size_of_one_layer_does_not_change_another(xs, tmp_path):
    """Without a chain each layer trains at the learning rate of its own size."""
    one, other = (
        run(xs, tmp_path / str(d), config_of(d_sae=d, predictor="none")) for d in (64, SIZES)
    )
    assert config_of(d_sae=SIZES).peak_lrs == tuple(config_of(d_sae=M).peak_lr for M in SIZES)
    same, smaller = (stack.sae(1).state_dict() for stack in (one, other))
    assert all(torch.equal(t, smaller[name]) for name, t in same.items())


def test_settings_where_predictions_gain_nothing_have_a_warning():
    names = tuple(name.replace("resid_post", "mlp_out") for name in tiny.NAMES)
    said = str(config_of(layers=names).warning)
    assert "at hook_mlp_out predicting a layer from others gained nothing" in said
    assert "in the demo (its embedded model, k = 8)" in said
    assert config_of(layers=names, predictor="none").warning is None
    assert config_of().warning is None


def test_a_shared_dictionary_is_trained_resumed_and_saved_as_one(xs, tmp_path):
    config = config_of(predictor="none", shared=True, dead_after_tokens=128)
    whole = run(xs, tmp_path / "whole", config)
    assert whole.shared
    assert run(xs, tmp_path / "cut", config, should_stop=stop_after(7)) is None
    resumed = run(xs, tmp_path / "cut", config, resume=True).state_dict()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.state_dict().items())
    loaded = ReSAE.load(tmp_path / "whole")
    assert loaded.shared
    norms = whole.sae(0).W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(64))
    out = [stack([x[:50] for x in xs]).x_hats for stack in (whole, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))
    ratio = (whole.sae(2).b_dec.norm() / whole.sae(0).b_dec.norm()).detach()
    scale = calibration_of(xs).scale
    assert float(ratio) == pytest.approx(scale[2] / scale[0], rel=1e-5)
    assert abs(float(ratio) - 1) > 1e-3  # each layer has its own scale folded in


def test_a_latent_of_a_shared_dictionary_lives_by_any_layer(xs):
    config = config_of(predictor="none", shared=True)
    calibration = calibration_of(xs, "none")
    state = initial_state(config, calibration, None, "cpu")
    (since,) = state.tokens_since_fired
    batch = [x[:3] / s for x, s in zip(xs, calibration.scale, strict=True)]
    codes = [state.stack.sae(i).encode(x) for i, x in enumerate(batch)]
    fired = [set(code.indices[code.acts > 0].tolist()) for code in codes]
    assert len({frozenset(f) for f in fired}) > 1
    train_step(state, config, batch)
    assert set((since == 0).nonzero().flatten().tolist()) == set.union(*fired)
    assert int(since.max()) == 3  # tokens, not tokens times layers


@pytest.mark.parametrize("kind", ["none", "previous"])
def test_the_loss_over_prefixes_is_the_mean_of_the_errors_at_each(xs, kind):
    config = config_of(predictor=kind, prefixes=(1, 3, 4), auxk_coefficient=0.0)
    calibration = calibration_of(xs, kind)
    stack = initial_state(config, calibration, None, "cpu").stack
    batch = [x[:64] / s for x, s in zip(xs, calibration.scale, strict=True)]
    dead = [torch.zeros(64, dtype=torch.bool)] * 3
    found = stack_loss(stack, config, batch, dead)
    expected = 0.0
    for layer, x in enumerate(batch):
        prediction = stack.predictor(layer, batch)
        target = x if prediction is None else x - prediction
        for j in (1, 3, 4):
            acts, indices = stack.sae(layer).encode(x, prediction=prediction, k=j)
            x_hat = stack.sae(layer).decode(
                acts * (4 / j) ** (1 / 8), indices, prediction=prediction
            )
            error = (x - x_hat).square().sum()
            expected = expected + error / (target - target.mean(0)).square().sum() / 3
    torch.testing.assert_close(found.loss, expected)
    parameters = list(stack.saes.parameters())
    for a, b in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trained_over_prefixes_a_truncated_code_reconstructs_better(xs, tmp_path):
    settings = {"predictor": "none", "k": (8, 8, 8), "train_tokens": 64 * 120}
    plain = run(xs, tmp_path / "plain", config_of(**settings))
    nested = run(xs, tmp_path / "nested", config_of(**settings, prefixes=(1, 2, 4, 8)))

    @torch.no_grad()
    def error(stack, k):
        x_hats = stack.at_k(k)(xs).x_hats
        return sum(float((x - y).square().mean()) for x, y in zip(xs, x_hats, strict=True))

    loaded = ReSAE.load(tmp_path / "nested")
    assert loaded.sae(0).config.prefix_gain == 1 / 8
    assert error(loaded, 2) == error(nested, 2)
    assert error(nested, 1) < 0.95 * error(plain, 1)
    assert error(nested, 2) < 0.98 * error(plain, 2)
    assert error(nested, 8) < 1.2 * error(plain, 8)


def boost(xs, base, out, config=None, **options):
    """Boost the stack in folder `base` on `xs`, as `resae train --boost` does."""
    loaded = ReSAE.load(base)
    config = config or config_of(
        boost=str(base), k=(2, 2, 2), d_sae=32, predictor=loaded.predictor.kind
    )
    moments = Moments(3, 32, "none")
    moments.add(xs)
    source = StoredActivations(xs, batch_tokens=64)
    return train(config, source, boost_calibration(loaded, moments), out, **options)


@pytest.mark.parametrize("kind", ["none", "previous"])
def test_boosting_leaves_the_base_its_bits_and_helps_on_the_new_data(xs, tmp_path, kind):
    run([x[:1024] for x in xs], tmp_path / "base", config_of(predictor=kind))
    base = ReSAE.load(tmp_path / "base")
    new = [1.5 * x[1024:] + 2 * x[1024:].roll(1, dims=1) for x in xs]
    boost(new, tmp_path / "base", tmp_path / "boost")
    loaded = ReSAE.load(tmp_path / "boost")
    assert loaded.boosted
    before = base.state_dict()
    after = {name.replace(".frozen.", "."): t for name, t in loaded.state_dict().items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    for layer in range(3):
        assert float(loaded.sae(layer).threshold) > 0
        loaded.sae(layer).threshold.zero_()
    with torch.no_grad():
        for x, y, z in zip(new, base(new).x_hats, loaded(new).x_hats, strict=True):
            assert float((x - z).square().sum()) < 0.95 * float((x - y).square().sum())


def test_a_resumed_boost_ends_in_the_bits_of_an_uninterrupted_one(xs, tmp_path):
    run(xs, tmp_path / "base")
    whole = boost(xs, tmp_path / "base", tmp_path / "whole").state_dict()
    assert boost(xs, tmp_path / "base", tmp_path / "cut", should_stop=stop_after(9)) is None
    resumed = boost(xs, tmp_path / "base", tmp_path / "cut", resume=True).state_dict()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())


def test_the_threshold_of_a_boost_in_pieces_is_that_of_whole_batches(xs, tmp_path):
    run(xs, tmp_path / "base", config_of(train_tokens=64))
    whole, cut = (
        boost(
            xs,
            tmp_path / "base",
            tmp_path / str(pieces),
            config_of(
                boost=str(tmp_path / "base"),
                k=(2, 2, 2),
                train_tokens=64 * 4,
                lr=1e-3,
                accumulation_steps=pieces,
            ),
        )
        for pieces in (1, 3)
    )
    for layer in range(3):
        threshold = whole.sae(layer).threshold
        assert threshold > 0
        torch.testing.assert_close(cut.sae(layer).threshold, threshold, rtol=1e-4, atol=0)


def test_second_autoencoders_of_different_sizes(xs, tmp_path):
    run(xs, tmp_path / "base")
    config = config_of(boost=str(tmp_path / "base"), k=(2, 2, 2), d_sae=SIZES)
    stack = boost(xs, tmp_path / "base", tmp_path / "boost", config)
    assert stack.d_sae == tuple(64 + M for M in SIZES)
    assert ReSAE.load(tmp_path / "boost").d_sae == stack.d_sae


def test_what_cannot_be_boosted_is_named(xs, tmp_path):
    run(xs, tmp_path / "base")
    other = config_of(boost=str(tmp_path / "base"), predictor="none")
    with pytest.raises(ValueError, match="'previous', 'full'.*expected.*'none'"):
        boost(xs, tmp_path / "base", tmp_path / "out", other)
    config = config_of(boost=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="no powers of two"):
        initial_state(config, calibration_of(xs), None, "cpu")
    with pytest.raises(ValueError, match="boost with shared or prefixes"):
        replace(config, prefixes=(1, 4))
    with pytest.raises(ValueError, match="boost_keep=0"):
        replace(config, boost_keep=0.0)


def one_step(xs, config, kind="previous", batch=None):
    """The state after a step from the start, with eight dead latents in the first layer."""
    calibration = calibration_of(xs, kind)
    state = initial_state(config, calibration, None, "cpu")
    state.tokens_since_fired[0][:8] = config.dead_tokens
    batch = batch or [x[:64] for x in xs]
    scaled = [x / s for x, s in zip(batch, calibration.scale, strict=True)]
    return state, *train_step(state, config, scaled)


WAYS = {
    "open": {"loop": "open"},
    "closed": {"loop": "closed"},
    "shared": {"predictor": "none", "shared": True},
    "prefixes": {"prefixes": (1, 2, 4)},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_in_pieces_gives_the_weights_of_the_whole_batch(xs, way):
    results = []
    for pieces in (1, 3):
        config = config_of(**WAYS[way], accumulation_steps=pieces, lr=1e-3)
        results.append(one_step(xs, config, config.predictor))
    (whole, loss, metrics), (cut, cut_loss, cut_metrics) = results
    torch.testing.assert_close(cut_loss, loss)
    torch.testing.assert_close(cut_metrics, metrics)
    for (name, a), b in zip(whole.stack.named_parameters(), cut.stack.parameters(), strict=True):
        # Adam's first step is lr · sign(gradient): where it is 0 up to rounding, that may differ.
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7, msg=name)
        assert float((b - a).abs().gt(1e-6).float().mean()) < 0.01
    assert torch.equal(whole.tokens_since_fired[0], cut.tokens_since_fired[0])
    assert float(metrics[0].auxk) > 0


def test_normalisers_of_the_loss_have_names(xs):
    """Denominators of the whole batch, given by name, make the losses of its pieces add up."""
    config = config_of()
    calibration = calibration_of(xs, "previous")
    state = initial_state(config, calibration, None, "cpu")
    batch = [x[:64] / s for x, s in zip(xs, calibration.scale, strict=True)]
    dead = [torch.arange(64) < 8, torch.zeros(64, dtype=torch.bool), torch.arange(64) < 8]
    sums = {}

    def recorded(name):
        return lambda part: sums.setdefault(name, part)

    whole = stack_loss(state.stack, config, batch, dead, normaliser=recorded)
    assert list(sums) == ["variance.0", "auxk.0", "variance.1", "variance.2", "auxk.2"]
    pieces = zip(*(x.split([40, 24]) for x in batch), strict=True)
    losses = [
        stack_loss(state.stack, config, piece, dead, normaliser=lambda name: lambda _: sums[name])
        for piece in pieces
    ]
    torch.testing.assert_close(losses[0].loss + losses[1].loss, whole.loss)


def test_gradients_of_all_layers_together_are_clipped(xs):
    def norm(clip):
        gradients = [p.grad for p in one_step(xs, config_of(clip_norm=clip))[0].stack.parameters()]
        return float(torch.cat([g.flatten() for g in gradients]).norm())

    free = norm(None)
    assert norm(free / 3) == pytest.approx(free / 3)
    assert norm(3 * free) == pytest.approx(free)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_weights(xs, tmp_path):
    seen = []
    config = config_of(autocast=True, train_tokens=64 * 80)
    stack = run(xs, tmp_path, config, log_steps=5, on_progress=seen.append)
    assert all(seen[-1].layers[i].fvu < 0.9 * seen[0].layers[i].fvu for i in range(3))
    assert {p.dtype for p in stack.parameters()} == {torch.float32}
    (half, _, metrics), (_, _, exact) = (
        one_step(xs, config_of(autocast=autocast)) for autocast in (True, False)
    )
    assert {t.dtype for s in half.optimizer.state.values() for t in s.values()} == {torch.float32}
    fvu = [float(layers[0].fvu) for layers in (metrics, exact)]
    assert fvu[0] != fvu[1]
    assert fvu[0] == pytest.approx(fvu[1], rel=0.01)
