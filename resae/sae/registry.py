"""The kinds of autoencoders by name: a new kind is one file and one entry here."""

from collections.abc import Sequence
from pathlib import Path

from resae.sae.base import Autoencoder, SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.prefix import PrefixSAE
from resae.sae.topk import TopKSAE
from resae.storage import load_json
from resae.strict_json import brief, require_fields

KINDS: dict[str, type[Autoencoder]] = {cls.kind: cls for cls in (TopKSAE, PrefixSAE, BoostedSAE)}


def new_sae(
    config: SAEConfig, *, seed: int = 0, prefixes: Sequence[int] | None = None
) -> Autoencoder:
    """An untrained autoencoder: of several numbers of latents at once with `prefixes`."""
    if prefixes is None:
        return TopKSAE(config, seed=seed)
    return PrefixSAE(config, seed=seed, prefixes=prefixes)


def load_sae(folder: str | Path, kind: str | None = None) -> Autoencoder:
    """Read an autoencoder of whatever kind from a folder that its `save` wrote, or sparsify's.

    Args:
        kind: for folders that do not name it, those of sparsify and of earlier versions; by default
            a TopK autoencoder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of a kind that this version does not know.
    """
    file = Path(folder) / "cfg.json"
    cfg = load_json(file, "SAE") if file.is_file() else {}
    require_fields(cfg, {"metadata": (dict, None)}, f"SAE {folder}: cfg.json")
    metadata = cfg.get("metadata") or {}
    require_fields(metadata, {"kind": (str, None)}, f"SAE {folder}: metadata of cfg.json")
    name = metadata.get("kind") or kind or TopKSAE.kind
    if name not in KINDS:
        raise ValueError(
            f"SAE {folder}: kind {brief(name)}, expected one of {', '.join(KINDS)}; update resae"
        )
    return KINDS[name].load(folder)
