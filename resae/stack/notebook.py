"""A stack as a small HTML table, for notebooks."""

from collections.abc import Sequence

from resae.sae.base import Autoencoder
from resae.stack.affine import AffinePredictor, sources_of
from resae_kernels.notebook import table_html


def stack_html(
    title: str,
    hook_points: Sequence[str],
    predictor: AffinePredictor,
    saes: Sequence[Autoencoder],
) -> str:
    """A row per selected layer."""
    rows: list[tuple[object, ...]] = []
    for layer, (name, sae) in enumerate(zip(hook_points, saes, strict=True)):
        sources = [hook_points[j] for j in sources_of(predictor.kind, layer)]
        sizes = (sae.config.d_in, sae.config.d_sae, sae.config.k)
        rows.append((name, ", ".join(sources) or None, sae.kind, *sizes))
    maps = f"; predictor {predictor.kind}, map type {predictor.map_type}"
    heads = ("hook point", "predicted from", "kind", "d_in", "latents", "k")
    return table_html(title + maps, heads, rows)
