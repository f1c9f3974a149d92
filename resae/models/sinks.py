"""Sink tokens: tokens whose residual stream is many times as long as that of the others.

In many models the first token of a sequence, and a few others, carry one or two enormous entries
that attention uses as a place to look at when there is nothing to look for (attention sinks,
massive activations: arXiv 2309.17453, 2402.17762). One of them has the energy of thousands of
ordinary tokens: in a mean square or a least-squares fit there is little beside it.

The rule: a token is a sink at a layer where its norm exceeds `factor` times the median norm of that
layer, and is left alone like special tokens at all selected layers.

    clean streams      a sink at any selected layer is left out of all of them: of the maps, scales,
                       means, training batches and, by default, of the FVU
    replacement        teacher-forced and error-added the clean stream decides; online the running
                       stream, which knows only the layers so far: from the first on at which a
                       token is a sink it is left alone

Replacement leaves the first token of a sequence alone too, whatever its norm: it has nothing to
attend to but itself, and may become a sink at later layers only. In SmolLM2-135M without BOS it is
5 to 8 times as long as the median at block 7 and 125 to 150 times at block 15; replaced at block 7
it costs about one nat on every token of the row (`bench/results/real/sinks.smollm2-135m.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SINK_FACTOR = 10.0
"""Default of `SinkRule.factor`."""


@dataclass(frozen=True)
class SinkRule:
    """The rule for the streams `[..., D]` of L selected layers."""

    median_norms: tuple[float, ...]
    """Median norm of each layer, over tokens that are not special."""
    factor: float = SINK_FACTOR
    """Norm, in units of the median, above which a token is a sink."""

    @classmethod
    def measured(cls, xs: Sequence[Tensor], factor: float = SINK_FACTOR) -> "SinkRule":
        """The rule with the medians of L streams `[N, D]` of tokens that are not special.

        Raises:
            ValueError: no tokens.
        """
        if not xs or not len(xs[0]):
            raise ValueError("sink tokens: no tokens to take the median norm of; give more data")
        return cls(tuple(float(_norms(x).median()) for x in xs), factor)

    def at(self, layer: int, stream: Tensor) -> Tensor:
        """`[...]` bool: the tokens that are sinks at one layer, by its `stream [..., D]`."""
        return _norms(stream) > self.factor * self.median_norms[layer]

    def has_none(self, layer: int, stream: Tensor) -> bool:
        """True if for certain no token of `stream [..., D]` is a sink at this layer: if all tokens
        together are no longer than one may be, which up to some dozens are. Waits for the
        device."""
        return float(_norms(stream.detach().flatten())) <= self.factor * self.median_norms[layer]

    def anywhere(self, streams: Sequence[Tensor]) -> Tensor:
        """`[...]` bool: the tokens that are sinks at any layer, by L streams `[..., D]`; on the
        device of the first."""
        found = self.at(0, streams[0])
        for layer, stream in enumerate(streams[1:], start=1):
            found = found | self.at(layer, stream).to(found.device)
        return found

    def rescaled(self, factors: Sequence[float]) -> "SinkRule":
        """The same rule for streams multiplied by `factors`, one per layer."""
        norms = zip(self.median_norms, factors, strict=True)
        return SinkRule(tuple(norm * factor for norm, factor in norms), self.factor)


def _norms(x: Tensor) -> Tensor:
    """Norms along the last dimension."""
    # Half precision would overflow at 65,504: squares of massive activations are above it.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
