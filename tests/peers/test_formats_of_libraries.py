"""Files written and read by the libraries themselves, and their own encode and decode. Run by
`.ci/run --peers`; skipped where they are not installed."""

import json
import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own, at import
    sae_lens = pytest.importorskip("sae_lens")
    sparsify = pytest.importorskip("sparsify")
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary as dictionaries
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

from resae import TopKSAE, export_sae, import_sae
from resae.interop.formats import convert, read_sae
from resae.interop.objects import import_object
from resae.sae.base import SAEConfig
from resae.sae.threshold import ThresholdSAE
from resae_kernels import accelerate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

D, M, K = 32, 256, 8


@pytest.fixture
def x():
    return torch.randn(64, D)


def dense(code, M=M):
    out = code.acts.new_zeros(*code.acts.shape[:-1], M)
    return out.scatter_add_(-1, code.indices, code.acts)


@torch.no_grad()
def fill(module, *, positive=()):
    """Weights as of training: none is zero or tied."""
    for name, parameter in module.named_parameters():
        values = torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 1)
        parameter.copy_(values.abs() if name in positive else values)
    return module


@torch.no_grad()
def assert_same(sae, encode, decode, x):
    """The same latents are active; acts and reconstructions agree to float32 rounding."""
    theirs = encode(x)
    ours = dense(sae.encode(x))
    assert torch.equal(ours != 0, theirs != 0)
    assert (theirs != 0).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(*sae.encode(x)), decode(theirs), rtol=1e-5, atol=1e-4)


def lens_sae(architecture, **settings):
    cls, config = sae_lens.registry.get_sae_class(architecture)
    facts = sae_lens.saes.sae.SAEMetadata(model_name="gpt2", hook_name="blocks.6.hook_resid_post")
    return fill(cls(config(d_in=D, d_sae=M, metadata=facts, **settings)), positive=("threshold",))


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {"k": K}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("standard", {}),
    ],
)
def test_what_saelens_saves_encodes_and_decodes_as_in_saelens(
    architecture, settings, subtracts, tmp_path, x
):
    theirs = lens_sae(architecture, apply_b_dec_to_input=subtracts, **settings)
    theirs.save_model(tmp_path)
    assert_same(import_sae(tmp_path), theirs.encode, theirs.decode, x)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk", "jumprelu"])
@pytest.mark.parametrize("inference", [True, False])
def test_what_saelens_trains_is_read_as_saved_and_as_a_checkpoint(
    architecture, inference, tmp_path, x
):
    cls, config = sae_lens.registry.get_sae_training_class(architecture)
    options = {} if architecture == "jumprelu" else {"k": K, "rescale_acts_by_decoder_norm": True}
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [M // 4, M]
    training = fill(cls(config(d_in=D, d_sae=M, **options)), positive=("threshold",))
    if "batchtopk" in architecture:
        training.topk_threshold = torch.tensor(20.0)
    training.save_inference_model(tmp_path / "inference")
    if not inference:
        training.save_model(tmp_path / "checkpoint")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    sae = import_sae(tmp_path / ("inference" if inference else "checkpoint"))
    assert_same(sae, theirs.encode, theirs.decode, x)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_settings_from_before_version_6_mean_what_saelens_takes_them_for(activation, tmp_path, x):
    options = {"topk": {"k": K}, "relu": {}}[activation]
    lens_sae("topk" if options else "standard", **options).save_model(tmp_path)
    old = {"d_in": D, "d_sae": M, "dtype": "torch.float32", "hook_point": "blocks.6.hook_resid_pre"}
    old |= {"model_name": "gpt2", "hook_point_layer": 6, "normalize_activations": False}
    old |= {"activation_fn_str": activation, "activation_fn_kwargs": options}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(import_sae(tmp_path), theirs.encode, theirs.decode, x)
    record = read_sae(tmp_path).record
    assert record.hook_point == theirs.cfg.metadata.hook_name == "blocks.6.hook_resid_pre"
    assert record.model == "gpt2"


def test_gemma_scope_is_jumprelu_of_saelens_without_b_dec_on_the_input(tmp_path, x):
    theirs = lens_sae("jumprelu", apply_b_dec_to_input=False)
    arrays = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_30"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays)
    assert_same(import_sae(folder), theirs.encode, theirs.decode, x)


def test_an_export_is_loaded_by_saelens_and_comes_back_bit_by_bit(tmp_path, x):
    sae = fill(TopKSAE(SAEConfig(D, M, K)))
    export_sae(sae, tmp_path / "a", "saelens", hook_point="blocks.6.hook_resid_post", model="gpt2")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    assert theirs.cfg.metadata.hook_name == "blocks.6.hook_resid_post"
    assert_same(sae, theirs.encode, theirs.decode, x)
    theirs.save_model(tmp_path / "b")
    again = import_sae(tmp_path / "b")
    for name, t in sae.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
def test_thresholds_go_to_saelens_and_back(architecture, tmp_path, x):
    theirs = lens_sae(architecture)
    theirs.save_model(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "ours", "resae")
    convert(tmp_path / "ours", tmp_path / "b", "saelens")
    again = sae_lens.SAE.load_from_disk(tmp_path / "b")
    assert type(again) is type(theirs)
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name
    torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=0)


def test_an_exported_residual_autoencoder_has_no_hook_in_saelens(tmp_path):
    sae = TopKSAE(SAEConfig(D, M, K, input_kind="affine_residual"))
    export_sae(sae, tmp_path, "saelens", hook_point="blocks.6.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name is None
    assert theirs.cfg.metadata.input_kind == "affine_residual"
    theirs.save_model(tmp_path / "again")  # the flag survives SAELens
    with pytest.raises(ValueError, match="residual of an activation"):
        import_sae(tmp_path / "again").encode(torch.zeros(1, D))


def coder(**settings):
    config = sparsify.SparseCoderConfig(num_latents=M, k=K, **settings)
    return fill(sparsify.SparseCoder(D, config))


def sparsify_dense(theirs):
    def encode(x):
        acts, indices, _ = theirs.encode(x)
        return acts.new_zeros(*acts.shape[:-1], M).scatter_(-1, indices, acts)

    return encode


def test_what_sparsify_saves_encodes_and_decodes_as_in_sparsify(tmp_path, x):
    theirs = coder()
    theirs.save_to_disk(tmp_path / "layers.6")
    sae = import_sae(tmp_path, hook_point="layers.6")
    assert_same(sae, sparsify_dense(theirs), lambda z: z @ theirs.W_dec + theirs.b_dec, x)
    cfg = json.loads((tmp_path / "layers.6" / "cfg.json").read_text())
    del cfg["activation"]  # as before February 2025
    (tmp_path / "layers.6" / "cfg.json").write_text(json.dumps(cfg))
    again = import_sae(tmp_path, hook_point="layers.6")
    assert torch.equal(dense(again.encode(x)), dense(sae.encode(x)))


def test_skip_connections_of_sparsify_are_refused(tmp_path):
    coder(skip_connection=True, transcode=True).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="transcode"):
        import_sae(tmp_path / "a")
    coder(skip_connection=True).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="skip_connection"):
        import_sae(tmp_path / "b")


def test_a_bridge_between_sparsify_and_saelens_both_ways(tmp_path, x):
    first = coder()
    first.save_to_disk(tmp_path / "layers.6")
    convert(tmp_path / "layers.6", tmp_path / "lens", "saelens")
    lens = sae_lens.SAE.load_from_disk(tmp_path / "lens")
    torch.testing.assert_close(lens.encode(x), sparsify_dense(first)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lens(x), first(x).sae_out, rtol=1e-5, atol=1e-4)
    assert lens.cfg.metadata.hook_name == "blocks.6.hook_resid_post"
    lens.save_model(tmp_path / "lens again")
    convert(tmp_path / "lens again", tmp_path / "back", "sparsify")
    second = sparsify.SparseCoder.load_from_disk(tmp_path / "back")
    for name, t in first.state_dict().items():
        assert torch.equal(t, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AutoEncoderTopK, {"k": K}),
        (BatchTopKSAE, {"k": K}),
        (MatryoshkaBatchTopKSAE, {"k": K, "group_sizes": [M // 4, M - M // 4]}),
        (dictionaries.JumpReluAutoEncoder, {}),
        (dictionaries.AutoEncoder, {}),
        (dictionaries.AutoEncoderNew, {}),
    ],
)
def test_what_dictionary_learning_saves_encodes_and_decodes_as_there(cls, options, tmp_path, x):
    theirs = fill(cls(D, M, **options), positive=("threshold",))
    if cls in (BatchTopKSAE, MatryoshkaBatchTopKSAE):
        theirs.threshold.fill_(9.0)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": cls.__name__, "layer": 3, "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    sae = import_sae(tmp_path, format="dictionary_learning")
    assert_same(sae, theirs.encode, theirs.decode, x)
    hook = read_sae(tmp_path, "dictionary_learning").record.hook_point
    assert hook == "blocks.3.hook_resid_post"


def test_a_gated_autoencoder_of_dictionary_learning_is_refused(tmp_path):
    theirs = dictionaries.GatedAutoEncoder(D, M)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="decoder_bias"):
        import_sae(tmp_path, format="dictionary_learning")


@pytest.mark.parametrize(
    "made",
    [
        lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=M, k=K)),
        lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=M)),
        lambda: sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K)),
        lambda: AutoEncoderTopK(D, M, K),
        lambda: BatchTopKSAE(D, M, K),
        lambda: dictionaries.JumpReluAutoEncoder(D, M),
    ],
    ids=["saelens-topk", "saelens-jumprelu", "sparsify", "topk", "batchtopk", "jumprelu"],
)
@torch.no_grad()
def test_an_object_of_a_library_is_imported_as_it_computes(made, x):
    theirs = fill(made(), positive=("threshold",))
    has_threshold = hasattr(theirs, "threshold") and not isinstance(theirs, AutoEncoderTopK)
    ours = import_object(theirs, max_active=M if has_threshold else None)
    assert isinstance(ours, ThresholdSAE) == has_threshold
    encoded = theirs.encode(x)
    expected = getattr(encoded, "top_acts", None)
    found = ours.encode(x)
    if expected is not None:
        torch.testing.assert_close(found.acts, expected.sort(-1, descending=True).values)
    else:
        torch.testing.assert_close(dense(found), encoded, rtol=1e-5, atol=1e-5)
    assert import_object(ours) is ours


def test_objects_of_batchtopk_from_before_training_are_imported_with_a_warning(caplog):
    training = sae_lens.BatchTopKTrainingSAE(
        sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)
    )
    for theirs in (training, BatchTopKSAE(D, M, K)):
        caplog.clear()
        import_object(theirs)
        name = type(theirs).__name__
        assert f"{name}" in caplog.text
        assert "threshold is" in caplog.text
        assert "every positive latent is active" in caplog.text


@torch.no_grad()
def test_saelens_with_layer_norm_is_accelerated_though_it_cannot_be_imported(x, tmp_path):
    """As openai's TopK autoencoders are in SAELens."""
    theirs = lens_sae("topk", k=K, normalize_activations="layer_norm")
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match="layer_norm.*accelerate"):
        import_sae(tmp_path)
    ours = accelerate(theirs)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)
