"""A stack made of autoencoders that were trained apart, by any library."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resae.interop.formats import import_placed
from resae.interop.objects import import_placed_object
from resae.models.hooked import HookedLM
from resae.sae.base import Autoencoder
from resae.sae.registry import with_max_active
from resae.strict_json import brief

log = logging.getLogger(__name__)


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
        read = import_placed if isinstance(given, str | Path) else import_placed_object
        sae, place = read(given)
        if max_active is not None:
            sae = with_max_active(sae, max_active)
        if place not in (None, point.name):
            log.warning("the autoencoder for %s was trained at %s", point.name, brief(place))
        config = sae.config
        if config.input_kind != "activation":
            raise ValueError(
                f"ReSAE.from_saes: the autoencoder of {point.name} encodes residuals of a "
                f"prediction; load the stack that it belongs to (ReSAE.load)"
            )
        sae.require_finite(f"ReSAE.from_saes: the autoencoder of {point.name}")
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
