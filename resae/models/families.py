"""Submodules behind the hook points, per model family of transformers: one entry per family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Submodules behind the hook points of one HF architecture; paths are relative to a block."""

    blocks: str
    """Path from the causal LM to its list of blocks."""
    attn_out: str
    """Submodule whose output attention adds to the stream."""
    mlp_out: str
    """Submodule whose output the MLP (or the mixture of experts) adds to the stream."""
    parallel: bool | tuple[str, ...] = False
    """True if attention and MLP read the same stream, so that the block has no `resid_mid`; or the
    config flags of which one must be true for that."""
    scale: str | None = None
    """Config attribute by which the block multiplies both outputs before it adds them."""
    flat_mlp: bool = False
    """True if the output of `mlp_out` has all tokens in one dimension, `[B·T, D]`."""
    in_place: bool = False
    """True if the block changes the output of `mlp_out` in place afterwards."""
    base: str | None = None
    """Path from the causal LM to the module that it calls with token ids; None: the parent of
    `blocks`."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Config values without which the block adds something else than these two outputs."""


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(  # Pythia
        blocks="gpt_neox.layers",
        attn_out="attention",
        mlp_out="mlp",
        parallel=("use_parallel_residual",),
    ),
    **{
        name: Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp")
        for name in ("gpt2", "gpt_bigcode", "gpt_neo")
    },
    **{
        name: Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp", parallel=True)
        for name in ("codegen", "gptj")
    },
    **{
        name: Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp")
        for name in (
            *("apertus", "arcee", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "gemma", "glm"),
            *("gpt_oss", "helium", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo"),
            *("olmoe", "persimmon", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
            *("seed_oss", "smollm3", "starcoder2"),
        )
    },
    **{
        name: Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp", parallel=True)
        for name in ("cohere", "cohere2", "phi")
    },
    "stablelm": Family(
        blocks="model.layers",
        attn_out="self_attn",
        mlp_out="mlp",
        parallel=("use_parallel_residual",),
    ),
    "granite": Family(
        blocks="model.layers", attn_out="self_attn", mlp_out="mlp", scale="residual_multiplier"
    ),
    "granitemoe": Family(
        blocks="model.layers",
        attn_out="self_attn",
        mlp_out="block_sparse_moe",
        scale="residual_multiplier",
    ),
    **{
        name: Family(
            blocks="model.layers",
            attn_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
        )
        for name in ("exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3")
    },
    "gemma3": Family(  # the class with a vision tower; the hook points are those of its text part
        blocks="model.language_model.layers",
        base="model",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    "glm4": Family(
        blocks="model.layers", attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        attn_out="self_attn",
        mlp_out="fc2",
        flat_mlp=True,
        requires={"do_layer_norm_before": True},  # false: opt-350m, which normalises the sum
    ),
    "biogpt": Family(blocks="biogpt.layers", attn_out="self_attn", mlp_out="fc2"),
    "xglm": Family(blocks="model.layers", attn_out="self_attn", mlp_out="fc2"),
    # Attention and MLP of the next two add the stream themselves: their last products do not.
    "bloom": Family(
        blocks="transformer.h",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        requires={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    ),
    "mpt": Family(blocks="transformer.blocks", attn_out="attn", mlp_out="ffn.down_proj"),
    "falcon": Family(
        blocks="transformer.h",
        attn_out="self_attention",
        mlp_out="mlp",
        parallel=("parallel_attn", "new_decoder_architecture"),
        in_place=True,
    ),
}

RECURRENT = ("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm")
"""Model types whose blocks carry a state from token to token instead of attending."""


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def family_of(config: Any, name: str) -> Family | None:
    """The entry of a model's architecture; None: it has none.

    Raises:
        ValueError: no decoder of text with attention and MLP, or a config whose blocks add
            something else than the entry says.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        _require_decoder(config, name)
        return None
    for key, value in family.requires.items():
        if (got := getattr(config, key, value)) != value:
            raise ValueError(
                f"model {name}: {key}={got} in its config, expected {value}; otherwise its blocks "
                f"do not add attn_out and mlp_out to the stream, so it has no hook points"
            )
    return family


def _require_decoder(config: Any, name: str) -> None:
    """Raise ValueError for the kinds of models that cannot have the hook points."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder-decoder, whose blocks add cross-attention to a second stream as well"
    elif kind in RECURRENT:
        reason = "a state-space or recurrent model, whose blocks have no attention and MLP to name"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        reason = "an encoder, which reads text in both directions and does not continue it"
    else:
        return
    raise ValueError(f"model {name}: {kind!r} is {reason}; resae needs a decoder-only model")
