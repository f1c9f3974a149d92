"""Online training: steps against formulas, the loop, and the command on tiny models."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from commands import SMALL, TRAIN

from resae import ReSAE, ThresholdSAE, TokenRows, replacement
from resae.cli import main
from resae.data.activations import capture_tokens
from resae.data.batches import Position, RowBatches
from resae.evaluation.metrics import cross_entropy, kl_divergence
from resae.storage import load_json
from resae.training import FinetuneConfig, OnlineConfig, finetune, train_online
from resae.training.loss import stack_loss
from resae.training.low_rank import LowRankAdam
from resae.training.online import layer_scales

TEXT = ["The cat sat on the mat, and the dog sat by the door. " * 40]
T, ROWS = 16, 4


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def stack(lm):
    return tiny.stack(lm)


def rows(lm):
    return TokenRows(TEXT, lm.tokenizer, T)


def config_of(stack, steps=6, **changes):
    asked = {"train_tokens": steps * ROWS * T, "batch_tokens": ROWS * T, **changes}
    return FinetuneConfig(run="a", out="b", **asked).for_stack(stack, T)


def tune(lm, stack, out, config=None, **options):
    scale = layer_scales(lm, stack, tiny.ids())
    source = RowBatches(rows(lm), ROWS)
    return train_online(config or config_of(stack), source, lm, stack, scale, out, **options)


def tensors_of(stack):
    return {**dict(stack.named_parameters()), **dict(stack.named_buffers())}


def same(one, other):
    one, other = tensors_of(one), tensors_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(tensors_of(one).values(), tensors_of(other).values(), strict=True)
    )


def replaced_nats(lm, stack, config):
    """What the objective measures, on the text that is trained on."""
    nats = []
    for ids in rows(lm).batches(8):
        with replacement(lm, stack, loop=config.loop):
            replaced = lm.logits(ids)
        kl = kl_divergence(lm.logits(ids), replaced)
        nats.append(kl if config.objective == "kl" else cross_entropy(replaced, ids))
    return float(torch.cat(nats).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "ce", "mse_weight": 0.0},
        {"loop": "open", "train_maps": True},
        {"plain_probability": 0.3},
    ],
    ids=str,
)
def test_the_loss_of_the_replaced_model_falls(lm, stack, tmp_path, changes):
    config = config_of(stack, 25, lr=3e-3, **changes)
    tuned = tune(lm, stack, tmp_path, config)
    before, after = (replaced_nats(lm, s, config) for s in (stack, tuned))
    assert after < 0.8 * before
    for layer in range(3):
        sae = tuned.sae(layer)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
        assert sae.config == stack.sae(layer).config
        assert not torch.equal(sae.encoder.weight, stack.sae(layer).encoder.weight)
    maps = zip(tuned.predictor.buffers(), stack.predictor.buffers(), strict=True)
    changed = [not torch.equal(one, other) for one, other in maps]
    assert changed == [config.train_maps] * 4
    assert not any(buffer.requires_grad for buffer in tuned.buffers())


def test_the_model_and_the_stack_stay_what_they_are(lm, stack, tmp_path):
    weights, began = deepcopy(lm.model.state_dict()), deepcopy(stack)
    lm.model.train()
    lm.model.lm_head.weight.requires_grad_(False)
    tune(lm, stack, tmp_path)
    assert lm.model.training
    assert [n for n, p in lm.model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    lm.model.requires_grad_()
    lm.model.eval()
    assert all(torch.equal(weights[name], t) for name, t in lm.model.state_dict().items())
    assert all(p.grad is None for p in lm.model.parameters())
    assert same(stack, began)


@pytest.mark.parametrize("objective", ["kl", "ce"])
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_the_loss_is_the_formula_by_hand(lm, stack, tmp_path, objective, loop):
    config = config_of(stack, 1, objective=objective, loop=loop, mse_weight=0.25)
    seen = []
    tune(lm, stack, tmp_path, config, on_progress=seen.append)
    ids = torch.stack(list(rows(lm))[:ROWS])
    counted = ~lm.is_special(ids)[:, :-1]
    clean = lm.logits(ids)
    with replacement(lm, stack, loop=loop):
        replaced = lm.logits(ids)
    nats = kl_divergence(clean, replaced) if objective == "kl" else cross_entropy(replaced, ids)
    xs = capture_tokens(lm, ids, lm.hook_points(tiny.LAYERS))
    alive = [torch.zeros(64, dtype=torch.bool)] * 3
    with torch.no_grad():
        own = stack_loss(stack, config, xs, alive)
    expected = nats[counted].mean() + 0.25 * own.loss
    assert seen[0].loss == pytest.approx(expected.item(), rel=1e-4)
    for layer, metrics in enumerate(seen[0].layers):
        assert metrics.fvu == pytest.approx(float(own.metrics[layer].fvu), rel=1e-4)
        assert metrics.l0 == pytest.approx(float(own.metrics[layer].l0), rel=1e-4)


def test_the_control_has_only_the_loss_of_plain_training(lm, stack, tmp_path):
    seen = []
    config = config_of(stack, 20, lr=3e-3, objective="mse", mse_weight=0.5, loop="closed")
    tune(lm, stack, tmp_path, config, log_steps=1, on_progress=seen.append)
    for progress in (seen[0], seen[-1]):
        own = sum(metrics.fvu + metrics.auxk / 32 for metrics in progress.layers)
        assert progress.loss == pytest.approx(0.5 * own, rel=1e-4)
    assert seen[-1].loss < 0.9 * seen[0].loss


@pytest.mark.parametrize("changes", [{}, {"plain_probability": 0.5, "clip_norm": 0.1}], ids=str)
def test_pieces_and_recomputed_blocks_give_the_same_weights(lm, stack, tmp_path, changes):
    whole = tune(lm, stack, tmp_path / "whole", config_of(stack, 3, **changes))
    pieces = config_of(stack, 3, accumulation_steps=3, **changes)
    assert close(tune(lm, stack, tmp_path / "pieces", pieces), whole)
    recomputed = config_of(stack, 3, gradient_checkpointing=True, **changes)
    assert same(tune(lm, stack, tmp_path / "recomputed", recomputed), whole)


def test_where_the_plain_stream_always_goes_on_nothing_is_lost(lm, stack, tmp_path):
    seen = []
    config = config_of(stack, 1, plain_probability=1.0, mse_weight=0.0)
    tune(lm, stack, tmp_path, config, on_progress=seen.append)
    assert seen[0].loss == pytest.approx(0, abs=1e-6)


def test_in_turn_each_step_changes_one_layer(lm, stack, tmp_path):
    began = stack
    for steps in (1, 2):
        tuned = tune(lm, stack, tmp_path / str(steps), config_of(stack, steps, in_turn=True))
        changed = [
            not torch.equal(tuned.sae(i).encoder.weight, began.sae(i).encoder.weight)
            for i in range(3)
        ]
        assert changed == [True, steps == 2, False]
    config = config_of(stack, 25, lr=3e-3, in_turn=True)
    tuned = tune(lm, stack, tmp_path / "more", config)
    assert replaced_nats(lm, tuned, config) < 0.9 * replaced_nats(lm, stack, config)


def test_of_low_rank_matrices_change_by_a_product_and_train(lm, stack, tmp_path):
    config = config_of(stack, 25, lr=3e-3, update_rank=3, train_maps=True)
    tuned = tune(lm, stack, tmp_path, config)
    assert replaced_nats(lm, tuned, config) < 0.9 * replaced_nats(lm, stack, config)
    for layer in range(3):
        one, other = (s.sae(layer).encoder.weight.detach().double() for s in (tuned, stack))
        values = torch.linalg.svdvals(one - other)
        assert values[2] > 1e-3
        assert values[3] < 1e-4 * values[0]
        torch.testing.assert_close(tuned.sae(layer).W_dec.norm(dim=1), torch.ones(64))
    values = torch.linalg.svdvals((tuned.predictor.A[0] - stack.predictor.A[0]).double())
    assert values[3] < 1e-4 * values[0]
    assert same(ReSAE.load(tmp_path), tuned)


@pytest.mark.parametrize("changes", [{"update_rank": 3}, {"in_turn": True}], ids=str)
def test_resumed_in_turn_and_of_low_rank_it_ends_in_the_same_bits(lm, stack, tmp_path, changes):
    config = config_of(stack, 5, **changes)
    whole = tune(lm, stack, tmp_path / "whole", config)
    asked = iter([False] * 2 + [True])
    tune(lm, stack, tmp_path / "part", config, should_stop=lambda: next(asked))
    assert same(tune(lm, stack, tmp_path / "part", config, resume=True), whole)


def test_low_rank_is_adam_on_the_factors():
    torch.manual_seed(3)
    W = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    began, target = W.detach().clone(), torch.randn(6, 5, dtype=torch.float64)
    ours = LowRankAdam([{"params": [W], "lr": 0.1}], rank=2, seed=1)
    U, V = (torch.nn.Parameter(ours.state[W][name].clone()) for name in "UV")
    adam = torch.optim.Adam([U, V], lr=0.1)
    for _ in range(4):
        ours.zero_grad()
        ((W - target) ** 2).sum().backward()
        ours.step()
        adam.zero_grad()
        ((began + U @ V - target) ** 2).sum().backward()
        adam.step()
        torch.testing.assert_close(W.detach(), (began + U @ V).detach())


def test_a_resumed_training_ends_in_the_bits_of_an_uninterrupted_one(lm, stack, tmp_path):
    config = config_of(stack, 9, train_maps=True, plain_probability=0.3)
    whole = tune(lm, stack, tmp_path / "whole", config, checkpoint_steps=100)
    asked = iter([False] * 3 + [True])
    stopped = tune(lm, stack, tmp_path / "part", config, should_stop=lambda: next(asked))
    assert stopped is None
    assert not (tmp_path / "part" / "resae.json").exists()
    resumed = tune(lm, stack, tmp_path / "part", config, resume=True)
    assert same(resumed, whole)
    with pytest.raises(ValueError, match="other settings .*mse_weight"):
        tune(lm, stack, tmp_path / "part", replace(config, mse_weight=1.0), resume=True)


def test_a_loss_that_is_not_finite_ends_the_training(lm, stack, tmp_path):
    broken = deepcopy(stack)
    broken.sae(1).W_dec.data[:] = float("inf")
    with pytest.raises(ValueError, match="loss is nan at step 1, .*lower lr"):
        tune(lm, broken, tmp_path)
    assert not list(tmp_path.rglob("step_*"))
    assert not (tmp_path / "resae.json").exists()


def test_rows_start_over_and_go_on_from_any_position(lm):
    source = RowBatches(rows(lm), 12)
    first = source.batches()
    expected = [next(first) for _ in range(5)]
    assert expected[-1][1].epoch > 0
    for (_, position), (batch, after) in zip(expected[:-1], expected[1:], strict=True):
        again, reached = next(source.batches(position))
        assert torch.equal(again[0], batch[0])
        assert reached == after
    with pytest.raises(ValueError, match="holds no row"):
        next(RowBatches(TokenRows([], lm.tokenizer, T), 2).batches(Position()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 40}, "batch_tokens=40, expected a multiple of .* 16 tokens"),
        ({"accumulation_steps": 5}, "accumulation_steps=5 for 4 rows"),
        ({"objective": "l2"}, "objective='l2', expected 'kl', 'ce' or 'mse'"),
        ({"objective": "mse", "mse_weight": 0.0}, "objective='mse' with mse_weight=0"),
        ({"plain_probability": 1.5}, "plain_probability=1.5, expected 0 to 1"),
        ({"update_rank": 0}, "update_rank=0, expected at least 1"),
        ({"mse_weight": -1.0}, "mse_weight=-1.0, expected from 0 on"),
    ],
)
def test_impossible_settings_are_refused(stack, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(stack, **changes)


def test_gradient_checkpointing_inside_blocks_is_refused(lm):
    inside = tiny.stack(lm, layers=("blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"))
    with pytest.raises(ValueError, match="gradient_checkpointing with blocks.0.hook_mlp_out"):
        config_of(inside, gradient_checkpointing=True)


def test_only_topk_is_trained(lm, stack, tmp_path):
    sae = stack.sae(0)
    record = replace(sae.record(), k=None, threshold=torch.zeros(64))
    other = ReSAE.from_saes({0: ThresholdSAE.from_record(record)}, lm, max_active=8)
    with pytest.raises(ValueError, match="of kind 'threshold', expected plain TopK"):
        tune(lm, other, tmp_path)


# -- the command -----------------------------------------------------------------------------------

TUNE = ["--train-tokens", "480", "--batch-tokens", "96", "--log-steps", "2"]


@pytest.fixture(scope="module")
def run(material):
    folder = material / "begun"
    command = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*command, "--out", str(folder), "--quiet"]) == 0
    return folder


def test_the_command_trains_what_python_does_and_eval_reads_it(run, material, capsys):
    out = material / "tuned"
    command = ["finetune", str(run), *TUNE, "--eval-steps", "2", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "ΔCE online" in printed
    assert f"next: resae eval {run} {out}" in printed
    config = FinetuneConfig(
        run=str(run), train_tokens=480, batch_tokens=96, out=str(material / "python")
    )
    assert same(finetune(config).stack, ReSAE.load(out))
    record = load_json(out / "run.json", "run")
    assert record["finetuned"] == str(run)
    assert record["train"]["mse_weight"] == config.mse_weight
    latents = record["latents"]
    assert (
        f"silent on {latents['tokens']:,} held-out tokens: {latents['silent'][0][0]:.1%} → "
        in printed
    )
    assert "redundancy (mean largest cosine with a latent of another layer): " in printed
    assert main(["eval", str(run), str(out), "--out", str(material / "both")]) == 0
    online = {
        row["method"]: row["delta_ce"]
        for row in load_json(material / "both" / "report.json", "report")["replacement"]
        if row["mode"] == "online" and row["loop"] == "closed"
    }
    assert len(online) == 2


def test_the_command_is_stopped_and_goes_on(run, material, capsys):
    whole = material / "whole"
    assert main(["finetune", str(run), *TUNE, "--out", str(whole), "--quiet"]) == 0
    part = material / "part"
    shorter = ["--checkpoint-steps", "2", "--keep-checkpoints", "9"]
    assert main(["finetune", str(run), *TUNE, *shorter, "--out", str(part), "--quiet"]) == 0
    for checkpoint in sorted((part / "checkpoints").glob("step_*"))[1:]:
        checkpoint.unlink()
    (part / "resae.json").unlink()
    resume = ["finetune", str(run), *TUNE, "--out", str(part), "--resume", "--quiet"]
    assert main(resume) == 0
    assert same(ReSAE.load(part), ReSAE.load(whole))
    capsys.readouterr()
    assert main(["finetune", str(whole), *resume[2:]]) == 2
    assert "began with" in capsys.readouterr().err
    train = ["train", str(material / "model"), str(material / "text.txt"), *TRAIN, *SMALL]
    assert main([*train, "--out", str(part), "--resume"]) == 2
    assert "resae finetune" in capsys.readouterr().err


def test_the_plan_counts_memory_and_starts_nothing(run, material, capsys):
    out = material / "planned"

    def memory(*options):
        command = ["finetune", str(run), *TUNE, "--out", str(out), "--plan", "--json", *options]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)["device_memory"]

    whole = memory()
    assert not out.exists()
    stack = ReSAE.load(run)
    numbers = sum(p.numel() for p in stack.parameters())
    assert whole["autoencoders"] == whole["gradients"] == 4 * numbers
    assert whole["Adam"] == 8 * numbers
    assert whole["logits"] == 6 * 4 * 96 * 2048
    M, D = 64, 32
    assert memory("--update-rank", "2")["Adam"] == 4 * 3 * (2 * 3 * 2 + 2) * (M + D)
    assert memory("--accumulation-steps", "4")["logits"] == whole["logits"] / 4
    less = memory("--gradient-checkpointing")["activations of the model"]
    assert less < whole["activations of the model"] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--batch-tokens", "100"], "expected a multiple of the run's context of 24 tokens"),
        (["--batch-tokens", "24000000"], "too short"),
        (["--data", "empty.txt"], "empty"),
        (["--lr", "1e30"], "not finite"),
        (["--mse-weight", "-1"], "mse-weight"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run, material, tmp_path, capsys, changes, message
):
    if changes[0] == "--data":
        changes = ["--data", str(material / changes[1])]
    out = tmp_path / "bad"
    try:
        code = main(["finetune", str(run), *TUNE, *changes, "--out", str(out), "--quiet"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (out / "resae.json").exists()
    assert not list(out.rglob("step_*"))


def test_a_stack_of_another_model_is_refused(run, material, tmp_path, capsys):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    record = load_json(broken / "run.json", "run")
    (broken / "run.json").write_text(json.dumps(record | {"model": str(material / "other")}))
    assert main(["finetune", str(broken), *TUNE, "--out", str(tmp_path / "out")]) == 2
    assert "different models" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


def test_online_settings_are_those_of_training_too(stack):
    config = config_of(stack)
    assert isinstance(config, OnlineConfig)
    assert config.peak_lrs == tuple(rate / 4 for rate in (8e-3 * (512 / 64) ** 0.5,) * 3)
    assert replace(config, lr=1e-3).peak_lrs == (1e-3,) * 3
    assert (config.k, config.layers, config.predictor) == ((4,) * 3, tuple(tiny.NAMES), "previous")
