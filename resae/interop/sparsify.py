"""sparsify: `cfg.json` and `sae.safetensors` per hook point (`layers.6`, or `layers.6/seed0`),
those from before February 2025, which name no activation, included."""

import re
from pathlib import Path

from resae.interop.files import (
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
from resae.storage import save_json, save_tensors

WEIGHTS = "sae.safetensors"
FILES = ("cfg.json", WEIGHTS)
REFUSED = {
    "transcode": "a transcoder, which reconstructs another activation",
    "skip_connection": "a skip connection",
    "signed": "signed latents",
}


def detect(path: Path) -> bool:
    return has(path, *FILES)


def read(path: Path) -> SAERecord:
    cfg = read_settings(path, "cfg.json")
    for name, what in REFUSED.items():
        if setting(cfg, name, bool, path, False):
            raise ValueError(f"SAE {path}: {name} is true: {what} has no form here")
    activation = setting(cfg, "activation", str, path, "topk")
    if activation != "topk":
        raise ValueError(f"SAE {path}: activation {activation!r}, expected 'topk'")
    tensors = read_tensors(path, WEIGHTS)
    refuse_others(tensors, {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}, path)
    metadata = setting(cfg, "metadata", dict, path, {})
    record = SAERecord(
        weight=take(tensors, "encoder.weight", 2, path),
        bias=take(tensors, "encoder.bias", 1, path),
        W_dec=take(tensors, "W_dec", 2, path),
        b_dec=take(tensors, "b_dec", 1, path),
        k=required(cfg, "k", int, path),
        input_kind=setting(metadata, "input_kind", str, path, "activation"),
        hook_point=setting(metadata, "hook_point", str, path, _hook_point(path)),
        model=setting(metadata, "model", str, path),
        metadata=metadata,
    ).check(path)
    M, D = record.weight.shape
    latents = {"num_latents": M} if cfg.get("num_latents") else {}  # 0: expansion_factor · d_in
    require_sizes(cfg, {"d_in": D, **latents}, path)
    return record


def write(record: SAERecord, folder: Path) -> None:
    """Write a folder that sparsify loads, which has no place for a threshold."""
    if record.threshold is not None:
        raise ValueError(
            "sparsify: its autoencoders are TopK, and this one has thresholds; write saelens"
        )
    record = record.with_b_dec_subtracted()
    M, D = record.weight.shape
    tensors = {
        "encoder.weight": record.weight,
        "encoder.bias": record.bias,
        "W_dec": record.W_dec,
        "b_dec": record.b_dec,
    }
    facts = {"hook_point": record.hook_point, "model": record.model}
    save_tensors(folder / WEIGHTS, tensors)
    save_json(
        folder / "cfg.json",
        {
            "activation": "topk",
            "expansion_factor": 0,
            "normalize_decoder": True,
            "num_latents": M,
            "k": record.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": D,
            "metadata": {**record.metadata, **facts, "input_kind": record.input_kind},
        },
    )


def _hook_point(path: Path) -> str | None:
    """From the folder's name, the module whose output is encoded; a block's output by our name."""
    parts = [part for part in path.absolute().parts[-2:] if not re.fullmatch(r"seed\d+", part)]
    name = parts[-1] if parts else ""
    block = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)", name)
    if block:
        return f"blocks.{block[1]}.hook_resid_post"
    return name if re.search(r"\.\d+\.", name) else None
