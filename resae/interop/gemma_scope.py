"""Gemma Scope: `layer_20/width_16k/average_l0_71/params.npz`, JumpReLU that reads x itself."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from resae.interop.files import has, read_npz, refuse_others, take
from resae.sae.record import SAERecord

WEIGHTS = "params.npz"
FILES = (WEIGHTS,)
SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out"}


def detect(path: Path) -> bool:
    return path.suffix == ".npz" or has(path, WEIGHTS)


def read(path: Path) -> SAERecord:
    file = path / WEIGHTS if path.is_dir() else path
    name = file.absolute().as_posix()
    for word in ("transcoder", "embedding"):
        if word in name:
            raise ValueError(
                f"SAE {file}: {word}s of Gemma Scope have no form here; expected an autoencoder "
                f"of a layer"
            )
    arrays = {re.sub("^w_", "W_", key): array for key, array in read_npz(file).items()}
    factor = arrays.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise ValueError(f"SAE {file}: scaling_factor differs from 1, which has no form here")
    refuse_others(arrays, {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}, file)
    record = SAERecord(
        weight=take(arrays, "W_enc", 2, file).T,
        bias=take(arrays, "b_enc", 1, file),
        W_dec=take(arrays, "W_dec", 2, file),
        b_dec=take(arrays, "b_dec", 1, file),
        threshold=take(arrays, "threshold", 1, file),
        apply_b_dec_to_input=False,
    ).check(file)
    return _described(record, name)


def _described(record: SAERecord, name: str) -> SAERecord:
    """The record with what the file's path tells of it."""
    layer, l0 = re.search(r"layer_(\d{1,4})\b", name), re.search(r"average_l0_(\d{1,6})\b", name)
    site = re.search(r"gemma-scope-[\w.-]*-(res|mlp)\b", name)
    hook = SITES[site[1]] if site else None
    mean = int(l0[1]) if l0 else None
    return replace(
        record,
        k=mean if mean and mean <= record.weight.shape[0] else None,
        hook_point=f"blocks.{layer[1]}.{hook}" if layer and hook else None,
        metadata={"average_l0": mean, "layer": int(layer[1]) if layer else None},
    )
