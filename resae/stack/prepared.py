"""The online step of one layer for many tokens of the same shape, prepared once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from resae_kernels import SparseCode
from resae_kernels.screened import PreparedStep

Place = tuple[Mapping[str, Any], tuple[str, ...]]
"""A module's registry and names in it."""


class PreparedLayer:
    """The online step of a layer whose checks are made and whose objects are looked up: for a token
    of a small model these take longer than the step. It serves while every object is where it was
    found."""

    def __init__(
        self,
        places: Sequence[Place],
        step: PreparedStep,
        predict: Callable[[Sequence[Tensor]], Tensor] | None,
    ):
        self._found = [(place, n, place.get(n)) for place, names in places for n in names]
        self.is_whole = all(found is not None for *_, found in self._found)
        """True if all objects are where modules keep theirs: parametrised ones are made anew at
        each use."""
        self._step = step
        self._predict = predict

    def __call__(
        self, x: Tensor, predictor_inputs: Sequence[Tensor]
    ) -> tuple[Tensor, SparseCode] | None:
        """As `ReSAE.step`; None if an object was exchanged."""
        for place, name, found in self._found:
            if place.get(name) is not found:
                return None
        step = self._step(x, None if self._predict is None else self._predict(predictor_inputs))
        return None if step is None else (step[0], SparseCode(step[1], step[2]))
