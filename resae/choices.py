"""Names that a user chooses among, in Python and on the command line.

They stand here, and not where they are used, so that the command line can read its arguments
without importing torch.
"""

KINDS = ("none", "identity", "previous", "all_previous")
"""Predictors: what a layer is predicted from."""

FORMS = {
    "full": ("A",),
    "scalar": ("alpha",),
    "diagonal": ("diagonal",),
    "low_rank": ("U", "V", "skip"),
}
"""Form of the maps → what is stored of each."""

WAYS = ("data", "layers")
"""Ways of parallelism: by data (each batch is shared out) or by layers."""

EXPORTS = ("sparsify", "saelens", "resae")
"""File formats of an autoencoder that are written."""

IMPORTS = ("resae", "saelens", "sparsify", "gemma_scope", "mlsae", "dictionary_learning", "openai")
"""File formats of an autoencoder that are read."""

OPS = ("encode", "decode", "forward", "train", "train+adam", "step", "chain", "threshold")
"""Ops that `resae profile` times."""

GPUS = ("h200", "h100", "a100")
"""Machines of its cost model."""

DTYPES = ("float32", "bfloat16", "float16")
"""Of weights and activations, by their names in torch."""


def check_form(kind: str, form: str, rank: int | None, what: str = "affine fit") -> None:
    """Raise ValueError unless a predictor of this kind can have this form."""
    if form not in FORMS:
        raise ValueError(f"{what}: unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if form != "full" and kind not in ("previous", "all_previous"):
        raise ValueError(
            f"{what}: form={form!r} for predictor {kind!r}; only 'previous' and 'all_previous' "
            f"have forms"
        )
    if (form == "low_rank") != (rank is not None) or (rank is not None and rank < 1):
        raise ValueError(
            f"{what}: form={form!r} with rank={rank}; expected a rank of at least 1 for "
            f"'low_rank', and none for the others"
        )
