"""Logits of part of a vocabulary, from what the model's head reads.

    logits[:, start:stop] = post(final @ weight[start:stop].T + bias[start:stop])

`post` is what some families do to logits: scale them (Cohere, Granite), cap them by tanh (Gemma-2).
With a vocabulary of 262,144 the logits of 1,024 tokens take 1 GB; what the head reads, 3 MB.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resae.models.hooked import HookedLM
from resae.models.splice import EAGER, add_function, around_in_this_thread

log = logging.getLogger(__name__)

CHECKED_TOKENS = 8
TOLERANCE = 1e-5
"""Largest difference to the model's own logits, relative to the largest of them."""


class _HeadReached(Exception):
    """Raised in place of the head's product: its input is all that is needed."""


@dataclass(frozen=True)
class Unembedding:
    """The head of a model; `unembedding_of` makes one that is checked."""

    lm: HookedLM
    path: str | None
    """Name of the head in the model; None: one of unknown form, so that passes end with whole
    logits, of which parts are taken."""
    vocabulary: int
    """Number of tokens."""

    @torch.no_grad()
    def final(self, input_ids: Tensor) -> Tensor:
        """`[B, T, D]` that the head reads at the end of one uncached pass, or whole logits
        `[B, T, V]`; without gradient. A compiled model runs uncompiled."""
        if self.path is None:
            return self.lm.logits(input_ids)
        self.lm.require_context(input_ids.shape[1])
        read: list[Tensor] = []

        def end(_forward: Callable[..., Any], final: Tensor, *_: Any, **__: Any) -> None:
            read.append(final)
            raise _HeadReached

        remove = add_function(self.lm.model, self.path, "around", 0, around_in_this_thread(end))
        try:
            with EAGER:
                self.lm.model(input_ids=input_ids, use_cache=False)
        except _HeadReached:
            pass
        finally:
            remove()
        return read[0]

    def logits(self, final: Tensor, start: int, stop: int) -> Tensor:
        """`[n, stop − start]` of `final [n, D]` (or `[n, V]`): in float32 at least, rounded to the
        model's dtype as the model rounds them."""
        if self.path is None:
            part = final[:, start:stop]
        else:
            head: Any = self.lm.model.get_submodule(self.path)
            bias = None if head.bias is None else head.bias[start:stop]
            part = self._post(nn.functional.linear(final, head.weight[start:stop], bias))
        return part if part.dtype == torch.float64 else part.float()

    def _post(self, logits: Tensor) -> Tensor:
        config = self.lm.config
        if (factor := getattr(config, "logit_scale", None)) is not None:
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


@torch.no_grad()
def unembedding_of(lm: HookedLM, input_ids: Tensor) -> Unembedding:
    """The head of a model, checked: on the first tokens of `input_ids [B, T]` its logits must be
    the model's. Otherwise passes end with whole logits, and a log line says so."""
    expected = lm.logits(input_ids[:1, :CHECKED_TOKENS])
    whole = Unembedding(lm, None, expected.shape[-1])
    path = _head_path(lm.model)
    if path is not None:
        split = Unembedding(lm, path, whole.vocabulary)
        final = split.final(input_ids[:1, :CHECKED_TOKENS]).flatten(0, 1)
        bounds = (0, whole.vocabulary // 2, whole.vocabulary)
        parts = [split.logits(final, start, stop) for start, stop in pairwise(bounds)]
        error = float((torch.cat(parts, 1) - expected.flatten(0, 1)).abs().max())
        rounding = max(TOLERANCE, 2 * torch.finfo(expected.dtype).eps)
        if error <= rounding * float(expected.abs().max()):
            return split
    log.warning(
        "model %s: its head is no product of known form, so that its logits are computed whole, "
        "which takes more memory",
        lm.name,
    )
    return whole


def _head_path(model: Any) -> str | None:
    """Path of the product with the unembedding; None: there is none, its weights are packed in
    fewer bits, or they are offloaded."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Linear) or head.weight.is_meta:
        return None
    if not head.weight.is_floating_point():
        return None
    return next((path for path, module in model.named_modules() if module is head), None)
