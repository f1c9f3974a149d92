from dataclasses import replace

import pytest
import torch

from resae import ReSAE, ThresholdSAE, TopKSAE
from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.record import SAERecord
from resae.sae.registry import load_sae, with_max_active
from resae.sae.threshold import DEFAULT_MAX_ACTIVE
from resae.stack.affine import AffinePredictor

D, M = 8, 40


def record(**options):
    return SAERecord(
        torch.randn(M, D),
        torch.randn(M) / 4,
        torch.randn(M, D),
        torch.randn(D),
        threshold=torch.rand(M),
        **options,
    )


def dense_scores(sae, x):
    scores = (x - sae.b_dec * sae.apply_b_dec_to_input) @ sae.weight.T + sae.bias
    return torch.where(scores > sae.threshold.clamp_min(0), scores, 0)


def dense(code):
    return code.acts.new_zeros(*code.acts.shape[:-1], M).scatter_add_(-1, *code[::-1])


@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize("subtracts", [True, False])
def test_latents_above_their_threshold_are_active(sorted, subtracts):
    sae = ThresholdSAE(record(apply_b_dec_to_input=subtracts))
    x = torch.randn(2, 5, D)
    code = sae.encode(x, sorted=sorted)
    expected = dense_scores(sae, x)
    assert 0 < (expected > 0).sum() < expected.numel()
    torch.testing.assert_close(dense(code), expected)
    x_hat = expected @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-5, atol=1e-5)
    active = code.acts > 0
    assert (code.indices[~active] == 0).all()
    key = -code.acts if sorted else code.indices.masked_fill(~active, M)
    assert (key.diff(dim=-1) >= 0).all()


def test_a_threshold_is_not_active_at_itself_and_below_zero_acts_as_zero():
    rows = torch.tensor([[1.0], [2.0], [-1.0]])
    zeros = torch.zeros(3)
    one = SAERecord(rows, zeros, rows, torch.zeros(1), threshold=torch.tensor([1.0, -5.0, -5.0]))
    code = ThresholdSAE(one).encode(torch.tensor([[1.0], [-1.0]]))
    assert code.acts.tolist() == [[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert code.indices.tolist() == [[1, 0, 0], [2, 0, 0]]


def test_an_overflow_is_an_error_or_counted_and_never_silent():
    sae = ThresholdSAE(record(), max_active=4)
    x = torch.randn(30, D)
    expected = dense_scores(sae, x)
    active = (expected > 0).sum(-1)
    with pytest.raises(ValueError, match=f"has {active.max()} active latents, codes have 4 slots"):
        sae.encode(x)
    sae.overflowed_tokens.zero_()
    sae.dropped_latents.zero_()
    sae.on_overflow = "count"
    acts, _ = sae.encode(x)
    assert torch.equal(acts, expected.topk(4).values)  # the strongest are kept
    assert sae.overflowed_tokens == (active > 4).sum()
    assert sae.dropped_latents == (active - 4).clamp_min(0).sum()
    sae.max_active = int(active.max())
    sae.on_overflow = "raise"
    torch.testing.assert_close(dense(sae.encode(x)), expected)
    lower = sae.at_k(2)
    assert lower.weight is sae.weight
    assert torch.equal(lower.encode(x).acts, expected.topk(2).values)
    assert sae.max_active == active.max()


def test_the_response_to_an_overflow_is_saved(tmp_path):
    sae = ThresholdSAE(record(), max_active=4)
    sae.on_overflow = "count"
    sae.save(tmp_path / "sae")
    x = torch.randn(30, D)
    loaded = load_sae(tmp_path / "sae")
    assert torch.equal(loaded.encode(x).acts, sae.encode(x).acts)  # and no error
    assert with_max_active(loaded, 3).on_overflow == "count"
    with pytest.raises(ValueError, match="on_overflow='cont', expected 'raise' or 'count'"):
        sae.on_overflow = "cont"
    cfg = tmp_path / "sae" / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"count"', '["count"]'))
    with pytest.raises(ValueError, match="on_overflow in the metadata=.*expected 'raise' or"):
        load_sae(tmp_path / "sae")


def test_compiled_code_counts_an_overflow():
    sae = ThresholdSAE(record(), max_active=4)
    x = torch.randn(30, D)
    dropped = ((dense_scores(sae, x) > 0).sum(-1) - 4).clamp_min(0).sum()
    acts, _ = torch.compile(sae.encode, backend="eager", fullgraph=True)(x)
    assert acts.shape == (30, 4)
    assert sae.dropped_latents == dropped > 0


def test_slots_follow_the_mean_number_of_active_latents():
    wide = SAERecord(
        *(torch.randn(2000, 4), torch.zeros(2000)), torch.randn(2000, 4), torch.zeros(4)
    )
    for k, slots in ((70, 560), (3, 64), (None, DEFAULT_MAX_ACTIVE), (900, 2000)):
        options = vars(wide) | {"k": k, "threshold": torch.ones(2000)}
        assert ThresholdSAE(SAERecord(**options)).max_active == slots


def test_codes_are_screened_on_a_cpu(screened_at_any_size):  # noqa: ARG001
    wide = 1024
    made = SAERecord(
        torch.randn(wide, 64),
        torch.randn(wide),
        torch.randn(wide, 64),
        torch.randn(64),
        threshold=10 + 5 * torch.rand(wide),
    )
    sae, x = ThresholdSAE(made), torch.randn(40, 64)
    assert sae.screened.threshold_encode_with_info(x, sae.threshold, 512).rows_screened == 40
    with torch.no_grad():
        code = sae.encode(x)
    exact = ThresholdSAE(made)
    exact.config = replace(exact.config, screening=None)
    for ours, theirs in zip(code, exact.encode(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert sae.at_k(3).screened is sae.screened  # one copy of the weight serves both


def test_a_prediction_is_subtracted_and_needed_where_residuals_are_encoded():
    sae = ThresholdSAE(record(input_kind="affine_residual"))
    x, prediction = torch.randn(2, 6, D)
    with pytest.raises(ValueError, match="ThresholdSAE.*residual of an activation"):
        sae.encode(x)
    torch.testing.assert_close(
        dense(sae.encode(x, prediction=prediction)), dense_scores(sae, x - prediction)
    )


def test_rescaled_it_encodes_scaled_activations():
    sae = ThresholdSAE(record())
    x = torch.randn(6, D)
    before, x_hat = sae(x).code, sae(x).x_hat
    sae.rescale_(4.0)
    assert torch.equal(sae(4 * x).code.indices, before.indices)
    torch.testing.assert_close(sae(4 * x).x_hat, 4 * x_hat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_from_disk_as_it_was(dtype, tmp_path):
    made = record(k=5, apply_b_dec_to_input=False)
    tensors = {name: t.to(dtype) for name, t in made.tensors().items()}
    sae = ThresholdSAE(SAERecord(**vars(made) | tensors), max_active=33)
    sae.save(tmp_path)
    loaded = load_sae(tmp_path)
    assert isinstance(loaded, ThresholdSAE)
    assert (loaded.max_active, loaded.mean_active) == (33, 5)
    assert not loaded.apply_b_dec_to_input
    for name, t in sae.state_dict().items():
        assert torch.equal(t, loaded.state_dict()[name])
        assert t.dtype == dtype


def test_it_is_for_inference():
    sae = ThresholdSAE(record())
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    with pytest.raises(ValueError, match="cannot be trained"):
        sae.trainable  # noqa: B018
    with pytest.raises(ValueError, match="cannot be trained"):
        sae.dead_latent_loss(torch.ones(1, D), torch.ones(1, D), torch.ones(M, dtype=torch.bool))


def test_it_takes_its_place_in_a_stack_and_as_a_frozen_one(tmp_path):
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    predictor = AffinePredictor("previous", A=[torch.eye(D)], c=[torch.zeros(D)])
    stack = ReSAE(names, predictor, [ThresholdSAE(record()), TopKSAE(SAEConfig(D, M, 4))])
    xs = [torch.randn(6, D), torch.randn(6, D)]
    stack.save_pretrained(tmp_path)
    again = ReSAE.from_pretrained(tmp_path)
    for ours, theirs in zip(stack(xs).x_hats, again(xs).x_hats, strict=True):
        assert torch.equal(ours, theirs)
    boosted = BoostedSAE(ThresholdSAE(record()), TopKSAE(SAEConfig(D, M, 4)))
    assert boosted.encode(xs[0]).acts.shape == (6, M + 4)
