"""Every family that is listed, as a tiny random model of transformers' own class."""

from functools import partial

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from resae import FAMILIES, HookedLM, replacement
from resae.models.families import Family

PLAIN = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
COMMON = PLAIN | {"head_dim": 8}
OLD = {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
LATENT = (
    PLAIN
    | EXPERTS
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4}
    | {
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    }
)
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS: dict[str, dict] = {
    "apertus": COMMON,
    "arcee": COMMON,
    "biogpt": COMMON,
    "bloom": {"vocab_size": 2048, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": OLD | {"rotary_dim": 4},
    "cohere": COMMON,
    "cohere2": COMMON,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "ernie4_5": COMMON,
    "exaone4": COMMON,
    "falcon": PLAIN | {"new_decoder_architecture": False, "alibi": False},
    "gemma": COMMON,
    "gemma2": COMMON,
    "gemma3": {"text_config": COMMON, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3_text": COMMON,
    "glm": COMMON,
    "glm4": COMMON,
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": COMMON
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": COMMON,
    "gpt_oss": COMMON | EXPERTS,
    "gptj": OLD | {"rotary_dim": 4},
    "granite": COMMON | {"residual_multiplier": 0.22},
    "granitemoe": COMMON | EXPERTS | {"residual_multiplier": 0.22},
    "helium": COMMON,
    "llama": COMMON,
    "ministral": COMMON,
    "mistral": COMMON,
    "mixtral": COMMON | EXPERTS,
    "mpt": {"vocab_size": 2048, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron": COMMON,
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": COMMON,
    "olmoe": COMMON | EXPERTS,
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": COMMON,
    "phi": COMMON,
    "phi3": COMMON,
    "qwen2": COMMON,
    "qwen2_moe": COMMON | EXPERTS,
    "qwen3": COMMON,
    "qwen3_moe": COMMON | EXPERTS,
    "seed_oss": COMMON,
    "smollm3": COMMON,
    "stablelm": COMMON,
    "starcoder2": COMMON,
    "xglm": COMMON | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}
"""Sizes of a tiny model per entry of `FAMILIES`."""

VARIANTS = {
    "falcon, sequential": ("falcon", {"parallel_attn": False}),
    "falcon, two norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
}


def made(kind: str, **options) -> HookedLM:
    """A random model, with larger weights than at initialisation."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind] | options)
    lm = HookedLM(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return lm


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
