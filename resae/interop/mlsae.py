"""mlsae: `config.json` and `model.safetensors`; TopK without encoder bias, for several layers.

One that standardises each token (`standardize`, its default) has no form here
(`SCALE_OF_A_TOKEN`).
"""

from pathlib import Path

import torch

from resae.interop.files import (
    SCALE_OF_A_TOKEN,
    has,
    read_settings,
    read_tensors,
    refuse_others,
    require_sizes,
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
    if setting(cfg, "standardize", bool, path, True):
        raise ValueError(
            f"SAE {path}: standardize is true: {SCALE_OF_A_TOKEN}; run it in mlsae, or train one "
            f"with standardize=False"
        )
    if setting(cfg, "lens", bool, path, False):
        raise ValueError(f"SAE {path}: lens is true: a lens per layer has no form here")
    tensors = read_tensors(path, WEIGHTS)
    known = {"encoder.weight", "decoder.weight", "pre_encoder_bias", "last_nonzero"}
    refuse_others(tensors, known, path)
    weight = take(tensors, "encoder.weight", 2, path)
    record = SAERecord(
        weight=weight,
        bias=torch.zeros(weight.shape[0], dtype=weight.dtype),
        W_dec=take(tensors, "decoder.weight", 2, path).T,
        b_dec=take(tensors, "pre_encoder_bias", 1, path),
        k=required(cfg, "k", int, path),
        model=setting(cfg, "model_name", str, path),
        metadata={"layers": setting(cfg, "layers", list, path)},
    ).check(path)
    M, D = record.weight.shape
    require_sizes(cfg, {"n_inputs": D, "n_latents": M}, path)
    return record
