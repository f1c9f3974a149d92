import json
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError

from resae import AffineOnly, AffinePredictor, ReSAE, TopKSAE
from resae.affine import KINDS
from resae.data import capture_tokens
from resae.stack import new_stack
from resae_kernels import reference


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def xs(lm):
    return capture_tokens(lm, tiny.ids(4, 10), lm.hook_points(tiny.LAYERS))


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_forward_is_the_reference_chain(lm, xs, kind, loop):
    stack = tiny.stack(lm, kind)
    saes = [stack.sae(i) for i in range(3)]
    codes, x_hats = reference.encode_chain(
        xs,
        [s.encoder.weight for s in saes],
        [s.encoder.bias for s in saes],
        [s.config.k for s in saes],
        [s.W_dec for s in saes],
        stack.predictor.A,
        stack.predictor.c,
        b_dec=[s.b_dec for s in saes],
        loop=loop,
    )
    out = stack(xs, loop=loop)
    for layer in range(3):
        torch.testing.assert_close(out.x_hats[layer], x_hats[layer], atol=1e-4, rtol=1e-4)
        assert (out.codes[layer].indices == codes[layer].indices).float().mean() > 0.99


def test_without_predictor_the_stack_is_ordinary_autoencoders(lm, xs):
    stack = tiny.stack(lm, "none")
    for loop in ("open", "closed"):
        for layer, x_hat in enumerate(stack(xs, loop=loop).x_hats):
            assert torch.equal(x_hat, stack.sae(layer)(xs[layer]).x_hat)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_the_reconstructions_of_forward(lm, xs, kind):
    stack = tiny.stack(lm, kind)
    for loop in ("open", "closed"):
        out = stack(xs, loop=loop)
        for a, b in zip(stack.decode(out.codes), out.x_hats, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_autoencoders_give_the_stream_in_either_loop(lm, xs, kind):
    stack = tiny.exact_stack(lm, kind)
    for loop in ("open", "closed"):
        for x, x_hat in zip(xs, stack(xs, loop=loop).x_hats, strict=True):
            torch.testing.assert_close(x_hat, x, atol=2e-3, rtol=1e-4)


def test_closed_loop_encodes_what_the_chain_has_left(lm, xs):
    stack = tiny.stack(lm)
    out = stack(xs, loop="closed")
    base = stack.predictor(1, out.x_hats)
    code = stack.sae(1).encode(xs[1], base=base)
    assert torch.equal(code.indices, out.codes[1].indices)
    opened = stack.encode(xs, loop="open")[1]
    assert not torch.equal(opened.indices, code.indices)


def test_step_by_step_is_forward(lm, xs):
    stack = tiny.stack(lm)
    for loop in ("open", "closed"):
        x_hats = []
        for layer, x in enumerate(xs):
            seen = x_hats if loop == "closed" else xs
            x_hats.append(stack.step(layer, x, seen, x_hats)[0])
        for a, b in zip(x_hats, stack(xs, loop=loop).x_hats, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_stack_is_the_same_on_rescaled_activations(lm, xs, kind):
    stack, factors = tiny.stack(lm, kind).double(), [0.5, 4.0, 3.0]
    wide = [x.double() for x in xs]
    before = stack(wide).x_hats
    stack.rescale_(factors)
    after = stack([f * x for f, x in zip(factors, wide, strict=True)]).x_hats
    for f, a, b in zip(factors, before, after, strict=True):
        torch.testing.assert_close(f * a, b, atol=1e-6, rtol=1e-6)


def test_active_total_counts_the_latents_of_the_whole_chain(lm):
    assert [tiny.stack(lm, "previous").active_total(i) for i in range(3)] == [4, 8, 12]
    assert [tiny.stack(lm, "none").active_total(i) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_stack_comes_back_bit_for_bit(lm, tmp_path, kind):
    stack = tiny.stack(lm, kind)
    stack.save_pretrained(tmp_path)
    loaded = ReSAE.from_pretrained(str(tmp_path))
    assert loaded.hook_points == stack.hook_points
    assert loaded.predictor.kind == kind
    assert loaded.model_identity == stack.model_identity
    before, after = stack.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_hub_name_is_downloaded_and_opened(lm, tmp_path, monkeypatch):
    stack = tiny.stack(lm)
    stack.save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path / "snapshot")

    def no_config(*_arguments, **_options):  # the mixin looks for a config.json, which we have not
        raise RemoteEntryNotFoundError("config.json", response=MagicMock())

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", no_config)
    monkeypatch.setattr("resae.stack.snapshot_download", snapshot_download)
    loaded = ReSAE.from_pretrained("someone/some-stack", revision="v1")
    assert asked == [("someone/some-stack", "v1", ["*.json", "*.safetensors"])]
    assert torch.equal(loaded.sae(2).W_dec, stack.sae(2).W_dec)


def test_each_layer_folder_is_an_autoencoder_of_its_own(lm, tmp_path):
    stack = tiny.stack(lm)
    stack.save_pretrained(tmp_path)
    for layer, name in enumerate(tiny.NAMES):
        assert torch.equal(TopKSAE.load(tmp_path / name).W_dec, stack.sae(layer).W_dec)
    kinds = [
        json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]["input_kind"]
        for name in tiny.NAMES
    ]
    assert kinds == ["activation", "affine_residual", "affine_residual"]


def test_model_card_says_what_it_is(lm, tmp_path):
    tiny.stack(lm).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: resae" in card
    assert "blocks.1.hook_resid_post" in card
    assert not (tmp_path / "config.json").exists()


def test_damaged_or_foreign_folders_are_named(lm, tmp_path):
    with pytest.raises(FileNotFoundError, match="stack: no file"):
        ReSAE.load(tmp_path)
    tiny.stack(lm).save_pretrained(tmp_path)
    weights = tmp_path / tiny.NAMES[1] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"blocks\.1.*truncated"):
        ReSAE.load(tmp_path)
    description = json.loads((tmp_path / "resae.json").read_text())
    (tmp_path / "resae.json").write_text(json.dumps({**description, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        ReSAE.load(tmp_path)


def test_a_stack_of_another_model_is_refused(lm):
    stack = tiny.stack(lm)
    with pytest.raises(ValueError, match="different models"):
        stack.require_model(tiny.gemma2())
    stack.require_model(lm)


def test_parts_must_fit_together(lm):
    stack = tiny.stack(lm)
    saes = [stack.sae(i) for i in range(3)]
    with pytest.raises(ValueError, match="2 autoencoders for 3"):
        ReSAE(tiny.NAMES, stack.predictor, saes[:2])
    with pytest.raises(ValueError, match="2 maps for 2"):
        ReSAE(tiny.NAMES[:2], stack.predictor, saes[:2])
    ReSAE(tiny.NAMES[:2], AffinePredictor("none"), saes[:2])
    with pytest.raises(ValueError, match="got 2 activations, expected 3"):
        stack([torch.zeros(1, 32)] * 2)
    with pytest.raises(ValueError, match="loop='half'"):
        stack([torch.zeros(1, 32)] * 3, loop="half")


def test_affine_only_carries_the_first_layer_through_the_maps(lm, xs):
    baseline = AffineOnly(tiny.stack(lm))
    x_hats = baseline(xs).x_hats
    assert torch.equal(x_hats[0], xs[0])
    maps = baseline.predictor
    torch.testing.assert_close(x_hats[1], xs[0] @ maps.A[0] + maps.c[0])
    torch.testing.assert_close(x_hats[2], x_hats[1] @ maps.A[1] + maps.c[1])


def shared_stack(lm):
    made = new_stack(
        tiny.NAMES, AffinePredictor("none"), d_in=lm.d_model, d_sae=64, k=(4, 4, 4), shared=True
    )
    made.sae(0).b_dec.data.normal_()
    return made.eval()


def test_a_shared_dictionary_is_one_through_scaling_and_disk(lm, xs, tmp_path):
    stack = shared_stack(lm)
    assert len(stack.distinct()) == 1
    assert len(list(stack.parameters())) == 4
    factors = [0.5, 4.0, 3.0]
    before = stack(xs).x_hats
    stack.rescale_(factors)
    after = stack([f * x for f, x in zip(factors, xs, strict=True)]).x_hats
    for f, a, b in zip(factors, before, after, strict=True):
        torch.testing.assert_close(f * a, b, atol=1e-4, rtol=1e-4)
    stack.save_pretrained(tmp_path)
    loaded = ReSAE.load(tmp_path)
    assert loaded.shared
    assert len({id(loaded.sae(i).W_dec) for i in range(3)}) == 1
    assert torch.equal(loaded.sae(2).b_dec, stack.sae(2).b_dec)
    alone = TopKSAE.load(tmp_path / tiny.NAMES[2])
    assert torch.equal(alone(xs[2]).x_hat, stack.sae(2)(xs[2]).x_hat)
    alone.W_dec.data[3, 3] += 1
    alone.save(tmp_path / tiny.NAMES[2])
    with pytest.raises(ValueError, match="share one dictionary"):
        ReSAE.load(tmp_path)


@pytest.mark.parametrize("kind", ["previous", "all_previous"])
def test_dictionaries_of_different_sizes_are_one_chain(lm, xs, tmp_path, kind):
    stack = tiny.stack(lm, kind, d_sae=(32, 64, 96))
    assert stack.d_sae == (32, 64, 96)
    stack.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "resae.json").read_text())["d_sae"] == [32, 64, 96]
    assert "(32, 64, 96) latents per layer" in (tmp_path / "README.md").read_text()
    loaded = ReSAE.load(tmp_path)
    for loop in ("open", "closed"):
        for a, b in zip(stack(xs, loop=loop).x_hats, loaded(xs, loop=loop).x_hats, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        few = [x[:4] for x in xs]
        x_hats, codes = stack(few, loop="closed")
        past, carried = x_hats[:2], stack.transported(1 << 30)
        x_hat, _ = stack.step(2, few[2], past, past, codes=codes[:2], carried=carried)
    torch.testing.assert_close(x_hat, x_hats[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_k_is_chosen_for_the_whole_stack(lm, xs, kind):
    stack = tiny.stack(lm, kind)
    fewer = stack.at_k(2)
    assert fewer.active_total(1) == stack.active_total(1) // 2
    for layer, code in enumerate(fewer.encode(xs)):
        assert code.acts.shape[-1] == 2
        assert torch.equal(code.indices, stack.encode(xs)[layer].indices[..., :2])
    assert stack.sae(1).W_dec is fewer.sae(1).W_dec
    assert not stack.shared


@pytest.mark.parametrize("form", [{"form": "diagonal"}, {"form": "low_rank", "rank": 3}])
def test_cheap_maps_are_a_chain_of_their_dense_ones(lm, xs, tmp_path, form):
    stack = tiny.stack(lm, "all_previous", **form)
    dense = AffinePredictor("all_previous", stack.predictor.A, stack.predictor.c)
    same = ReSAE(tiny.NAMES, dense, [stack.sae(i) for i in range(3)])
    for loop in ("open", "closed"):
        for a, b in zip(stack(xs, loop=loop).x_hats, same(xs, loop=loop).x_hats, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    before = stack(xs).x_hats
    stack.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "resae.json").read_text())["form"] == form["form"]
    for a, b in zip(before, ReSAE.load(tmp_path)(xs).x_hats, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        few = [x[:4] for x in xs]
        x_hats, codes = stack(few, loop="closed")
        carried = stack.transported(1 << 30)
        past = x_hats[:2]
        x_hat, _ = stack.step(2, few[2], past, past, codes=codes[:2], carried=carried)
    plain, _ = stack.step(2, few[2], past, past)
    torch.testing.assert_close(x_hat, plain, atol=1e-4, rtol=1e-4)
