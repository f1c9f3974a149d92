"""A stack made of autoencoders that were trained apart, by any library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resae.interop.formats import import_sae
from resae.interop.objects import import_object
from resae.models.hooked import HookedLM
from resae.sae.base import Autoencoder


def autoencoders_of(
    saes: Mapping[str | int, Any], lm: HookedLM, max_active: int | None
) -> dict[str, Autoencoder]:
    """Autoencoders by hook point, in the order of the forward pass; arguments and errors as of
    `ReSAE.from_saes`."""
    if not isinstance(saes, Mapping) or not saes:
        raise TypeError("ReSAE.from_saes: expected {hook point: path or autoencoder}, at least one")
    points = {lm.hook_point(name): given for name, given in saes.items()}
    if len(points) < len(saes):
        raise ValueError(f"ReSAE.from_saes: {len(saes)} names are of {len(points)} hook points")
    found: dict[str, Autoencoder] = {}
    for point in sorted(points):
        given = points[point]
        sae = (
            import_sae(given, max_active=max_active)
            if isinstance(given, str | Path)
            else import_object(given, max_active=max_active)
        )
        config = sae.config
        if config.input_kind != "activation":
            raise ValueError(
                f"ReSAE.from_saes: the autoencoder of {point.name} encodes residuals of a "
                f"prediction; load the stack that it belongs to (ReSAE.load)"
            )
        if config.d_in != lm.d_model:
            raise ValueError(
                f"ReSAE.from_saes: the autoencoder of {point.name} has width {config.d_in}, the "
                f"stream of {lm.name} has {lm.d_model}"
            )
        found[point.name] = sae
    kinds = {sae.W_dec.dtype for sae in found.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"ReSAE.from_saes: autoencoders of {', '.join(sorted(map(str, kinds)))}; convert them "
            f"to one dtype"
        )
    return found
