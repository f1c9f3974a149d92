"""Appearance of the methods in figures: the same colour, marker and dashes in every one."""

from collections.abc import Iterable

from resae.evaluation.labels import base_name
from resae.report.charts import Style

STYLES = {
    "raw": Style("orange", "square", "8 3"),
    "raw_equal_total": Style("amber", "diamond", "2 3"),
    "identity": Style("green", "up", "9 3 2 3"),
    "resae": Style("blue", "circle"),
    "all_previous": Style("pink", "down", "5 2 1 2 1 2"),
    "affine_only": Style("grey", "cross", "1 4"),
    "mlsae": Style("sky", "right", "12 4"),
    "hierarchical": Style("black", "left", "4 4"),
    "resae_closed": Style("purple", "pentagon", "14 3"),
    "resae_online": Style("indigo", "star", "3 1"),
    "raw_matched": Style("olive", "hexagon", "6 2 1 2"),
    "raw_wide": Style("brown", "hourglass", "1 2"),
}


def styles_of(methods: Iterable[str]) -> dict[str, Style]:
    """One style per method: its own, or the marker and dashes that none of the others has, in the
    colour of its method where it is of another run."""
    methods = list(dict.fromkeys(methods))
    own: dict[str, str] = {}
    for name in methods:
        if base_name(name) in STYLES:
            own.setdefault(base_name(name), name)
    given = {name: STYLES[base] for base, name in own.items()}
    free = [style for base, style in STYLES.items() if base not in own] or [*STYLES.values()]
    for i, name in enumerate(name for name in methods if name not in given):
        style = free[i % len(free)]
        of_base = STYLES.get(base_name(name))
        given[name] = style if of_base is None else style._replace(color=of_base.color)
    return given
