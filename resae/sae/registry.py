"""The kinds of autoencoders by name: a new kind is one file and one entry here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from resae.sae.base import Autoencoder, SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.files import load_config
from resae.sae.prefix import PrefixSAE
from resae.sae.record import SAERecord
from resae.sae.threshold import ThresholdSAE
from resae.sae.topk import TopKSAE
from resae.strict_json import brief

KINDS: dict[str, type[Autoencoder]] = {
    cls.kind: cls for cls in (TopKSAE, PrefixSAE, BoostedSAE, ThresholdSAE)
}


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
    metadata = load_config(file.parent)["metadata"] if file.is_file() else {}
    name = metadata.get("kind") or kind or TopKSAE.kind
    if name not in KINDS:
        raise ValueError(
            f"SAE {folder}: kind {brief(name)}, expected one of {', '.join(KINDS)}; update resae"
        )
    return KINDS[name].load(folder)


def has_thresholds(sae: Autoencoder) -> bool:
    """True for a kind whose latents are active above a threshold, in place of TopK."""
    return isinstance(sae, ThresholdSAE)


def with_max_active(sae: Autoencoder, max_active: int) -> Autoencoder:
    """A threshold autoencoder with codes of `max_active` slots, all else as it was; another kind
    as it is."""
    if not isinstance(sae, ThresholdSAE):
        return sae
    twin = ThresholdSAE.from_record(sae.record(), max_active=max_active)
    twin.config = replace(sae.config, k=max_active)
    twin.on_overflow = sae.on_overflow
    twin.screening_implementation = sae.screening_implementation
    return twin


def sae_from_record(record: SAERecord, *, max_active: int | None = None) -> Autoencoder:
    """The autoencoder of a record, in eval mode: with a threshold, or else TopK.

    Args:
        max_active: `ThresholdSAE.from_record`'s.
    """
    if record.threshold is not None:
        return ThresholdSAE.from_record(record, max_active=max_active)
    if max_active is not None:
        raise no_slots(max_active, record.k)
    return TopKSAE.from_record(record)


def no_slots(max_active: int, k: int | None) -> ValueError:
    """The error of `max_active` for an autoencoder whose codes have k slots by its definition."""
    return ValueError(
        f"max_active={max_active} for a TopK autoencoder of k={k}; leave it out, or lower k with "
        f"at_k"
    )
