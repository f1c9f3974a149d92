"""The folder of one autoencoder, `cfg.json` and `sae.safetensors`, read with its sizes checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from resae.sae.base import SAEConfig
from resae.sae.record import DTYPES
from resae.storage import load_json, load_tensors


def load_config(folder: Path) -> dict[str, Any]:
    """The settings in `cfg.json`, with `metadata` as a dictionary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not an object.
    """
    cfg = load_json(folder / "cfg.json", "SAE")
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata") or {}, dict):
        raise ValueError(f"SAE {folder}: cfg.json is not an object with settings")
    return cfg | {"metadata": cfg.get("metadata") or {}}


def sae_config(folder: Path, cfg: Mapping[str, Any]) -> SAEConfig:
    """Sizes and input of the autoencoder that `cfg.json` describes.

    Raises:
        ValueError: a size is missing or no positive whole number, or a setting is unknown.
    """
    absent = [name for name in ("d_in", "k") if name not in cfg]
    if absent:
        raise ValueError(
            f"SAE {folder}: cfg.json has no {', '.join(absent)}; expected sparsify's cfg.json"
        )
    expansion = whole_number(folder, cfg, "expansion_factor", 0)
    d_in = whole_number(folder, cfg, "d_in")
    d_sae = whole_number(folder, cfg, "num_latents", 0) or d_in * expansion
    metadata = cfg["metadata"]
    known = ("prefix_gain", "input_kind", "screening")
    options = {name: metadata[name] for name in known if name in metadata}
    return SAEConfig(d_in, d_sae, whole_number(folder, cfg, "k"), **options)


def whole_number(
    folder: Path, cfg: Mapping[str, Any], name: str, default: int | None = None
) -> int:
    """A setting that is a whole number from 0 on; None counts as left out."""
    value = cfg.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"SAE {folder}: {name} = {value!r}, expected a whole number")
    return value


def load_state(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of `sae.safetensors`, which have to be these.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has other tensors.
    """
    tensors = load_tensors(folder / "sae.safetensors", "SAE")
    found = {name: list(t.shape) for name, t in tensors.items()}
    if found != {name: list(shape) for name, shape in shapes.items()}:
        raise ValueError(
            f"SAE {folder}: tensors {found} do not fit cfg.json, expected {dict(shapes)}"
        )
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"SAE {folder}: tensors of dtype {', '.join(sorted(map(str, dtypes)))}, expected one "
            f"floating dtype for all"
        )
    return tensors
