"""Appearance of the methods in figures: the same colour, marker and dashes in every one."""

from collections.abc import Iterable

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
    """One style per method: its own, or the next one that none of the others has."""
    methods = list(dict.fromkeys(methods))
    free = [style for name, style in STYLES.items() if name not in methods] or [*STYLES.values()]
    others = [name for name in methods if name not in STYLES]
    given = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: STYLES.get(name) or given[name] for name in methods}
