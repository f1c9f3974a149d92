import json

import pytest
import torch
from train import (
    CURVE_POINTS,
    DEMO,
    DRY,
    Dense,
    Watcher,
    batches,
    draw,
    resae_step,
    scale_table,
    step_at_scale,
    table,
    verdicts,
)

from resae.sae.base import SAEConfig
from resae.sae.topk import TopKSAE


def row(package, speed, *, part="loop", layers=3, ours=1_000.0):
    return {
        "part": part,
        "layers": layers,
        "package": package,
        "lr": 0.008,
        "tokens_per_s": speed,
        "runs": 2,
        "slowest": speed,
        "fastest": speed,
        "peak_mib": 600.0,
        "more_mib": 100.0,
        "fvu": "0.3000",
        "curve": json.dumps([[1024, [0.5]], [2048, [0.3]]] if part == "step" else []),
        "ours_over_it": ours / speed,
    }


def test_the_verdict_is_against_the_fastest_peer():
    rows = [
        row(name, speed)
        for name, speed in (
            ("resae", 1_000.0),
            ("resae, affine maps", 5_000.0),
            ("sparsify", 800.0),
            ("SAELens", 400.0),
            ("dense PyTorch", 2_000.0),
        )
    ]
    (said,) = verdicts(rows)
    assert said.startswith("loop, 3 layers: 1.25 times the tokens/s of the fastest peer (sparsify)")
    assert table(rows).count("\n") == 1 + len(rows)


def test_the_figure_is_drawn(tmp_path):
    draw([row("resae", 900.0, part="step", layers=1), row("sparsify", 500.0)], tmp_path / "a.svg")
    assert "whole loop" in (tmp_path / "a.svg").read_text()


def test_dense_pytorch_computes_what_ours_does():
    torch.manual_seed(0)
    dense, ours = Dense(16, 64, 4), TopKSAE(SAEConfig(16, 64, 4))
    ours.load_state_dict(dense.state_dict())
    x = torch.randn(10, 16)
    torch.testing.assert_close(dense(x), ours(x).x_hat)


def test_batches_hold_every_token_once_layers_together():
    x = torch.arange(32.0).unsqueeze(1)
    given = list(batches([x, -x], 8))
    assert len(given) == 4
    assert torch.equal(torch.cat([a for a, _ in given]).sort(0).values, x)
    assert all(torch.equal(a, -b) for a, b in given)


def test_the_watcher_takes_its_time_out_of_the_account():
    s = DEMO.__class__(layers=(0,), M=64, k=4, batch_tokens=64, train_tokens=64 * 40)
    torch.manual_seed(0)
    x = torch.randn(64 * 40, 16)
    watcher = Watcher(s, [x[:256]])
    resae_step(s, 8e-3, [x], watcher)
    assert [tokens for tokens, _ in watcher.curve] == [64 * 4 * i for i in range(1, 11)]
    assert len(watcher.curve) == CURVE_POINTS
    assert watcher.curve[-1][1][0] < watcher.curve[0][1][0]
    assert watcher.seconds > 0


@pytest.mark.parametrize("package", ["resae", "dense PyTorch"])
def test_the_step_at_scale_runs_small(package):
    if torch.cuda.is_available():
        pytest.skip("small sizes have weights as large as [N, M]")
    result = step_at_scale(package, DRY)
    assert result["ms"] > 0
    text = scale_table([{"package": package, **vars(DRY), "it_over_ours": 1.0, **result}])
    assert f"M = {DRY.M}" in text
