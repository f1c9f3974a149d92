"""Our own folder of one autoencoder, whatever its kind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from resae.interop.files import has, setting
from resae.sae.base import Autoencoder
from resae.sae.files import load_config
from resae.sae.record import SAERecord
from resae.sae.registry import (
    has_thresholds,
    load_sae,
    no_slots,
    sae_from_record,
    with_max_active,
)
from resae.storage import require_file

FILES = ("cfg.json", "sae.safetensors", "boost/cfg.json", "boost/sae.safetensors")


def detect(path: Path) -> bool:
    """sparsify's layout, and a `kind` in its metadata."""
    return has(path, *FILES[:2]) and "kind" in load_config(path)["metadata"]


def hook_point_in(path: Path) -> str | None:
    """The hook point that `cfg.json` names."""
    return setting(load_config(path)["metadata"], "hook_point", str, path)


def read(path: Path) -> SAERecord:
    for name in FILES[:2]:
        require_file(path / name, "SAE")
    hook_point, model, imported = facts(path)
    record = load_sae(path).record()
    return replace(record, hook_point=hook_point, model=model, metadata=imported).check(path)


def write(record: SAERecord, folder: Path, *, max_active: int | None = None) -> None:
    """Write a folder that `load_sae` reads; `max_active` as of `sae_from_record`."""
    sae = sae_from_record(record, max_active=max_active)
    _save(sae, folder, record.hook_point, record.model, record.metadata)


def load(path: Path, *, max_active: int | None = None) -> Autoencoder:
    """The autoencoder in a folder, of whatever kind and with all its settings.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds NaN, or `max_active` for a kind without a threshold.
    """
    sae = load_sae(path)
    if max_active is None:
        return sae
    if not has_thresholds(sae):
        raise no_slots(max_active, sae.config.k)
    return with_max_active(sae, max_active)


def rewrite(path: Path, folder: Path, *, max_active: int | None = None) -> Autoencoder:
    """Write what `load` reads into another folder; returns it."""
    sae = load(path, max_active=max_active)
    _save(sae, folder, *facts(path))
    return sae


def _save(
    sae: Autoencoder,
    folder: Path,
    hook_point: str | None,
    model: str | None,
    imported: dict[str, Any],
) -> None:
    further = {"imported": imported} if imported else {}
    sae.save(folder, hook_point=hook_point, model=model, **further)


def facts(path: Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """Hook point, model, and the metadata of the library that it came from."""
    metadata = load_config(path)["metadata"]
    return (
        setting(metadata, "hook_point", str, path),
        setting(metadata, "model", str, path),
        setting(metadata, "imported", dict, path, {}),
    )
