"""Our own folder of one autoencoder, whatever its kind."""

from dataclasses import replace
from pathlib import Path

from resae.interop.files import has, read_settings, setting
from resae.sae.files import load_config
from resae.sae.record import SAERecord
from resae.sae.registry import load_sae, sae_from_record
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
    metadata = setting(read_settings(path, "cfg.json"), "metadata", dict, path, {})
    return replace(
        load_sae(path).record(),
        hook_point=setting(metadata, "hook_point", str, path),
        model=setting(metadata, "model", str, path),
        metadata=setting(metadata, "imported", dict, path, {}),
    ).check(path)


def write(record: SAERecord, folder: Path, *, max_active: int | None = None) -> None:
    """Write a folder that `load_sae` reads; `max_active` as of `sae_from_record`."""
    sae = sae_from_record(record, max_active=max_active)
    further = {"imported": record.metadata} if record.metadata else {}
    sae.save(folder, hook_point=record.hook_point, model=record.model, **further)
