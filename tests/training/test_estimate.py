"""The estimate against true sizes of small runs and against torch's count of FLOPs."""

import pytest
import tiny
import torch
from families import made
from safetensors import safe_open
from test_loop import calibration_of, config_of, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, GPTNeoXConfig

from resae import ActivationBatches, Moments, TokenRows, train_step
from resae.cli import main
from resae.data.activations import capture_tokens
from resae.data.batches import Position
from resae.models.hooked import HookedLM
from resae.training.distributed import Ranks
from resae.training.estimate import Device, ModelSizes, estimate_run
from resae.training.start import initial_state

CONFIGS = {
    "pythia-1.4b": GPTNeoXConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
    ),
    "gemma-2-9b": Gemma2Config(
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        intermediate_size=14336,
        vocab_size=256000,
    ),
}


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def xs(lm):
    return capture_tokens(lm, tiny.ids(64, 32), lm.hook_points(tiny.LAYERS))


def sizes(lm, context_tokens=24):
    return ModelSizes.of(lm, tuple(tiny.NAMES), context_tokens)


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes", [{}, {"d_sae": (32, 64, 96)}, {"predictor": "none", "shared": True}]
)
def test_memory_of_weights_moments_checkpoints_and_buffer_is_exact(lm, xs, tmp_path, changes):
    config = config_of(**changes)
    estimate = estimate_run(config, sizes(lm))
    calibration = calibration_of(xs, config.predictor)
    state = initial_state(config, calibration, None, "cpu")
    train_step(state, config, [x[:64] for x in xs])
    parameters = list(state.stack.saes.parameters())
    own = sum(p.nbytes for p in parameters)
    adam = [t for p in parameters for t in state.optimizer.state[p].values() if t.ndim]
    assert estimate.device_memory["autoencoders"] == own
    assert estimate.device_memory["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert estimate.device_memory["Adam"] == sum(t.nbytes for t in adam)
    maps = sum(t.nbytes for t in state.stack.predictor.state_dict().values())
    assert estimate.device_memory["maps"] == maps
    run(xs, tmp_path, config, checkpoint_steps=12, keep_checkpoints=1)
    (path,) = (tmp_path / "checkpoints").iterdir()
    with safe_open(path, framework="pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert estimate.host_memory["checkpoint"] == held
    rows = TokenRows(["The cat sat. " * 900], lm.tokenizer, 24)
    points = lm.hook_points(tiny.LAYERS)
    settings = {"batch_tokens": 64, "buffer_tokens": 300, "buffer_dtype": torch.bfloat16}
    source = ActivationBatches(lm, rows, points, **settings)
    held = source._refill(source.activations.reader(0), Position()).xs
    estimate = estimate_run(config_of(buffer_tokens=300), sizes(lm))
    assert estimate.device_memory["buffer"] == sum(x.nbytes for x in held)
    assert estimate.device_memory["language model"] == sum(p.nbytes for p in lm.model.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flops_of_the_language_model_are_those_that_torch_counts(family):
    lm = tiny.FAMILIES[family]()
    lm.model.set_attn_implementation("eager")
    for layers in (tiny.NAMES[:2], tiny.NAMES):
        points = lm.hook_points(layers)
        counted = flops_of(lambda points=points: lm.capture(tiny.ids(2, 20), points)) / 40
        assert ModelSizes.of(lm, tuple(layers), 20).flops_per_token == pytest.approx(
            counted, rel=0.001
        )


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "opt", "granite"])
def test_flops_of_more_families_are_those_that_torch_counts(kind):
    lm = made(kind)
    lm.model.set_attn_implementation("eager")
    if hasattr(lm.config, "num_experts_per_tok"):
        lm.model.set_experts_implementation("eager")
    points = lm.hook_points([0, 1])
    counted = flops_of(lambda: lm.capture(tiny.ids(2, 20), points)) / 40
    estimate = ModelSizes.of(lm, tuple(point.name for point in points), 20).flops_per_token
    assert estimate == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize("kind", ["identity", "previous", "all_previous"])
def test_flops_of_calibration_are_those_that_torch_counts(lm, xs, kind):
    estimate = estimate_run(config_of(predictor=kind), sizes(lm))
    moments = Moments(3, 32, kind)
    counted = flops_of(lambda: moments.add([x[:64] for x in xs])) / 64
    assert estimate.phases[0].flops - sizes(lm).flops_per_token == counted


def test_flops_of_the_encode_are_those_that_torch_counts(lm, xs):
    estimate = estimate_run(config_of(predictor="none"), sizes(lm))
    weight = torch.randn(64, 32)
    counted = 3 * flops_of(lambda: xs[0][:64] @ weight.T) / 64
    sparse = 3 * 8 * 4 * 32
    assert {p.name: p for p in estimate.phases}["SAE step"].flops == counted + sparse


def test_what_scales_with_ranks_and_what_does_not(lm):
    def of(ranks, parallelism="data", **changes):
        estimate = estimate_run(config_of(**changes), sizes(lm), ranks=Ranks(0, ranks, parallelism))
        return estimate, {p.name: p.seconds for p in estimate.phases}

    (one, alone), (two, by_data), (three, by_layers) = of(1), of(2), of(3, "layers")
    assert by_data["language model"] == pytest.approx(alone["language model"] / 2)
    assert by_layers["language model"] == pytest.approx(alone["language model"] / 3)
    assert alone["SAE step"] / 2 < by_data["SAE step"] < alone["SAE step"]  # all are updated
    assert by_layers["SAE step"] == pytest.approx(alone["SAE step"] / 3, rel=0.02)
    assert two.device_memory["Adam"] == one.device_memory["Adam"]
    assert three.device_memory["Adam"] == one.device_memory["Adam"] / 3
    assert two.device_memory["buffer"] == one.device_memory["buffer"] / 2
    assert "exchange" in by_data
    assert "exchange" not in alone
    fast = estimate_run(config_of(), sizes(lm), device=Device(utilisation=1.0))
    assert fast.tokens_per_second == pytest.approx(2 * one.tokens_per_second)


def test_the_rank_with_the_largest_autoencoders_is_planned(lm):
    config = config_of(d_sae=(32, 64, 96))
    one, two = (estimate_run(config, sizes(lm), ranks=Ranks(0, n, "layers")) for n in (1, 2))
    held = [4 * sum(2 * M * 32 + M + 32 for M in Ms) for Ms in ((32, 64, 96), (32, 96))]
    assert [p.device_memory["autoencoders"] for p in (one, two)] == held
    assert one.disk["stack"] == two.disk["stack"] == held[0]
    assert "M = 32 + 64 + 96," in one.table()


@pytest.mark.parametrize(("name", "weights"), [("pythia-1.4b", 2.83), ("gemma-2-9b", 18.48)])
def test_plan_needs_a_config_and_nothing_else(name, weights, tmp_path, capsys, monkeypatch):
    CONFIGS[name].save_pretrained(tmp_path / name)
    monkeypatch.setattr(HookedLM, "from_pretrained", None)
    monkeypatch.setattr("resae.data.rows.train_and_held_out", None)
    arguments = ["train", str(tmp_path / name), "no-data", "--layers", "0,6,12,18", "--k", "64"]
    arguments += ["--d-sae", "65536", "--train-tokens", "500000000", "--batch-tokens", "8192"]
    out = ["--out", str(tmp_path / "out"), "--dtype", "bfloat16", "--autocast", "--plan"]
    assert main([*arguments, *out]) == 0
    printed = capsys.readouterr().out
    assert "a cost model, nothing was measured" in printed
    assert f"(language model {weights}, autoencoders " in printed
    assert not (tmp_path / "out").exists()
    assert main([*arguments, *out, "--plan-ranks", "4", "--parallel", "layers"]) == 0
    assert "4 × H200 (data sheet), by layers" in capsys.readouterr().out
    assert main([*arguments, *out, "--plan-device", "1e12,1e11"]) == 0
    assert "1e+12 FLOP/s" in capsys.readouterr().out
