"""The folder of one autoencoder, `cfg.json` and `sae.safetensors`, read with its sizes checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from resae.sae.base import SAEConfig
from resae.storage import FLOATS, load_header, load_json, load_tensors
from resae.strict_json import brief, require_fields

CFG = {"d_in": int, "k": int, "activation": (str, None)} | {
    "num_latents": (int, None),
    "expansion_factor": (int, None),
}
"""Entries of cfg.json that are read, beside `metadata`."""
SETTINGS = {"prefix_gain": (float, None), "input_kind": (str, None), "screening": (str, None)}
"""Settings of `SAEConfig` among its metadata."""


def load_config(folder: Path) -> dict[str, Any]:
    """The settings in `cfg.json`, with `metadata` as a dictionary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not an object.
    """
    cfg = load_json(folder / "cfg.json", "SAE")
    require_fields(cfg, {"metadata": (dict, None)}, f"SAE {folder}: cfg.json")
    metadata = cfg.get("metadata") or {}
    require_fields(metadata, {"kind": (str, None)}, f"SAE {folder}: metadata of cfg.json")
    return cfg | {"metadata": metadata}


def sae_config(folder: Path, cfg: Mapping[str, Any]) -> SAEConfig:
    """Sizes and input of the autoencoder that `cfg.json` describes.

    Raises:
        ValueError: a size is missing or no positive whole number, or a setting is unknown.
    """
    require_fields(dict(cfg), CFG, f"SAE {folder}: cfg.json")
    metadata = require_fields(cfg["metadata"], SETTINGS, f"SAE {folder}: metadata of cfg.json")
    options = {name: v for name in SETTINGS if (v := metadata.get(name)) is not None}
    if "screening" in metadata:  # null means: no screening
        options["screening"] = metadata["screening"]
    d_in = cfg["d_in"]
    d_sae = cfg.get("num_latents") or d_in * (cfg.get("expansion_factor") or 0)
    return SAEConfig(d_in, d_sae, cfg["k"], **options)


def load_state(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of `sae.safetensors`, which have to be these, of one floating type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has other tensors.
    """
    header = load_header(folder / "sae.safetensors", "SAE")
    expected = {name: list(shape) for name, shape in shapes.items()}
    dtypes = set(header.dtypes.values())
    if header.shapes != expected or len(dtypes) != 1 or not dtypes <= set(FLOATS):
        found = {name: [header.dtypes[name], *shape] for name, shape in header.shapes.items()}
        raise ValueError(
            f"SAE {folder}: tensors {brief(found)} do not fit cfg.json, expected one floating "
            f"dtype and {expected}"
        )
    return load_tensors(folder / "sae.safetensors", "SAE")
