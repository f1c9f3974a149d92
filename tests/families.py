"""Tiny random models of every family that is listed, and of a few that are not."""

import torch
import transformers

from resae import HookedLM

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
    "cwm": COMMON,
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

UNLISTED = {"exaone": COMMON, "phimoe": COMMON | {"num_local_experts": 2}, "jais2": COMMON}
"""Sizes of tiny models of architectures without an entry."""


def made(kind: str, **options) -> HookedLM:
    """A random model, with larger weights than at initialisation."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(CONFIGS | UNLISTED)[kind] | options)
    lm = HookedLM(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return lm
