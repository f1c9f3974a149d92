"""Result rows: the labels of methods, and selections of rows."""

from collections.abc import Iterable, Sequence

from resae.evaluation.rows import ReplacementRow

_OF_METHOD = {
    "raw": "raw SAEs",
    "raw_equal_total": "raw SAEs, equal total latents",
    "identity": "identity residual",
    "resae": "ReSAE",
    "all_previous": "all previous layers",
    **{
        f"{kind}_{map_type}": f"{label}, {map_type.replace('_', ' ')}"
        for kind, label in (("resae", "ReSAE"), ("all_previous", "all previous layers"))
        for map_type in ("scalar", "diagonal", "low_rank")
    },
    "mlsae": "MLSAE, one dictionary",
    "hierarchical": "HierarchicalTopK",
    "raw_truncated": "raw SAEs, truncated",
    "boost_base": "raw SAEs, one domain unseen",
    "boost": "SAE Boost",
    "resae_closed": "ReSAE trained in closed loop",
    "identity_closed": "identity residual trained in closed loop",
    "all_previous_closed": "all previous layers, trained in closed loop",
    "affine_only": "affine maps alone",
    "raw_matched": "raw SAEs, equal total and dictionary",
    "raw_wide": "raw SAEs, equal total, all latents in every layer",
    "resae_k_first": "ReSAE, k mostly in the first layer",
    "resae_k_falling": "ReSAE, k falling",
    "resae_k_rising": "ReSAE, k rising",
}


COMPARED = ("raw", "raw_equal_total", "raw_matched", "raw_wide", "identity", "resae")
LABELS = _OF_METHOD | {
    f"{name}_{suffix}": f"{_OF_METHOD[name]}, {text}"
    for name in COMPARED
    for suffix, text in (
        ("best_lr", "best learning rate"),
        ("long", "more tokens"),
        ("online", "tuned online"),
        ("more", "as many more steps of training"),
    )
}
"""Name of a method in result rows → its label."""


MODES = {
    "online": "online",
    "teacher_forced": "teacher-forced",
    "error_added": "error added (teacher-forced codes)",
}


def base_name(method: str) -> str:
    """Name of a method without that of its run, `resae (first)` → `resae`."""
    return method.partition(" (")[0]


def label(method: str, loop: str | None = None) -> str:
    """Label of a method, or its name where it has none; with its run and loop, if there is a
    choice."""
    base = base_name(method)
    name = f"{LABELS[base]}{method.removeprefix(base)}" if base in LABELS else method
    return f"{name}, {loop} loop" if loop else name


def mode_label(mode: str) -> str:
    """Label of a mode, or its name where it has none."""
    return MODES.get(mode, mode)


def modes_of(rows: Iterable[ReplacementRow]) -> list[str]:
    """The modes of some rows, in the order of `MODES`, unknown ones last."""
    found = {row.mode for row in rows}
    return [mode for mode in MODES if mode in found] + sorted(found - set(MODES))


def whole_selection(rows: Sequence[ReplacementRow]) -> list[ReplacementRow]:
    """The rows in which every layer that the method has is replaced."""
    most: dict[str, int] = {}
    for row in rows:
        most[row.method] = max(len(row.layers), most.get(row.method, 0))
    return [row for row in rows if len(row.layers) == most[row.method]]
