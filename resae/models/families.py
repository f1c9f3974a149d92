"""Submodules behind the hook points, per model family of transformers: one entry per family."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Submodules behind the hook points of one HF architecture; paths are relative to a block."""

    blocks: str
    """Path from the causal LM to its list of blocks."""
    attn_out: str
    """Submodule whose output attention adds to the stream."""
    mlp_out: str
    """Submodule whose output the MLP adds to the stream."""
    parallel: str | None = None
    """Config flag which, when true, means that the block has no `resid_mid`."""


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(  # Pythia
        blocks="gpt_neox.layers",
        attn_out="attention",
        mlp_out="mlp",
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp"),
    **{
        name: Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp")
        for name in ("llama", "qwen2", "qwen3")
    },
    **{
        name: Family(
            blocks="model.layers",
            attn_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
        )
        for name in ("gemma2", "gemma3_text")
    },
}


def family_of(config: Any, name: str) -> Family:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model {name}: architecture {config.model_type!r} has no entry in "
            f"resae.models.families.FAMILIES (there are {', '.join(sorted(FAMILIES))}); add one"
        )
    return FAMILIES[config.model_type]
