"""dictionary_learning: a state dict `ae.pt` and, beside it or in the folder above, `config.json`.

Read: TopK; BatchTopK and Matryoshka BatchTopK with their threshold; JumpReLU; ReLU in both forms.
Weights stay as they are stored (the library's `from_pretrained` of a ReLU one normalises W_dec).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.interop.files import (
    has,
    read_pickled_tensors,
    read_settings,
    refuse_others,
    setting,
    take,
    warn_if_unset,
)
from resae.sae.record import SAERecord

WEIGHTS = "ae.pt"
FILES = (WEIGHTS, "config.json")
BATCH_TOPK = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def detect(path: Path) -> bool:
    return has(path, WEIGHTS)


def read(path: Path) -> SAERecord:
    file = path / WEIGHTS if path.is_dir() else path
    state = read_pickled_tensors(file)
    trainer = _trainer(file)
    parts = dict(_weights(state, file), **_activation(state, trainer, file))
    layer, site = setting(trainer, "layer", int, file), trainer.get("submodule_name")
    at_block = layer is not None and str(site or "").startswith("resid_post")
    facts = {name: trainer[name] for name in ("dict_class", "trainer_class") if name in trainer}
    return SAERecord(
        **parts,
        hook_point=f"blocks.{layer}.hook_resid_post" if at_block else None,
        model=setting(trainer, "lm_name", str, file),
        metadata=facts | {"submodule_name": site, "layer": layer},
    ).check(file)


def _trainer(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return setting(read_settings(folder, "config.json"), "trainer", dict, folder, {})
    return {}


def _weights(state: dict[str, Any], file: Path) -> dict[str, Any]:
    """The four tensors, by our names and orientation, and whether the input loses b_dec."""
    buffers = {"k", "threshold", "group_sizes"}
    if "W_enc" in state:
        refuse_others(state, {"W_enc", "b_enc", "W_dec", "b_dec"} | buffers, file)
        return {
            "weight": take(state, "W_enc", 2, file).T,
            "bias": take(state, "b_enc", 1, file),
            "W_dec": take(state, "W_dec", 2, file),
            "b_dec": take(state, "b_dec", 1, file),
            "apply_b_dec_to_input": "group_sizes" in state,  # JumpReLU reads x itself
        }
    names = [name for name in ("b_dec", "bias", "decoder.bias") if name in state]
    known = {"encoder.weight", "encoder.bias", "decoder.weight", *names[:1]} | buffers
    refuse_others(state, known, file)
    return {
        "weight": take(state, "encoder.weight", 2, file),
        "bias": take(state, "encoder.bias", 1, file),
        "W_dec": take(state, "decoder.weight", 2, file).T,
        "b_dec": take(state, names[0] if names else "b_dec", 1, file),
        "apply_b_dec_to_input": "decoder.bias" not in state,
    }


def _activation(state: dict[str, Any], trainer: dict[str, Any], file: Path) -> dict[str, Any]:
    k = state.get("k")
    if isinstance(k, Tensor):
        if k.numel() != 1 or k.is_floating_point():
            raise ValueError(f"SAE {file}: k is {k.dtype} {list(k.shape)}, expected one integer")
        k = int(k)
    k = setting({"k": k}, "k", int, file) or setting(trainer, "k", int, file)
    like = state["b_enc" if "W_enc" in state else "encoder.bias"]
    if "bias" in state or "decoder.bias" in state:
        return {"threshold": torch.zeros_like(like)}
    if "W_enc" in state and "group_sizes" not in state:
        return {"threshold": take(state, "threshold", 1, file).to(like.dtype)}
    kind = setting(trainer, "dict_class", str, file)
    if "group_sizes" in state or kind in BATCH_TOPK:
        threshold = float(take(state, "threshold", 0, file))
        warn_if_unset(threshold, file)
        return {"k": k, "threshold": torch.full_like(like, threshold)}
    if kind != "AutoEncoderTopK":
        raise ValueError(
            f"SAE {file}: TopK and BatchTopK have the same tensors here, and config.json names "
            f"{kind!r} as dict_class; expected AutoEncoderTopK or {' or '.join(BATCH_TOPK)}"
        )
    return {"k": k}
