"""Names that a user chooses among, in Python and on the command line.

They stand here, and not where they are used, so that the command line can read its arguments
without importing torch.
"""

from enum import StrEnum

from resae.strict_json import brief


class Choice(StrEnum):
    """A word of a closed set. It equals the plain string, which is accepted in its place."""

    __repr__ = str.__repr__

    @classmethod
    def check(cls, word: object, what: str, *others: str) -> None:
        """Raise ValueError, naming the words of the set, unless `word` is one of them.

        Args:
            what: place and name of the value, for the message.
            others: further values that are accepted, for the message.
        """
        if word not in tuple(cls):
            *most, last = [*map(repr, cls), *others]
            raise ValueError(f"{what}={brief(word)}, expected {', '.join(most)} or {last}")


class PredictorKind(Choice):
    """Sources that a layer is predicted from."""

    NONE = "none"
    IDENTITY = "identity"
    PREVIOUS = "previous"
    ALL_PREVIOUS = "all_previous"


class MapType(Choice):
    """Type of the maps of the predictors `previous` and `all_previous`."""

    FULL = "full"
    SCALAR = "scalar"
    DIAGONAL = "diagonal"
    LOW_RANK = "low_rank"


class Loop(Choice):
    """Predictions from true activations (open) or from reconstructions (closed)."""

    OPEN = "open"
    CLOSED = "closed"


class Mode(Choice):
    """Ways to replace layers (`resae.replacements.context`)."""

    ONLINE = "online"
    TEACHER_FORCED = "teacher_forced"
    ERROR_ADDED = "error_added"


class KeptError(Choice):
    """Gradient of a reconstruction's error that is kept (`resae.replacements.context`)."""

    DETACHED = "detached"
    PASS_THROUGH = "pass_through"


class Action(Choice):
    """Edits of a latent (`resae.replacements.edits`)."""

    ABLATE = "ablate"
    CLAMP = "clamp"
    SCALE = "scale"
    ADD = "add"


class Place(Choice):
    """Tokens that an edit applies to (`Edit.at`)."""

    ALL = "all"
    PROMPT = "prompt"
    LAST_PROMPT = "last_prompt"
    GENERATED = "generated"


class Effects(Choice):
    """Effects of an edit: in the input of later predictions (propagated) or not (frozen)."""

    PROPAGATED = "propagated"
    FROZEN = "frozen"


class InputKind(Choice):
    """Input of an autoencoder: the activation, or its residual."""

    ACTIVATION = "activation"
    AFFINE_RESIDUAL = "affine_residual"


class Screening(Choice):
    """Screening of latents on a CPU (`SAEConfig.screening`)."""

    STATISTICAL = "statistical"
    CERTAIN = "certain"


class Overflow(Choice):
    """Response to a token with more active latents than a code has slots: an error, or a count of
    those that are dropped."""

    RAISE = "raise"
    COUNT = "count"


class Parallelism(Choice):
    """Work of each rank: a share of every batch (data), or some layers."""

    DATA = "data"
    LAYERS = "layers"


class Objective(Choice):
    """Loss of online training: KL to the plain model, cross-entropy of the text, or neither."""

    KL = "kl"
    CE = "ce"
    MSE = "mse"


EXPORTS = ("sparsify", "saelens", "resae")
"""File formats of an autoencoder that are written."""

IMPORTS = ("resae", "saelens", "sparsify", "gemma_scope", "mlsae", "dictionary_learning", "openai")
"""File formats of an autoencoder that are read."""

OPS = ("encode", "decode", "forward", "train", "train+adam", "step", "chain", "threshold")
"""Ops that `resae profile` times."""

GPUS = ("h200", "h100", "a100")
"""Machines of its cost model."""

DTYPES = ("float32", "bfloat16", "float16")
"""Data types of weights and activations, by their names in torch."""


def check_map_type(kind: str, map_type: str, rank: int | None, what: str = "affine fit") -> None:
    """Raise ValueError unless a predictor of this kind can have maps of this type."""
    MapType.check(map_type, f"{what}: map_type")
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
