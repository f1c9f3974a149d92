"""Stacks to compare, and the names that result rows call them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from resae.choices import Loop, PredictorKind
from resae.stack.stack import AffineOnly, ReSAE

T = TypeVar("T")

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
    """Further sets of layers to replace, in addition to all of them: teacher-forced and, where
    that differs, online."""

    @property
    def loops(self) -> tuple[Loop | None, ...]:
        """The loops that differ for this method; None where there is but one."""
        return tuple(Loop) if isinstance(self.stack, ReSAE) and self.stack.chained else (None,)


def subsets_of(layers: Sequence[str], which: str) -> tuple[tuple[str, ...], ...]:
    """Proper subsets of the layers: `each` alone, `prefixes` (the first one, two, …), `all`, or
    `none`."""
    L = len(layers)
    if which == "each" and L > 1:
        return tuple((layer,) for layer in layers)
    if which == "prefixes":
        return tuple(tuple(layers[:n]) for n in range(1, L))
    if which == "all":
        return tuple(s for n in range(1, L) for s in combinations(layers, n))
    return ()


def known_reference(methods: Sequence[Method], reference: str | None) -> str:
    """The method that others are compared with, by default the first. Raises ValueError for one
    that is not among them."""
    names = list(dict.fromkeys(method.name for method in methods))
    if reference is not None and reference not in names:
        raise ValueError(
            f"reference {reference!r} is no method here; expected one of {', '.join(names)}"
        )
    return names[0] if reference is None else reference


def counterpart(
    k: int | None, loop: Loop | None, among: Mapping[tuple[int | None, Loop | None], T]
) -> T | None:
    """The measurement of a reference method that another is compared with: of the same k, and in
    the same loop where it has one, otherwise closed; None for none, or not one k alone.

    Args:
        k, loop: of the other method; of a method without autoencoders k is None.
        among: measurements of the reference by k and loop.
    """
    ks = {of_k for of_k, _ in among}
    if k not in ks:
        if len(ks) != 1 or None not in (k, *ks):
            return None
        (k,) = ks
    return next((among[k, of] for of in (loop, None, Loop.CLOSED) if (k, of) in among), None)
