import copy
import dataclasses
import json
import pickle
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from resae import AffineOnly, AffinePredictor, ReSAE, TopKSAE
from resae.choices import PredictorKind
from resae.data.activations import capture_tokens
from resae.sae.base import SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.stack.files import FILES
from resae.stack.stack import new_stack
from resae_kernels import ScreenedEncoder, reference
from resae_kernels.cpu import native


@pytest.fixture(scope="module")
def lm():
    return tiny.pythia()


@pytest.fixture(scope="module")
def xs(lm):
    return capture_tokens(lm, tiny.ids(4, 10), lm.hook_points(tiny.LAYERS))


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("kind", tuple(PredictorKind)[1:])
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


@pytest.mark.parametrize("kind", tuple(PredictorKind))
def test_decode_gives_the_reconstructions_of_forward(lm, xs, kind):
    stack = tiny.stack(lm, kind)
    for loop in ("open", "closed"):
        out = stack(xs, loop=loop)
        for a, b in zip(stack.decode(out.codes), out.x_hats, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", tuple(PredictorKind))
def test_perfect_autoencoders_give_the_stream_in_either_loop(lm, xs, kind):
    stack = tiny.exact_stack(lm, kind)
    for loop in ("open", "closed"):
        for x, x_hat in zip(xs, stack(xs, loop=loop).x_hats, strict=True):
            torch.testing.assert_close(x_hat, x, atol=2e-3, rtol=1e-4)


def test_closed_loop_encodes_what_the_chain_has_left(lm, xs):
    stack = tiny.stack(lm)
    out = stack(xs, loop="closed")
    prediction = stack.predictor(1, out.x_hats)
    code = stack.sae(1).encode(xs[1], prediction=prediction)
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


@pytest.mark.parametrize("kind", tuple(PredictorKind))
def test_rescaled_stack_is_the_same_on_rescaled_activations(lm, xs, kind):
    stack, factors = tiny.stack(lm, kind).double(), [0.5, 4.0, 3.0]
    wide = [x.double() for x in xs]
    before = stack(wide).x_hats
    stack.rescale_(factors)
    after = stack([f * x for f, x in zip(factors, wide, strict=True)]).x_hats
    for f, a, b in zip(factors, before, after, strict=True):
        torch.testing.assert_close(f * a, b, atol=1e-6, rtol=1e-6)


def test_active_total_counts_the_latents_of_the_whole_chain(lm):
    assert [tiny.stack(lm, "previous").upstream_l0(i) for i in range(3)] == [4, 8, 12]
    assert [tiny.stack(lm, "none").upstream_l0(i) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("kind", tuple(PredictorKind))
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

    monkeypatch.setattr("resae.stack.stack.snapshot_download", snapshot_download)
    loaded = ReSAE.from_pretrained("someone/some-stack", revision="v1")
    assert asked == [("someone/some-stack", "v1", FILES)]
    assert torch.equal(loaded.sae(2).W_dec, stack.sae(2).W_dec)


@pytest.mark.parametrize("name", ["typo", "runs/typo", "./runs/typo", "a/b/c", ""])
def test_a_name_that_is_nowhere_is_called_no_folder_first(name, tmp_path, monkeypatch):
    """The hub refuses the form of the last three before it is asked, and has none of the others."""
    monkeypatch.chdir(tmp_path)
    if name in ("typo", "runs/typo"):
        error = RepositoryNotFoundError("404: no such repository", response=MagicMock())
        monkeypatch.setattr("resae.stack.stack.snapshot_download", MagicMock(side_effect=error))
    with pytest.raises(FileNotFoundError) as raised:
        ReSAE.from_pretrained(name)
    said = str(raised.value)
    assert said.startswith(f"stack {name!r}: there is no such folder, and no repository")
    assert "\n" not in said


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
    assert "probability below 1e-12 per row" in card
    assert "license" not in card  # of the weights: for their owner to choose
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
    with pytest.raises(ValueError, match=r"blocks\.1.* encodes residuals, and predictor 'none'"):
        ReSAE(tiny.NAMES[:2], AffinePredictor("none"), saes[:2])
    maps = AffinePredictor("previous", stack.predictor.A[:1], stack.predictor.c[:1])
    with pytest.raises(ValueError, match=r"blocks\.0.* encodes residuals"):
        ReSAE(tiny.NAMES[:2], maps, saes[:1] * 2)
    ordinary = tiny.stack(lm, "none")
    ReSAE(tiny.NAMES[:2], AffinePredictor("none"), [ordinary.sae(i) for i in range(2)])
    with pytest.raises(ValueError, match="got 2 activations, expected 3"):
        stack([torch.zeros(1, 32)] * 2)
    with pytest.raises(ValueError, match="loop='half'"):
        stack([torch.zeros(1, 32)] * 3, loop="half")


def test_an_autoencoder_of_residuals_knows_it_and_asks_for_the_prediction(lm, xs, tmp_path):
    """In the stack, loaded with or without it, at a lower k, rescaled and copied."""
    stack = tiny.stack(lm)
    stack.save_pretrained(tmp_path)
    loaded = ReSAE.load(tmp_path)
    rescaled = ReSAE.load(tmp_path)
    rescaled.rescale_([2.0, 2.0, 2.0])
    boosted = ReSAE(
        tiny.NAMES,
        loaded.predictor,
        [BoostedSAE(loaded.sae(i), TopKSAE(SAEConfig(32, 16, 2))) for i in range(3)],
    )
    boosted.save_pretrained(tmp_path / "boosted")
    stacks = [stack, loaded, rescaled, stack.at_k(2), copy.deepcopy(stack), boosted]
    stacks += [ReSAE.load(tmp_path / "boosted"), loaded.half().float()]
    saes = [made.sae(1) for made in stacks] + [TopKSAE.load(tmp_path / tiny.NAMES[1])]
    saes.append(TopKSAE.load(tmp_path / "boosted" / tiny.NAMES[1] / "boost"))
    for sae in saes:
        assert sae.config.input_kind == "affine_residual"
        for call in (sae.encode, sae):
            with pytest.raises(ValueError, match="residual of an activation.*prediction="):
                call(xs[1])
        sae(xs[1], prediction=stack.predictor(1, xs))
    first = [made.sae(0) for made in stacks] + [tiny.stack(lm, "none").sae(1)]
    first.append(TopKSAE.load(tmp_path / tiny.NAMES[0]))
    for sae in first:
        assert sae.config.input_kind == "activation"
        sae.encode(xs[0])
    code = TopKSAE.load(tmp_path / tiny.NAMES[1]).encode(xs[1], prediction=stack.predictor(1, xs))
    assert torch.equal(code.indices, stack.encode(xs)[1].indices)


def test_a_boosted_stack_is_not_shared_and_opens_where_it_was_recorded_as_such(lm, tmp_path):
    plain = tiny.stack(lm, "none")
    saes = [BoostedSAE(plain.sae(i), TopKSAE(SAEConfig(32, 16, 2))) for i in range(3)]
    stack = ReSAE(tiny.NAMES, plain.predictor, saes)
    assert not stack.shared
    stack.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "resae.json").read_text())
    assert record["shared"] is False
    for name in ("resae.json", *(f"{name}/cfg.json" for name in tiny.NAMES)):  # as before kinds
        content = json.loads((tmp_path / name).read_text())
        content |= {"shared": True} if name == "resae.json" else {}
        content.get("metadata", {}).pop("kind", None)
        (tmp_path / name).write_text(json.dumps(content))
    loaded = ReSAE.load(tmp_path)
    assert [sae.kind for sae in loaded.unique_saes()] == ["boosted"] * 3


def test_what_capture_returns_is_encoded_by_hook_point(lm):
    """In whatever order, with other points beside."""
    stack = tiny.stack(lm)
    captured = lm.capture(tiny.ids(4, 10), lm.hook_points([0, 1, 2, 3]))
    plain = [captured[lm.hook_point(name)] for name in tiny.NAMES]
    by_name = {name: x for name, x in reversed(list(zip(tiny.NAMES, plain, strict=True)))}
    for given in (captured, by_name, (x for x in plain)):
        for a, b in zip(stack.encode(given), stack.encode(plain), strict=True):
            assert torch.equal(a.indices, b.indices)
    for a, b in zip(
        AffineOnly(stack)(captured).x_hats, AffineOnly(stack)(plain).x_hats, strict=True
    ):
        assert torch.equal(a, b)
    del captured[lm.hook_point(1)]
    with pytest.raises(ValueError, match=r"no activation of blocks\.1\.hook_resid_post, only of"):
        stack.encode(captured)


class SparseCoder(torch.nn.Module):
    """As an autoencoder of another library."""


def test_wrong_types_are_told_what_to_pass(lm):
    stack = tiny.stack(lm)
    maps = stack.predictor
    for made, message in (
        (lambda: ReSAE(tiny.NAMES, [SparseCoder()]), "list as the predictor.*AffinePredictor"),
        (lambda: ReSAE(tiny.NAMES, maps, [SparseCoder()] * 3), "SparseCoder as an.*TopKSAE.load"),
        (lambda: ReSAE(tiny.NAMES, maps, [TopKSAE] * 3), "got TopKSAE as an autoencoder"),
        (lambda: ReSAE(tiny.NAMES[0], maps, []), "as hook points, expected a list of names"),
        (lambda: ReSAE(lm.hook_points([0]), maps, []), r"HookPoint.*expected a list of names"),
        (lambda: AffineOnly("a folder"), "got str, expected a ReSAE"),
        (lambda: stack.encode(torch.zeros(3, 5, 32)), "got Tensor, expected a list of one tensor"),
        (lambda: stack.encode([1, 2, 3]), "got int as an activation"),
        (lambda: stack(7), "got int, expected a list"),
    ):
        with pytest.raises(TypeError, match=message):
            made()


def test_reprs_say_sizes_layers_and_screening(lm):
    text = repr(tiny.stack(lm, "previous"))
    for part in (
        "model='tiny-neox'",
        "'blocks.1.hook_resid_post'",
        "predictor='previous', map_type='full'",
        "k=[4, 4, 4]",
        "d_in=32, d_sae=64, k=4, input_kind='affine_residual', screening='statistical'",
    ):
        assert part in text
    prediction, boost = (TopKSAE(SAEConfig(8, M, 2)) for M in (20, 10))
    text = repr(BoostedSAE(prediction, boost, threshold=0.25))
    assert "d_in=8, d_sae=30, k=4, input_kind='activation', threshold=0.25" in text


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
    assert len(stack.unique_saes()) == 1
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
    card = (tmp_path / "README.md").read_text()
    for name, d_sae in zip(tiny.NAMES, (32, 64, 96), strict=True):
        assert f"| {name} | 32 | {d_sae} | " in card
    loaded = ReSAE.load(tmp_path)
    for loop in ("open", "closed"):
        for a, b in zip(stack(xs, loop=loop).x_hats, loaded(xs, loop=loop).x_hats, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        few = [x[:4] for x in xs]
        x_hats, codes = stack(few, loop="closed")
        past, transported = x_hats[:2], stack.transported(1 << 30)
        x_hat, _ = stack.step(2, few[2], past, past, codes=codes[:2], transported=transported)
    torch.testing.assert_close(x_hat, x_hats[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", tuple(PredictorKind))
def test_a_lower_k_is_chosen_for_the_whole_stack(lm, xs, kind):
    stack = tiny.stack(lm, kind)
    fewer = stack.at_k(2)
    assert fewer.upstream_l0(1) == stack.upstream_l0(1) // 2
    for layer, code in enumerate(fewer.encode(xs)):
        assert code.acts.shape[-1] == 2
        assert torch.equal(code.indices, stack.encode(xs)[layer].indices[..., :2])
    assert stack.sae(1).W_dec is fewer.sae(1).W_dec
    assert not stack.shared


@pytest.mark.parametrize(
    "map_type", [{"map_type": "diagonal"}, {"map_type": "low_rank", "rank": 3}]
)
def test_cheap_maps_are_a_chain_of_their_dense_ones(lm, xs, tmp_path, map_type):
    stack = tiny.stack(lm, "all_previous", **map_type)
    dense = AffinePredictor("all_previous", stack.predictor.A, stack.predictor.c)
    same = ReSAE(tiny.NAMES, dense, [stack.sae(i) for i in range(3)])
    for loop in ("open", "closed"):
        for a, b in zip(stack(xs, loop=loop).x_hats, same(xs, loop=loop).x_hats, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    before = stack(xs).x_hats
    stack.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "resae.json").read_text())["map_type"] == map_type["map_type"]
    for a, b in zip(before, ReSAE.load(tmp_path)(xs).x_hats, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        few = [x[:4] for x in xs]
        x_hats, codes = stack(few, loop="closed")
        transported = stack.transported(1 << 30)
        past = x_hats[:2]
        x_hat, _ = stack.step(2, few[2], past, past, codes=codes[:2], transported=transported)
    plain, _ = stack.step(2, few[2], past, past)
    torch.testing.assert_close(x_hat, plain, atol=1e-4, rtol=1e-4)


def _replace_parameter(module: torch.nn.Module, name: str) -> None:
    setattr(module, name, torch.nn.Parameter(2 * getattr(module, name), requires_grad=False))


CHANGES = {
    "nothing": lambda _: None,
    "weight in place": lambda stack: stack.saes[1].encoder.weight.mul_(-1.0),
    "weight replaced": lambda stack: _replace_parameter(stack.saes[1].encoder, "weight"),
    "bias in place": lambda stack: stack.saes[1].encoder.bias.add_(1.0),
    "decoder in place": lambda stack: stack.saes[1].W_dec.mul_(2.0),
    "decoder replaced": lambda stack: _replace_parameter(stack.saes[1], "W_dec"),
    "decoder bias in other memory": lambda stack: setattr(
        stack.saes[1].b_dec, "data", torch.randn(stack.d_in)
    ),
    "map turned in its memory": lambda stack: setattr(
        stack.predictor.A_1, "data", stack.predictor.A_1.T
    ),
    "map replaced": lambda stack: setattr(stack.predictor, "A_1", -stack.predictor.A_1),
    "predictor replaced": lambda stack: setattr(
        stack, "predictor", stack.predictor.rescaled([1.0, 3.0])
    ),
    "autoencoder replaced": lambda stack: stack.saes.__setitem__(1, stack.saes[1].at_k(3)),
    "fewer active": lambda stack: setattr(
        stack.saes[1], "config", dataclasses.replace(stack.saes[1].config, k=4)
    ),
    "the certain margin": lambda stack: setattr(stack.saes[1], "screening", "certain"),
    "copy dropped": lambda stack: stack.saes[1].screened.invalidate(),
    "decoder parametrised": lambda stack: torch.nn.utils.parametrize.register_parametrization(
        stack.saes[1], "W_dec", torch.nn.Softsign()
    ),
    "another dtype": lambda stack: stack.bfloat16(),
}


@pytest.mark.usefixtures("screened_by_triton_at_any_size")
@pytest.mark.parametrize("by_codes", [False, True])
@torch.no_grad()
def test_a_step_screens_by_triton_on_request(by_codes, device):
    D = 64
    predictor = AffinePredictor("previous", [torch.randn(D, D) / 8], [torch.randn(D)])
    stack = new_stack(tiny.NAMES[:2], predictor, d_in=D, d_sae=640, k=[4, 4]).eval().to(device)
    x, past = torch.randn(1, 1, D, device=device), [torch.randn(1, 1, D, device=device)]
    more = {}
    if by_codes:
        code = stack.saes[0].encode(past[0])
        past = [stack.saes[0].decode(*code)]
        more = {"codes": [code], "transported": stack.transported(1 << 30)}
    plain = stack.step(1, x, past, past, **more)
    for sae in stack.saes:
        sae.screening_implementation = "triton"
    x_hat, code = stack.step(1, x, past, past, **more)
    assert stack.saes[1]._screened.implementation == "triton"
    assert stack.saes[1]._screened._state is not None
    assert set(code.indices.flatten().tolist()) == set(plain[1].indices.flatten().tolist())
    torch.testing.assert_close(x_hat, plain[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("tokens", [(1, 1), (16, 1)])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_prepared_step_follows_every_change_of_the_stack(change, tokens, monkeypatch):
    """The bits of a copy of the stack, which has prepared nothing; no checks anew in between."""
    D, A = 128, torch.randn(128, 128) / 11
    predictor = AffinePredictor("previous", [A], [torch.randn(D)])
    stack = new_stack(tiny.NAMES[:2], predictor, d_in=D, d_sae=1024, k=[8, 8])
    for sae in stack.saes:
        sae.b_dec.normal_()
    stack.eval().requires_grad_(False)
    x, past = torch.randn(*tokens, D), [torch.randn(*tokens, D)]
    prepared = []
    prepare = ScreenedEncoder.prepare_step
    monkeypatch.setattr(
        ScreenedEncoder, "prepare_step", lambda *a, **b: prepared.append(a) or prepare(*a, **b)
    )
    for _ in range(2):  # the first makes the copy
        stack.step(1, x, past, past)
    prepared.clear()
    before = stack.step(1, x, past, past)
    assert not prepared
    CHANGES[change](stack)
    x, past = x.to(stack.saes[1].b_dec.dtype), [past[0].to(stack.saes[1].b_dec.dtype)]
    fresh = pickle.loads(pickle.dumps(stack)) if "parametrised" not in change else None
    ours = [stack.step(1, x, past, past) for _ in range(3)]
    theirs = ours[0]
    if fresh is not None:
        assert not fresh._prepared
        for _ in range(2):
            theirs = fresh.step(1, x, past, past)
    for x_hat, code in ours[1:]:
        for a, b in zip((x_hat, *code), (theirs[0], *theirs[1]), strict=True):
            assert torch.equal(a, b)
    if change in ("nothing", "copy dropped"):
        assert torch.equal(ours[2][0], before[0])
    elif change != "the certain margin":
        assert not torch.equal(ours[2][0], before[0])


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("kind", ["none", "identity", "previous", "all_previous"])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (16, 1), (2, 20)])
def test_a_layer_of_few_tokens_on_a_cpu_is_one_compiled_call(kind, tokens, monkeypatch):
    """Prediction, code and reconstruction, against float64; sizes that are screened."""
    D, L = 192, 3
    sources = [layer if kind == "all_previous" else 1 for layer in range(1, L)]
    maps = [torch.randn(s * D, D) / (s * D) ** 0.5 for s in sources]
    c = [torch.randn(D) for _ in maps]
    if kind == "identity":
        maps = [torch.eye(D) for _ in maps]
    predictor = AffinePredictor(kind) if kind == "none" else AffinePredictor(kind, maps, c)
    stack = new_stack(tiny.NAMES, predictor, d_in=D, d_sae=1024, k=[8] * L)
    for sae in stack.saes:
        sae.b_dec.data.normal_()
    stack.eval().requires_grad_(False)
    xs = [torch.randn(*tokens, D) for _ in range(L)]
    steps = []
    compiled = native.online_step
    monkeypatch.setattr(native, "online_step", lambda *a: steps.append(a[1].A) or compiled(*a))
    exact = [x.double() for x in xs]
    wide = copy.deepcopy(stack).double()
    with torch.no_grad():
        for _ in range(2):  # the first pass makes the copies
            steps.clear()
            x_hats = []
            for layer, x in enumerate(xs):
                x_hat, code = stack.step(layer, x, x_hats, x_hats)
                x_hats.append(x_hat)
                assert code.indices.shape == (*tokens, 8)
        expected = wide(exact, loop="closed")
    for ours, theirs in zip(x_hats, expected.x_hats, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-4, rtol=1e-4)
    N = tokens[0] * tokens[1]
    assert len(steps) == (L if N <= 16 else 0)
    inside = kind in ("identity", "previous") and N * D <= 2048
    by_map = [A is not None for A in steps]
    one_source = [False, kind == "all_previous" and N * D <= 2048, False]
    assert by_map == ([False, True, True] if inside else one_source)[: len(steps)]
