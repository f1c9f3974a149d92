"""Names that a user chooses among, in Python and on the command line.

They stand here, and not where they are used, so that the command line can read its arguments
without importing torch.
"""

KINDS = ("none", "identity", "previous", "all_previous")
"""Predictors: what a layer is predicted from."""

MAP_TYPES = {
    "full": ("A",),
    "scalar": ("alpha",),
    "diagonal": ("diagonal",),
    "low_rank": ("U", "V", "skip"),
}
"""Map type → names of the tensors that one map of it has."""

WAYS = ("data", "layers")
"""Ways of parallelism: by data (each batch is shared out) or by layers."""

OPS = ("encode", "decode", "forward", "train", "train+adam", "step", "chain")
"""Ops that `resae profile` times."""

GPUS = ("h200", "h100", "a100")
"""Machines of its cost model."""

DTYPES = ("float32", "bfloat16", "float16")
"""Data types of weights and activations, by their names in torch."""


def check_map_type(kind: str, map_type: str, rank: int | None, what: str = "affine fit") -> None:
    """Raise ValueError unless a predictor of this kind can have maps of this type."""
    if map_type not in MAP_TYPES:
        raise ValueError(f"{what}: unknown map_type {map_type!r}; choose {', '.join(MAP_TYPES)}")
    if map_type != "full" and kind not in ("previous", "all_previous"):
        raise ValueError(
            f"{what}: map_type={map_type!r} for predictor {kind!r}; only 'previous' and "
            f"'all_previous' have a map type"
        )
    if (map_type == "low_rank") != (rank is not None) or (rank is not None and rank < 1):
        raise ValueError(
            f"{what}: map_type={map_type!r} with rank={rank}; expected a rank of at least 1 for "
            f"'low_rank', and none for the others"
        )
