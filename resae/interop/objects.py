"""Autoencoders of other libraries that are in memory: saved by the library itself, and imported."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from resae.interop.formats import import_placed
from resae.sae.base import Autoencoder
from resae.sae.registry import with_max_active


def import_object(sae: Any, *, max_active: int | None = None) -> Autoencoder:
    """An autoencoder of SAELens, sparsify or dictionary_learning as one of ours, a copy in eval
    mode; one of ours is returned as it is, or a copy with `max_active`.

    Args:
        max_active: slots of a code, for kinds with a threshold (`ThresholdSAE`).

    Raises:
        TypeError: an object of another kind.
        ValueError: a setting has no form here; the message names it.
    """
    return import_placed_object(sae, max_active)[0]


def import_placed_object(sae: Any, max_active: int | None = None) -> tuple[Autoencoder, str | None]:
    """As `import_object`, and the hook point that the library's object names."""
    if isinstance(sae, Autoencoder):
        return (sae if max_active is None else with_max_active(sae, max_active)), None
    library = type(sae).__module__.split(".")[0]
    if library not in _SAVE:
        raise TypeError(
            f"got {type(sae).__module__}.{type(sae).__qualname__}, expected an autoencoder of "
            f"resae, SAELens, sparsify or dictionary_learning, or a path of one"
        )
    format, save = _SAVE[library]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / type(sae).__name__  # messages name it
        folder.mkdir()
        save(sae, folder)
        try:
            return import_placed(folder, format, max_active=max_active)
        except ValueError as error:
            name = f"{type(sae).__module__}.{type(sae).__qualname__}"
            raise ValueError(str(error).replace(str(folder), name)) from None


def _save_dictionary(sae: Any, folder: Path) -> None:
    """As the trainers of dictionary_learning do, with the class that tells TopK from BatchTopK."""
    torch.save(sae.state_dict(), folder / "ae.pt")
    settings = {"trainer": {"dict_class": type(sae).__name__}}
    (folder / "config.json").write_text(json.dumps(settings))


_SAVE: dict[str, tuple[str, Any]] = {
    "sae_lens": ("saelens", lambda sae, folder: sae.save_model(folder)),
    "sparsify": ("sparsify", lambda sae, folder: sae.save_to_disk(folder)),
    "dictionary_learning": ("dictionary_learning", _save_dictionary),
}
"""Per library the format of its files, and how one is written."""
