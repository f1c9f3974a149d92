"""Stacks to compare, and the names that result rows call them."""

from dataclasses import dataclass

from resae.choices import Loop, PredictorKind
from resae.stack.stack import AffineOnly, ReSAE

METHOD_OF_PREDICTOR: dict[str, str] = {
    PredictorKind.NONE: "raw",
    PredictorKind.IDENTITY: "identity",
    PredictorKind.PREVIOUS: "resae",
    PredictorKind.ALL_PREVIOUS: "all_previous",
}


def method_name(stack: ReSAE) -> str:
    """Default method name of a stack in result rows."""
    if stack.boosted:
        return "boost"
    if stack.shared:
        return "mlsae"
    return predictor_name(stack.predictor.kind, stack.predictor.map_type)


def predictor_name(kind: str, map_type: str) -> str:
    """Method name of a stack, or of the maps alone, with this predictor, in result rows."""
    name = METHOD_OF_PREDICTOR[kind]
    return name if map_type == "full" else f"{name}_{map_type}"


@dataclass(frozen=True)
class Method:
    """One row of a comparison."""

    name: str
    stack: ReSAE | AffineOnly
    k: int | None
    """Nominal active latents per layer; None without autoencoders."""
    subsets: tuple[tuple[str, ...], ...] = ()
    """Further sets of layers to replace teacher-forced, in addition to all of them."""

    @property
    def loops(self) -> tuple[Loop | None, ...]:
        """The loops that differ for this method; None where there is but one."""
        return tuple(Loop) if isinstance(self.stack, ReSAE) and self.stack.chained else (None,)
