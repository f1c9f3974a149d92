import copy
import json
from dataclasses import replace

import pytest
import torch

from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.losses import auxk_loss
from resae.sae.prefix import PrefixSAE
from resae.sae.registry import KINDS, load_sae, new_sae
from resae.sae.threshold import ThresholdSAE
from resae.sae.topk import TopKSAE
from resae_kernels import sparse_decode, topk_encode


def small(k=3, d_in=8, d_sae=20, seed=0):
    return TopKSAE(SAEConfig(d_in, d_sae, k), seed=seed)


def test_initial_decoder_rows_have_norm_1_and_the_encoder_is_tied():
    sae = small()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_seeds_give_different_directions_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.W_dec, again.W_dec)
    assert float((first.W_dec @ other.W_dec.T).detach().max()) < 0.999


def test_forward_is_encode_then_decode_with_base_on_both_sides():
    sae = small()
    sae.b_dec.data.normal_()
    sae.encoder.bias.data.normal_()
    x, prediction = torch.randn(5, 8), torch.randn(5, 8)
    x_hat, code = sae(x, prediction=prediction)
    dense = torch.relu((x - prediction - sae.b_dec) @ sae.W_enc + sae.b_enc)
    kept = torch.zeros_like(dense).scatter(1, code.indices, dense.gather(1, code.indices))
    torch.testing.assert_close(x_hat, kept @ sae.W_dec + sae.b_dec + prediction)
    assert set(code.indices[0].tolist()) == set(dense[0].topk(3).indices.tolist())


def test_k_can_be_lowered_at_inference():
    sae = small(k=5)
    x = torch.randn(4, 8)
    assert torch.equal(sae.encode(x, k=2).indices, sae.encode(x).indices[:, :2])


@pytest.mark.usefixtures("screened_at_any_size")
def test_on_a_cpu_codes_are_screened_and_the_same():
    sae = small(k=4, d_in=64, d_sae=640)
    sae.b_dec.data.normal_()
    x, prediction = torch.randn(30, 64), torch.randn(30, 64)
    weight, bias = sae.encoder.weight, sae.encoder.bias
    trained = topk_encode(x, weight, bias, 4, pre_bias=sae.b_dec, prediction=prediction)
    with torch.no_grad():
        found = sae.screened.encode_with_info(x, 4, pre_bias=sae.b_dec, prediction=prediction)
        assert found.rows_screened == 30
        for code in (
            found.code,
            sae.encode(x, prediction=prediction),
            copy.deepcopy(sae).encode(x, prediction=prediction),
        ):
            assert torch.equal(code.indices, trained.indices)
            torch.testing.assert_close(code.acts, trained.acts)
        sae.screening = "certain"
        assert torch.equal(sae.encode(x, prediction=prediction).indices, trained.indices)
        assert sae.screened.margin == "certain"
        sae.screening = None
        assert sae.screened is None
        assert torch.equal(sae.encode(x, prediction=prediction).acts, trained.acts)
    assert set(sae.state_dict()) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}


@pytest.mark.usefixtures("screened_by_triton_at_any_size")
@torch.no_grad()
def test_on_request_few_tokens_are_screened_by_triton(device):
    sae = small(k=4, d_in=64, d_sae=640).to(device)
    x = torch.randn(2, 64, device=device)
    plain = sae.encode(x)
    sae.screening_implementation = "triton"
    info = sae.screened.encode_with_info(x, 4, pre_bias=sae.b_dec)
    assert (info.implementation, info.rows_screened) == ("triton", 2)
    for twin in (sae, copy.deepcopy(sae)):
        code = twin.encode(x)
        assert twin._screened.implementation == "triton"
        assert torch.equal(code.indices, plain.indices)
        torch.testing.assert_close(code.acts, plain.acts)
    held = sae.screened
    assert sae.screened is held
    sae.screening_implementation = None
    assert sae.screened.implementation != "triton"


@pytest.mark.parametrize("screening", ["statistical", "certain", None])
def test_screening_is_part_of_the_config_and_of_the_file(screening, tmp_path):
    sae = TopKSAE(SAEConfig(8, 64, 2, screening=screening))
    assert sae.screening == screening
    sae.save(tmp_path)
    assert TopKSAE.load(tmp_path).config == sae.config
    with pytest.raises(ValueError, match="screening='sure', expected 'statistical', 'certain' or"):
        sae.screening = "sure"


@pytest.mark.usefixtures("screened_at_any_size")
def test_training_between_evaluations_is_seen():
    sae = small(k=4, d_in=64, d_sae=640)
    x = torch.randn(30, 64)
    optimizer = torch.optim.SGD(sae.parameters(), lr=30.0, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        (sae(x).x_hat - x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            weight, bias = sae.encoder.weight, sae.encoder.bias
            expected = topk_encode(x, weight, bias, 4, pre_bias=sae.b_dec)
            assert torch.equal(sae.encode(x).indices, expected.indices)


@pytest.mark.usefixtures("screened_at_any_size")
def test_an_autoencoder_compiles_without_graph_breaks():
    sae = small(k=4, d_in=64, d_sae=640).eval()
    x = torch.randn(30, 64)
    with torch.no_grad():
        compiled = torch.compile(sae, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x).code.indices, sae(x).code.indices)


def test_rescaled_autoencoder_is_the_same_on_rescaled_activations():
    sae = small().double()
    sae.b_dec.data.normal_()
    sae.encoder.bias.data.normal_()
    x = torch.randn(30, 8, dtype=torch.float64)
    x_hat, code = sae(x)
    sae.rescale_(3.5)
    scaled_hat, scaled = sae(3.5 * x)
    assert torch.equal(scaled.indices, code.indices)
    torch.testing.assert_close(scaled.acts, 3.5 * code.acts)
    torch.testing.assert_close(scaled_hat, 3.5 * x_hat)


def test_projected_gradient_is_orthogonal_to_the_rows():
    sae = small()
    x_hat, _ = sae(torch.randn(50, 8))
    x_hat.square().sum().backward()
    rows = sae.W_dec.detach()
    assert float((sae.W_dec.grad * rows).sum(1).abs().max()) > 1e-3
    sae.remove_parallel_gradient()
    assert float((sae.W_dec.grad * rows).sum(1).abs().max()) < 1e-4


def test_aux_gradient_reaches_the_encoder_of_dead_latents_and_only_them():
    sae = small()
    x = torch.randn(40, 8)
    error = x - sae(x).x_hat
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[2, 7, 11]] = True
    auxk_loss(sae, x, error, dead, k_aux=2).backward()
    of_rows = (p.grad.to_dense() for p in (sae.encoder.weight, sae.W_dec))
    for gradient in (*of_rows, sae.encoder.bias.grad.unsqueeze(1)):
        assert gradient[dead].abs().sum(1).min() > 0
        assert not gradient[~dead].any()


@pytest.mark.parametrize("with_base", [True, False])
def test_aux_of_no_more_dead_latents_than_k_is_that_of_their_topk(with_base):
    """All of them are in the code: dense products take the place of a selection."""
    sae = small().double()
    sae.b_dec.data.normal_()
    sae.encoder.bias.data.normal_()
    x, error, prediction = torch.randn(3, 9, 8, dtype=torch.float64)
    offset = prediction if with_base else None
    dead = torch.arange(20) % 4 == 0
    parameters = list(sae.parameters())

    loss = auxk_loss(sae, x, error, dead, k_aux=5, prediction=offset)
    found = [loss, *torch.autograd.grad(loss, parameters)]
    weight, bias = sae.encoder.weight[dead], sae.encoder.bias[dead]
    code = topk_encode(x, weight, bias, 5, pre_bias=sae.b_dec, prediction=offset)
    rebuilt = sparse_decode(*code, sae.W_dec[dead])
    loss = (error - rebuilt).square().sum() / error.square().sum()
    expected = [loss, *torch.autograd.grad(loss, parameters)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to_dense(), theirs)


def test_aux_adds_to_the_gradients_of_the_main_loss_in_their_layout():
    sae, x = small(), torch.randn(9, 8)
    dead = torch.arange(20) == 7
    x_hat, _ = sae(x)
    ((x - x_hat).square().sum() + auxk_loss(sae, x, x - x_hat, dead, k_aux=2)).backward()
    for parameter in sae.parameters():
        assert parameter.grad is not None
        assert parameter.grad.layout == torch.strided
        assert parameter.grad.is_contiguous()


def test_aux_of_a_worked_example():
    """Dead latent e_0 with bias 0: x = (2, 0), error (1, 0), rebuilt (2, 0): loss 1."""
    sae = TopKSAE(SAEConfig(2, 2, 1))
    sae.encoder.weight.data.copy_(torch.eye(2))
    sae.W_dec.data.copy_(torch.eye(2))
    x, error = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    dead = torch.tensor([True, False])
    assert auxk_loss(sae, x, error, dead, 1).item() == 1.0
    assert auxk_loss(sae, x, 2 * error, dead, 1).item() == 0.0


def test_aux_without_dead_latents_is_zero():
    x, error = torch.randn(4, 8), torch.randn(4, 8)
    assert auxk_loss(small(), x, error, torch.zeros(20).bool(), 4).item() == 0


def test_saved_autoencoder_comes_back_in_sparsifys_layout(tmp_path):
    sae = small(seed=4)
    sae.save(tmp_path / "layers.3", hook_point="blocks.3.hook_resid_post")
    loaded = TopKSAE.load(tmp_path / "layers.3")
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert set(sae.state_dict()) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    files = sorted(p.name for p in (tmp_path / "layers.3").iterdir())
    assert files == ["cfg.json", "sae.safetensors"]


@pytest.mark.parametrize("metadata", [{}, None, "absent"])
def test_files_of_others_that_say_nothing_of_a_gain_have_none(tmp_path, metadata):
    small().save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"] = metadata
    if metadata == "absent":
        del cfg["metadata"]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert TopKSAE.load(tmp_path).config == small().config


def old_sparsify_folder(folder, **changes):
    """As sparsify wrote it before February 2025: without `activation`."""
    sae = small(seed=4)
    sae.save(folder)
    cfg = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 20, "k": 3}
    cfg |= {"multi_topk": False, "skip_connection": False, "d_in": 8, **changes}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return sae


def test_a_sparsify_folder_without_activation_is_topk(tmp_path):
    sae = old_sparsify_folder(tmp_path)
    x = torch.randn(5, 8)
    assert torch.equal(TopKSAE.load(tmp_path)(x).x_hat, sae.eval()(x).x_hat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": True}, "signed latents"),
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "groupmax"),
    ],
    ids=str,
)
def test_an_old_sparsify_folder_of_another_kind_is_refused(tmp_path, changes, message):
    old_sparsify_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        TopKSAE.load(tmp_path)


def test_a_saelens_folder_is_named_with_what_to_do(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "d_in": 8, "d_sae": 20}))
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"SAELens.*resae\.import_sae"):
        TopKSAE.load(tmp_path)


def test_unreadable_autoencoders_are_named(tmp_path):
    small().save(tmp_path)
    cfg = (tmp_path / "cfg.json").read_text()
    (tmp_path / "cfg.json").write_text(cfg.replace('"num_latents": 20', '"num_latents": 21'))
    with pytest.raises(ValueError, match="do not fit cfg.json"):
        TopKSAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text(cfg.replace('"transcode": false', '"transcode": true'))
    with pytest.raises(ValueError, match="transcoder"):
        TopKSAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text(cfg.replace('"d_in"', '"width"'))
    with pytest.raises(ValueError, match="has no d_in"):
        TopKSAE.load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param((8, 4, 5), "k=5 exceeds.*d_sae=4", id="k-above-M"),
        pytest.param((8, 4, 0), "k=0", id="k-zero"),
        pytest.param((0, 4, 1), "d_in=0", id="no-width"),
    ],
)
def test_impossible_sizes_are_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(*sizes)


@pytest.mark.parametrize("gain", [0.0, 0.25])
def test_prefixes_are_the_reconstructions_of_fewer_latents(gain):
    sae = PrefixSAE(small(k=5).config).double()
    sae.config = replace(sae.config, prefix_gain=gain)
    sae.b_dec.data.normal_()
    x, prediction = torch.randn(2, 7, 8, dtype=torch.float64)
    code = sae.encode(x, prediction=prediction)
    found = sae.decode_prefixes(code, (1, 2, 5), prediction=prediction)
    for j, x_hat in zip((1, 2, 5), found, strict=True):
        torch.testing.assert_close(x_hat, sae.at_k(j)(x, prediction=prediction).x_hat)


def test_fewer_latents_share_the_parameters():
    sae = small(k=5)
    fewer = sae.at_k(2)
    assert (fewer.config.k, sae.config.k) == (2, 5)
    for a, b in zip(fewer.parameters(), sae.parameters(), strict=True):
        assert a is b
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"at_k: k={k}, expected 1 to 5"):
            sae.at_k(k)


def test_with_a_prefix_gain_fewer_latents_are_the_same_ones_with_larger_acts(tmp_path):
    sae = small(k=8).double()
    sae.config = replace(sae.config, prefix_gain=0.5)
    sae.encoder.bias.data.normal_()
    sae.save(tmp_path, hook_point="x")
    x = torch.randn(20, 8, dtype=torch.float64)
    full = sae.encode(x)
    assert torch.equal(sae.at_k(8).encode(x).acts, full.acts)
    for fewer in (sae.at_k(2), sae.at_k(4).at_k(2), TopKSAE.load(tmp_path).at_k(2)):
        acts, indices = fewer.encode(x)
        assert torch.equal(indices, full.indices[:, :2])
        torch.testing.assert_close(acts, 2 * full.acts[:, :2])
        assert torch.equal(fewer.W_dec, sae.W_dec)


# -- boosted ---------------------------------------------------------------------------------------


def boosted(keep=0.25, threshold=0.0):
    torch.manual_seed(4)
    prediction, boost = small(k=3), small(k=2, d_sae=10, seed=5)
    for sae in (prediction, boost):
        sae.encoder.bias.data.normal_()
        sae.b_dec.data.normal_()
    return BoostedSAE(prediction, boost, keep=keep, threshold=threshold)


def test_a_boosted_autoencoder_is_the_sum_of_both_without_the_second_ones_bias():
    sae = boosted().eval()
    assert (sae.config.d_in, sae.config.d_sae, sae.config.k) == (8, 30, 5)
    x, prediction = torch.randn(2, 6, 8)
    x_hat, code = sae(x, prediction=prediction)
    own = sae.boost.encode(x, prediction=prediction)
    expected = sae.frozen(x, prediction=prediction).x_hat + sparse_decode(*own, sae.boost.W_dec)
    torch.testing.assert_close(x_hat, expected)
    dense = torch.zeros(6, 30).scatter_add(1, code.indices, code.acts)
    torch.testing.assert_close(x_hat, dense @ sae.W_dec + sae.b_dec + prediction)
    shuffled = torch.randperm(5)
    acts, indices = (part[:, shuffled] for part in code)
    torch.testing.assert_close(sae.decode(acts, indices, prediction=prediction), expected)
    assert not sae.boost.b_dec.any()


def test_the_threshold_silences_the_boost_in_use_and_never_the_base():
    x = torch.randn(41, 8)
    with torch.no_grad():
        plain = boosted().eval().encode(x)
        threshold = float(plain.acts[:, 3:].median())
        code = boosted(threshold=threshold).eval().encode(x)
    assert torch.equal(code.acts[:, :3], plain.acts[:, :3])
    kept = plain.acts[:, 3:] >= threshold
    assert 0.4 < float(kept.double().mean()) < 0.6
    assert torch.equal(code.acts[:, 3:], plain.acts[:, 3:] * kept)
    assert not code.indices[:, 3:][~kept].any()


def test_the_threshold_is_the_quantile_of_what_training_selected():
    sae = boosted(keep=0.25)
    x = torch.randn(400, 8)
    acts = sae.boost.encode(x).acts.detach()
    for _ in range(3):
        assert torch.equal(sae.encode(x).acts[:, 3:], acts)  # in training all count
        sae.follow(acts)
    share = float((acts >= sae.threshold).double().mean())
    assert share == pytest.approx(0.25, abs=0.01)
    acts_in_use = sae.eval().encode(2 * x).acts[:, 3:].detach()
    assert float((sae.boost.encode(x).acts >= sae.threshold).double().mean()) == share
    assert float(acts_in_use[acts_in_use > 0].min()) >= float(sae.threshold)


def test_training_reaches_the_boost_alone():
    sae = boosted()
    x = torch.randn(50, 8)
    (sae(x).x_hat - x).square().sum().backward()
    assert all(parameter.grad is None for parameter in sae.frozen.parameters())
    assert sae.boost.b_dec.grad is None
    assert float(sae.boost.encoder.weight.grad.norm()) > 0
    sae.remove_parallel_gradient()
    along = (sae.boost.W_dec.grad * sae.boost.W_dec.detach()).sum(1)
    assert float(along.abs().max()) < 1e-4


def test_a_boosted_autoencoder_is_rescaled_and_comes_back(tmp_path):
    sae = boosted(threshold=0.3).double().eval()
    x = torch.randn(30, 8, dtype=torch.float64)
    x_hat, code = sae(x)
    sae.rescale_(3.5)
    torch.testing.assert_close(sae(3.5 * x).x_hat, 3.5 * x_hat)
    assert torch.equal(sae(3.5 * x).code.indices, code.indices)
    assert not any(parameter.requires_grad for parameter in sae.frozen.parameters())
    sae.save(tmp_path)
    loaded = BoostedSAE.load(tmp_path)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert loaded.keep == sae.keep
    alone = TopKSAE.load(tmp_path)  # as if there were no boost
    assert torch.equal(alone(x).x_hat, sae.frozen(x).x_hat)
    with pytest.raises(ValueError, match=r"at_k: k=2.*3 \+ 2"):
        sae.at_k(2)


# -- kinds -----------------------------------------------------------------------------------------


def threshold():
    record = small(k=4).record()
    return ThresholdSAE(replace(record, threshold=torch.rand(20)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_comes_back_from_disk_as_it_was(kind, tmp_path):
    sae = {
        "topk": lambda: small(k=4),
        "prefix": lambda: new_sae(SAEConfig(8, 20, 4, 0.125), prefixes=(1, 2, 4)),
        "boosted": lambda: boosted(threshold=0.25).eval(),
        "threshold": threshold,
    }[kind]()
    assert sae.kind == kind
    sae.save(tmp_path, hook_point="x")
    loaded = load_sae(tmp_path)
    assert type(loaded) is type(sae) is KINDS[kind]
    assert getattr(loaded, "prefixes", None) == getattr(sae, "prefixes", None)
    x = torch.randn(6, 8)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_last_reconstruction_of_the_loss_is_the_decode(kind):
    made = {"boosted": boosted, "threshold": threshold}
    sae = made[kind]() if kind in made else KINDS[kind](SAEConfig(8, 20, 4))
    x_hats, code = sae.reconstructions(torch.randn(6, 8))
    torch.testing.assert_close(x_hats[-1], sae.decode(*code))
    assert sae.follows_acts == (kind == "boosted")
    assert (sae.step_weights is None) == (kind in made)


def test_folders_of_earlier_versions_and_unknown_kinds(tmp_path):
    boosted().save(tmp_path / "boosted")
    small(k=4).save(tmp_path / "other")
    for folder, kind in (("boosted", None), ("other", "jumprelu")):
        path = tmp_path / folder / "cfg.json"
        cfg = json.loads(path.read_text())
        cfg["metadata"] |= {"kind": kind}
        path.write_text(json.dumps(cfg))
    assert load_sae(tmp_path / "boosted", "boosted").kind == "boosted"
    assert load_sae(tmp_path / "boosted").kind == "topk"
    with pytest.raises(ValueError, match="kind 'jumprelu', expected one of topk, prefix, boosted"):
        load_sae(tmp_path / "other")
