"""mlsae: `config.json` and `model.safetensors`; TopK without encoder bias, for several layers.

One that standardises each token (`standardize`, its default) has no form here: a code alone does
not tell mean and scale of its token.
"""

from pathlib import Path

import torch

from resae.interop.files import (
    has,
    read_settings,
    read_tensors,
    refuse_others,
    required,
    setting,
    take,
)
from resae.sae.record import SAERecord
from resae.storage import load_json

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS)


def detect(path: Path) -> bool:
    if not has(path, *FILES):
        return False
    cfg = load_json(path / "config.json", "SAE")  # so are those of language models named
    return isinstance(cfg, dict) and {"n_inputs", "n_latents", "k"} <= cfg.keys()


def read(path: Path) -> SAERecord:
    cfg = read_settings(path, "config.json")
    for name, default in (("standardize", True), ("lens", False)):
        if setting(cfg, name, bool, path, default):
            what = "per-token standardisation" if name == "standardize" else "a lens per layer"
            raise ValueError(f"SAE {path}: {name} is true: {what} has no form here")
    tensors = read_tensors(path, WEIGHTS)
    known = {"encoder.weight", "decoder.weight", "pre_encoder_bias", "last_nonzero"}
    refuse_others(tensors, known, path)
    weight = take(tensors, "encoder.weight", 2, path)
    return SAERecord(
        weight=weight,
        bias=torch.zeros(weight.shape[0], dtype=weight.dtype),
        W_dec=take(tensors, "decoder.weight", 2, path).T,
        b_dec=take(tensors, "pre_encoder_bias", 1, path),
        k=required(cfg, "k", int, path),
        model=setting(cfg, "model_name", str, path),
        metadata={"layers": setting(cfg, "layers", list, path)},
    ).check(path)
