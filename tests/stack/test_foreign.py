"""A stack of autoencoders that were trained apart."""

from dataclasses import replace

import pytest
import tiny
import torch

from resae import ReSAE, TopKSAE, export_sae, import_sae, replacement
from resae.interop.objects import import_object
from resae.sae.base import SAEConfig
from resae.sae.threshold import ThresholdSAE

D, M = 32, 64


def topk(seed: int, **config) -> TopKSAE:
    sae = TopKSAE(SAEConfig(D, M, 4, **config), seed=seed).eval()
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1)
    return sae.requires_grad_(False)


def not_finite(sae):
    sae.W_dec.data[3, 4] = torch.nan
    return sae


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@torch.no_grad()
def test_all_are_replaced_at_once_and_each_encodes_what_arrives(lm, tmp_path):
    """From folders of two libraries and an object, in any order, beside hooks written by hand."""
    saes = [topk(seed) for seed in range(3)]
    export_sae(saes[0], tmp_path / "a", "saelens", hook_point=tiny.NAMES[0])
    export_sae(saes[2], tmp_path / "c", "sparsify")
    stack = ReSAE.from_saes(
        {tiny.NAMES[2]: tmp_path / "c", 0: str(tmp_path / "a"), tiny.NAMES[1]: saes[1]}, lm
    )
    assert stack.hook_points == tiny.NAMES
    assert not stack.chained
    ids = torch.randint(5, 1000, (2, 12))
    with replacement(lm, stack, replace_special=True):
        found = lm.model(ids).logits
    hooks = [
        lm.blocks[layer].register_forward_hook(lambda _m, _a, out, sae=sae: sae(out).x_hat)
        for layer, sae in zip(tiny.LAYERS, saes, strict=True)
    ]
    expected = lm.model(ids).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, lm.model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_kinds_with_thresholds_stand_beside_topk_and_the_stack_is_saved(lm, tmp_path):
    record = replace(topk(0).record(), k=None, threshold=torch.full((M,), 0.4))
    threshold = ThresholdSAE.from_record(record)
    stack = ReSAE.from_saes({0: threshold, 3: topk(1)}, lm)
    stack.save_pretrained(tmp_path / "stack")
    again = ReSAE.from_pretrained(tmp_path / "stack")
    again.require_model(lm)
    ids = torch.randint(5, 1000, (1, 9))
    with replacement(lm, stack):
        expected = lm.model(ids).logits
    with replacement(lm, again):
        assert torch.equal(lm.model(ids).logits, expected)


@pytest.mark.parametrize(
    ("saes", "error", "message"),
    [
        pytest.param({}, TypeError, "expected {hook point: path or autoencoder}", id="none"),
        pytest.param({0: torch.nn.Linear(2, 2)}, TypeError, "got torch.*Linear", id="object"),
        pytest.param({9: topk(0)}, ValueError, "blocks.9|9", id="layer"),
        pytest.param({0: topk(0), "layers.0": topk(1)}, ValueError, "2 names are of 1", id="twice"),
        pytest.param(
            {0: TopKSAE(SAEConfig(8, M, 4))}, ValueError, "width 8, the stream.*has 32", id="width"
        ),
        pytest.param(
            {0: topk(0), 1: topk(1, input_kind="affine_residual")},
            ValueError,
            "encodes residuals",
            id="residual",
        ),
        pytest.param({0: topk(0), 1: topk(1).double()}, ValueError, "one dtype", id="dtypes"),
        pytest.param({0: not_finite(topk(0))}, ValueError, "blocks.0.*NaN.*W_dec", id="nan"),
        pytest.param({0: "no/such/folder/at/all"}, FileNotFoundError, "no such", id="path"),
    ],
)
def test_what_does_not_fit_is_refused(lm, saes, error, message):
    with pytest.raises(error, match=message):
        ReSAE.from_saes(saes, lm)


def test_another_place_in_the_file_is_warned_of(lm, tmp_path, caplog):
    export_sae(topk(0), tmp_path / "a", "saelens", hook_point=tiny.NAMES[1])
    ReSAE.from_saes({1: tmp_path / "a"}, lm)
    assert not caplog.records
    ReSAE.from_saes({0: tmp_path / "a"}, lm)
    assert "for blocks.0.hook_resid_post was trained at 'blocks.1.hook_resid_post'" in caplog.text


def test_room_is_given_to_thresholds_alone_and_the_callers_object_stays(lm):
    record = replace(topk(0).record(), k=None, threshold=torch.full((M,), 0.4))
    threshold = ThresholdSAE.from_record(record)
    before = threshold.max_active
    stack = ReSAE.from_saes({0: threshold, 1: topk(1)}, lm.model, max_active=2)
    assert [stack.sae(i).config.k for i in range(2)] == [2, 4]
    assert threshold.max_active == before != 2
    assert import_object(threshold, max_active=3).config.k == 3


@pytest.mark.parametrize("max_active", [0, 65, "9", 9.5, True])
def test_slots_out_of_bounds_are_named(lm, max_active):
    record = replace(topk(0).record(), threshold=torch.full((M,), 0.4))
    with pytest.raises(ValueError, match=r"max_active=.*whole number from 1 to 64"):
        ReSAE.from_saes({0: ThresholdSAE.from_record(record)}, lm, max_active=max_active)


def test_our_own_format_keeps_every_setting(tmp_path):
    record = replace(topk(0).record(), k=None, threshold=torch.full((M,), 0.4))
    export_sae(ThresholdSAE.from_record(record, max_active=8), tmp_path / "a", "resae")
    assert import_sae(tmp_path / "a").config.k == 8
    with pytest.raises(ValueError, match="that are written: resae, saelens, sparsify$"):
        export_sae(topk(0), tmp_path / "b", "openai")
