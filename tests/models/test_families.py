"""Every family that is listed, as a tiny random model of transformers' own class."""

from functools import partial

import pytest
import tiny
import torch
from families import CONFIGS, made
from torch import Tensor

from resae import FAMILIES, HookedLM, replacement
from resae.models.families import Family

VARIANTS = {
    "falcon, sequential": ("falcon", {"parallel_attn": False}),
    "falcon, two norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
}


@pytest.fixture(scope="module", params=[*CONFIGS, *VARIANTS])
def lm(request):
    kind, options = VARIANTS.get(request.param, (request.param, {}))
    return made(kind, **options)


def at_all_sites(lm: HookedLM) -> dict[tuple[int, str], Tensor]:
    points = [lm.hook_point(f"blocks.{i}.hook_{s}") for i in range(lm.n_layers) for s in lm.sites()]
    captured = lm.capture(tiny.ids(), points)
    return {(p.layer, p.site): captured[p] for p in points}


def test_every_entry_has_a_tiny_model():
    assert set(CONFIGS) == set(FAMILIES)


def test_the_stream_is_the_sum_of_what_attention_and_mlp_add(lm):
    assert (lm.d_model, lm.n_layers, lm.config.vocab_size) == (32, 2, 2048)
    at = at_all_sites(lm)
    hidden = lm.model(tiny.ids(), output_hidden_states=True).hidden_states
    for layer in range(lm.n_layers):
        pre, attention, mlp, post = (
            at[layer, site] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        assert pre.shape == attention.shape == mlp.shape == post.shape == (3, 12, 32)
        torch.testing.assert_close(post, pre + attention + mlp)
        for part in (attention, mlp):
            assert part.norm() > 0.01 * post.norm()
        if (layer, "resid_mid") in at:
            torch.testing.assert_close(at[layer, "resid_mid"], pre + attention)
        torch.testing.assert_close(pre, hidden[layer])  # of the model's own hooks


def test_replacing_by_what_is_there_leaves_the_logits(lm):
    logits, at = lm.logits(tiny.ids()), at_all_sites(lm)
    assert logits.std() > 1e-3
    for (layer, site), activation in at.items():
        point = lm.hook_point(f"blocks.{layer}.hook_{site}")
        same = lm.replace(tiny.ids(), {point: activation})
        if site == "resid_post":
            assert torch.equal(same, logits)
        torch.testing.assert_close(same, logits, atol=1e-4, rtol=1e-4)
        if layer == 1:
            assert not torch.allclose(lm.replace(tiny.ids(), {point: -activation}), logits)
    assert all(torch.equal(new, at[key]) for key, new in at_all_sites(lm).items())


def test_an_output_of_attention_or_mlp_set_to_zero_adds_nothing(lm):
    for site, other in (("attn_out", "mlp_out"), ("mlp_out", "attn_out")):
        post, rest, gone = (
            lm.hook_point(f"blocks.1.hook_{s}") for s in ("resid_post", other, site)
        )
        seen: dict = {}
        pre = lm.hook_point("blocks.1.hook_resid_pre")
        hooks = {gone: torch.zeros_like} | {
            p: partial(seen.__setitem__, p) for p in (pre, rest, post)
        }
        with lm.hooked(hooks):
            lm.logits(tiny.ids())
        torch.testing.assert_close(seen[post], seen[pre] + seen[rest])


def test_cached_generation_is_replaced_as_a_full_pass_is(lm):
    stack = tiny.stack(lm, layers=(0, 1))
    special = torch.tensor(lm.special_ids)
    with replacement(lm, stack) as replaced:
        out = lm.model.generate(
            tiny.ids(2, 6),
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        replaced.assert_replaced(decode_steps=3)
        full = lm.logits(out.sequences)[:, 5:-1]
    assert not torch.isin(out.sequences, special).all()
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(full, lm.logits(out.sequences)[:, 5:-1])


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
)
def test_a_config_whose_blocks_add_something_else_is_refused(kind, option):
    (key,) = option
    with pytest.raises(ValueError, match=f"{key}=.*expected"):
        made(kind, **option)


def test_an_entry_says_what_its_blocks_are():
    assert FAMILIES["mistral"] == Family("model.layers", "self_attn", "mlp")


@pytest.mark.filterwarnings("ignore")  # of accelerate
@pytest.mark.parametrize("kind", ["bloom", "exaone", "falcon", "gemma3", "opt"])
def test_a_block_that_accelerate_fetches_when_its_turn_comes_is_hooked_to_the_bits(kind):
    accelerate = pytest.importorskip("accelerate")
    lm = made(kind)
    expected, logits, stack = at_all_sites(lm), lm.logits(tiny.ids()), tiny.stack(lm, layers=(0, 1))
    with replacement(lm, stack):
        replaced = lm.logits(tiny.ids())
    accelerate.cpu_offload(lm.blocks[1], execution_device=torch.device("cpu"))
    assert next(lm.blocks[1].parameters()).is_meta
    lm = HookedLM(lm.model)
    assert all(torch.equal(new, expected[key]) for key, new in at_all_sites(lm).items())
    with replacement(lm, stack):
        assert torch.equal(lm.logits(tiny.ids()), replaced)
    assert torch.equal(lm.logits(tiny.ids()), logits)
