"""Effects of edited latents on later layers, measured and predicted."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resae.evaluation.rows import EffectRow
from resae.models.hooked import HookedLM
from resae.replacements.context import replacement
from resae.replacements.edits import Interventions, predicted_effects
from resae.stack.stack import ReSAE


@torch.no_grad()
def edit_effects(
    lm: HookedLM,
    stack: ReSAE,
    input_ids: Tensor,
    interventions: Any,
    *,
    prompt_tokens: int | None = None,
    **options: Any,
) -> list[EffectRow]:
    """Compare the measured effects of edits on the stream at later selected layers with those that
    the transported directions predict (`resae.predicted_effects`).

    The tokens are run twice, replaced without and with the edits, error and all else alike.

    Args:
        input_ids: `[B, T]`, no padding.
        prompt_tokens: length of the prompt in each row; later tokens continue the KV cache as
            generated ones do. Default: the whole row is the prompt.
        options: further ones of `replacement`.

    Returns:
        One row per later selected layer that a prediction reaches.
    """
    asked = Interventions.parse(interventions)
    T = input_ids.shape[1]
    parts = input_ids.to(lm.device).split(
        [prompt_tokens, T - prompt_tokens] if prompt_tokens else T, 1
    )
    points = lm.hook_points(stack.hook_points)
    plain, _ = _arrivals(lm, stack, parts, replace(asked, edits=()), options)
    edited, predicted = _arrivals(lm, stack, parts, asked, options)
    rows: list[EffectRow] = []
    for layer, point in enumerate(points):
        real = (edited[layer] - plain[layer]).double()
        here = predicted[layer].double().to(real.device)
        reached = here.norm(dim=-1) > 0
        if reached.any():
            real, here = real[reached], here[reached]
            rows.append(
                EffectRow(
                    hook_point=point.name,
                    tokens=len(real),
                    cosine=float(torch.cosine_similarity(here, real, dim=-1).mean()),
                    norm_ratio=float(here.norm() / real.norm()),
                    relative_error=float((here - real).norm() / real.norm()),
                )
            )
    return rows


def _arrivals(
    lm: HookedLM,
    stack: ReSAE,
    parts: Sequence[Tensor],
    interventions: Interventions,
    options: dict[str, Any],
) -> tuple[list[Tensor], list[Tensor]]:
    """The stream at each selected layer before its replacement, and the predicted change in it
    from edits of earlier layers: `[B, T, D]` each."""
    arrived: list[list[Tensor]] = [[] for _ in stack.hook_points]
    predicted: list[list[Tensor]] = [[] for _ in stack.hook_points]
    record = {
        point: arrived[layer].append
        for layer, point in enumerate(lm.hook_points(stack.hook_points))
    }
    # Hooks at one point run in the order they came: these see the stream before it is replaced.
    with (
        lm.hooked(record),
        replacement(lm, stack, interventions=interventions, **options) as active,
    ):
        cache = None
        for part in parts:
            cache = lm.model(part, use_cache=True, **{lm.cache_name: cache})[lm.cache_name]
            changes = [None] * stack.n_layers if active.edits is None else active.edits.changes
            for layer, effect in enumerate(predicted_effects(stack, changes)):
                own = changes[layer]
                if effect is None:
                    effect = torch.zeros_like(arrived[layer][-1])
                elif own is not None:
                    effect = effect - own.delta
                predicted[layer].append(effect)
    return [torch.cat(xs, 1) for xs in arrived], [torch.cat(xs, 1) for xs in predicted]
