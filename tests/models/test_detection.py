"""Models of architectures without an entry, found by the shape of their blocks."""

import logging

import pytest
import tiny
import torch
import transformers
from families import CONFIGS, UNLISTED, made
from torch import nn

from resae import FAMILIES, HookedLM
from resae.models.detection import TOKENS, detect, entry_text
from resae.models.families import Family


@pytest.fixture
def unlist(monkeypatch):
    """Take an entry out of the table for the time of the test; returns it."""

    def take_out(kind: str) -> Family:
        entry = FAMILIES[kind]
        monkeypatch.delitem(FAMILIES, kind)
        return entry

    return take_out


@pytest.mark.parametrize(
    "kind",
    [
        *("cohere", "deepseek_v3", "gemma2", "gemma3", "glm4", "gpt2", "gptj", "granite"),
        *("granitemoe", "llama", "olmo2", "xglm"),
    ],
)
def test_the_entry_that_is_found_is_the_one_that_was_taken_out(unlist, kind, caplog):
    entry = unlist(kind)
    with caplog.at_level(logging.WARNING, "resae"):
        lm = made(kind)
    assert lm.family == entry
    assert f"no entry in FAMILIES; its blocks fit {entry_text(kind, entry)}" in caplog.text


def test_whether_blocks_are_parallel_and_the_mlp_flat_is_found_by_a_pass(unlist):
    for kind in ("gpt_neox", "opt"):
        unlist(kind)
    assert made("gpt_neox", use_parallel_residual=True).family.parallel is True
    assert made("gpt_neox", use_parallel_residual=False).family.parallel is False
    assert made("opt").family.flat_mlp


@pytest.mark.parametrize("kind", UNLISTED)
def test_a_model_that_nobody_listed_has_hook_points(kind):
    assert kind not in FAMILIES
    lm = made(kind)
    points = [
        lm.hook_point(f"blocks.1.hook_{s}")
        for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    ]
    pre, attention, mlp, post = lm.capture(tiny.ids(), points).values()
    torch.testing.assert_close(post, pre + attention + mlp)
    assert lm.sites() == ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def test_looking_leaves_the_model_and_random_numbers_as_they_were():
    model = made("exaone", attention_dropout=0.5).model.train()
    model.model.layers[1].eval()
    rows = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda _module, args, _output: rows.append(args[0].shape)
    )
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    HookedLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert 1 <= len(rows) <= 4
    assert set(rows) == {(1, TOKENS)}
    handle.remove()


def test_looking_compiles_nothing():
    graphs = []
    compiled = torch.compile(made("exaone").model, backend=lambda graph, _: graphs.append(graph))
    assert HookedLM(compiled).family == Family("model.layers", "self_attn", "mlp")
    assert not graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_addition_that_is_overlooked_is_noticed_however_small(dtype):
    model = made("exaone").model.to(dtype)
    with torch.no_grad():
        for block in model.model.layers:  # additions of a hundredth of the stream
            block.self_attn.v_proj.weight.mul_(0.3)
        model.model.embed_tokens.weight.mul_(50)
    HookedLM(model)
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + out.roll(1, -1) / 100)
    with pytest.raises(ValueError, match="resid_post differs from resid_pre"):
        HookedLM(model)


def test_what_fits_no_shape_is_an_error_with_the_entry_to_write(unlist):
    unlist("bloom")
    with pytest.raises(ValueError, match=r"add \"bloom\": Family\(blocks='transformer.h', attn"):
        made("bloom")
    mixed = made("exaone").model
    del mixed.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"no list of blocks .*\"exaone\": Family\(blocks='\?'"):
        HookedLM(mixed)
    broken = made("exaone").model
    broken.model.layers[0].mlp.down_proj = nn.Linear(7, 32)
    with pytest.raises(ValueError, match=r"a pass over 8 tokens failed.*add \"exaone\": Family"):
        HookedLM(broken)


def test_a_vision_tower_is_no_language_model(unlist):
    unlist("gemma3")
    vision = CONFIGS["gemma3"]["vision_config"] | {"num_hidden_layers": 2}  # as many as of text
    assert made("gemma3", vision_config=vision).family.blocks == "model.language_model.layers"


def test_shapes_alone_have_the_likely_entry(tmp_path):
    model = made("exaone").model
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    shapes, loaded = (
        load(str(tmp_path)) for load in (HookedLM.described, HookedLM.from_pretrained)
    )
    assert shapes.family == loaded.family == detect(loaded.model, "x")
    assert (shapes.d_model, shapes.n_layers, shapes.config.vocab_size) == (32, 2, 2048)
    with pytest.raises(ValueError, match="its first weights are on no device"):
        shapes.capture(tiny.ids(), shapes.hook_points([0]))


def test_a_gemma_with_vision_has_the_sizes_of_its_text_part():
    lm = made("gemma3")
    assert lm.config is lm.model.config.text_config
    assert set(lm.special_ids) >= {1, 2}
    assert CONFIGS["gemma3"]["vision_config"]["hidden_size"] != lm.d_model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "an encoder-decoder"),
        ("bart", "an encoder-decoder"),
        ("bert", "an encoder, which"),
        ("mamba", "a state-space or recurrent model"),
        ("rwkv", "a state-space or recurrent model"),
        ("clip", "no causal LM"),
    ],
)
def test_other_kinds_of_models_are_refused_in_one_line(kind, reason, tmp_path):
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    model = nn.Module()
    model.config = config  # pyright: ignore
    opens = [HookedLM.from_pretrained, HookedLM.described]
    if kind != "clip":
        with pytest.raises(ValueError, match=f"'{kind}' is {reason}.*decoder-only"):
            HookedLM(model)
    for load in opens:
        with pytest.raises(ValueError, match=f"{reason}.*decoder-only") as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # deprecated in torch
@pytest.mark.parametrize("kind", ["llama", "exaone"])
def test_a_model_of_quantised_linear_layers_is_hooked(kind):
    model = made(kind).model
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not isinstance(quantised.model.layers[0].mlp.down_proj, nn.Linear)
    lm = HookedLM(quantised)
    points = [lm.hook_point(f"blocks.1.hook_{s}") for s in lm.sites()]
    pre, attention, mid, mlp, post = lm.capture(tiny.ids(), points).values()
    torch.testing.assert_close(mid, pre + attention)
    torch.testing.assert_close(post, pre + attention + mlp)
    logits = lm.logits(tiny.ids())
    assert torch.equal(lm.replace(tiny.ids(), {points[-1]: post}), logits)
    assert not torch.equal(lm.replace(tiny.ids(), {points[-1]: -post}), logits)
