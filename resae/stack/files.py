"""The folder of a stack: `resae.json`, `affine.safetensors`, and a folder per autoencoder."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from resae.choices import PredictorKind
from resae.models.identity import ModelIdentity
from resae.models.sinks import SinkRule
from resae.sae.base import Autoencoder
from resae.sae.registry import load_sae
from resae.stack.affine import AffinePredictor
from resae.storage import load_json, require_inside, safe_file_name, save_json
from resae.strict_json import brief, require_fields

FORMAT_VERSION = 1
FILES = ["resae.json", "affine.safetensors", "*/cfg.json", "*/sae.safetensors"]
"""Files of a stack, all that is downloaded of a repository."""


class StackParts(NamedTuple):
    """The arguments of `ReSAE`."""

    hook_points: Sequence[str]
    predictor: AffinePredictor
    saes: Sequence[Autoencoder]
    """One per hook point."""
    model: ModelIdentity | None
    sinks: SinkRule | None


def write_stack(folder: Path, parts: StackParts, *, shared: bool, boosted: bool) -> None:
    """Write a stack into a folder. One with resae.json is complete: it goes first and comes
    last."""
    hook_points, predictor, saes, model, sinks = parts
    (folder / "resae.json").unlink(missing_ok=True)
    for name, sae in zip(hook_points, saes, strict=True):
        sae.save(folder / name, hook_point=name)
    predictor.save(folder / "affine.safetensors")
    save_json(
        folder / "resae.json",
        {
            "format_version": FORMAT_VERSION,
            "hook_points": list(hook_points),
            "predictor": predictor.kind,
            "map_type": predictor.map_type,
            "shared": shared,
            "boosted": boosted,
            "d_in": saes[0].config.d_in,
            "d_sae": [sae.config.d_sae for sae in saes],
            "k": [sae.config.k for sae in saes],
            "model": None if model is None else asdict(model),
            "sinks": None if sinks is None else asdict(sinks),
        },
    )


def read_stack(folder: Path) -> StackParts:
    """Read what `write_stack` wrote.

    Raises:
        FileNotFoundError: not such a folder, or a file of it is missing.
        ValueError: a file is damaged or of an unknown format.
    """
    description = _description_in(folder)
    folders = [folder / name for name in description["hook_points"]]
    for path in folders:
        require_inside(path, "stack")
    boosted = description.get("boosted", False)
    saes = [load_sae(path, "boosted" if boosted else None) for path in folders]
    predictor = AffinePredictor.load(folder / "affine.safetensors", description["predictor"])
    widths = {(sae.config.d_in, sae.W_dec.dtype) for sae in saes}
    widths |= {(len(c), c.dtype) for c in predictor.c}
    if len(widths) > 1:
        raise ValueError(
            f"stack {folder}: its autoencoders and maps are of several widths or types, "
            f"{', '.join(f'{d_in} of {dtype}' for d_in, dtype in sorted(widths, key=str))}; "
            f"restore the folder"
        )
    # Earlier versions could record boosted autoencoders as shared, which they never are.
    if description.get("shared", False) and not boosted:
        _share(saes, folder)
    model = _identity_in(description, f"stack {folder}: model in resae.json")
    sinks = _sinks_in(description, f"stack {folder}: sinks in resae.json")
    return StackParts(description["hook_points"], predictor, saes, model, sinks)


def _description_in(folder: Path) -> dict[str, Any]:
    """The content of resae.json, of the expected types."""
    found = load_json(folder / "resae.json", "stack")
    where = f"stack {folder}: resae.json"
    require_fields(found, {"format_version": (int, None)}, where)
    if found.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"stack {folder}: format_version {found.get('format_version')}, this resae reads "
            f"{FORMAT_VERSION}; update resae"
        )
    optional = dict.fromkeys(("model", "sinks"), (dict, None))
    kinds = {"hook_points": [str], "predictor": str, **optional}
    flags = {"boosted": (bool, None), "shared": (bool, None)}
    require_fields(found, kinds | flags, where)
    names = found["hook_points"]
    unsafe = [name for name in names if not safe_file_name(name)]
    if unsafe or not names or len(set(names)) < len(names):
        raise ValueError(
            f"{where}: hook_points={brief(unsafe or names)}, expected names such as "
            f"blocks.1.hook_resid_post, each once: they are folders of the stack"
        )
    PredictorKind.check(found["predictor"], f"stack {folder}: predictor")
    return found


def _identity_in(description: dict[str, Any], where: str) -> ModelIdentity | None:
    found = description.get("model")
    if found is None:
        return None
    whole = ("d_model", "n_layers", "vocab_size")
    kinds = dict.fromkeys(("name", "model_type"), str) | dict.fromkeys(whole, int)
    require_fields(found, kinds | {"revision": (str, None)}, where)
    return ModelIdentity(
        **{f.name: found[f.name] for f in fields(ModelIdentity) if f.name in found}
    )


def _sinks_in(description: dict[str, Any], where: str) -> SinkRule | None:
    """The rule of sink tokens; None in a stack that was trained without."""
    found = description.get("sinks")
    if found is None:
        return None
    require_fields(found, {"median_norms": [float], "factor": float}, where)
    norms, factor = found["median_norms"], found["factor"]
    if len(norms) != len(description["hook_points"]) or min(factor, *norms) <= 0:
        raise ValueError(
            f"{where}: {brief(found)}, expected a factor and a norm per hook point, all above 0; "
            f"restore the file"
        )
    return SinkRule(tuple(norms), factor)


def _share(saes: Sequence[Autoencoder], folder: Path) -> None:
    """Make the equal dictionaries of several files one again."""
    first = saes[0]
    for sae in saes[1:]:
        if not sae.share_dictionary(first):
            raise ValueError(
                f"stack {folder}: resae.json states that all layers share one dictionary, but "
                f"their files hold different ones; restore them"
            )
