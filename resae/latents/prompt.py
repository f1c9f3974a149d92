"""The strongest latents of every token of a prompt, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from resae.choices import Loop
from resae.latents.collect import clean_codes
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE


@dataclass(frozen=True)
class PromptLatents:
    """Strongest latents of each token and layer."""

    token_ids: list[int]
    """T tokens, BOS first where the model has one."""
    strongest: list[list[list[tuple[int, float]]]]
    """Per token and layer pairs (latent, act) by falling act; none at special tokens and sinks."""

    def latents(self) -> list[tuple[int, int]]:
        """Pairs (layer, latent) of all that occur, each once, ascending."""
        return sorted(
            {
                (layer, latent)
                for token in self.strongest
                for layer, pairs in enumerate(token)
                for latent, _ in pairs
            }
        )


def prompt_latents(
    lm: HookedLM,
    stack: ReSAE,
    input_ids: Tensor,
    n: int = 3,
    *,
    loop: Loop | str = "open",
) -> PromptLatents:
    """The n strongest latents of each token and layer of a clean pass.

    Args:
        input_ids: `[T]`.

    Raises:
        ValueError: no token that is neither special nor a sink; a stack of another model.
    """
    stack.require_model(lm)
    if not len(input_ids):
        raise ValueError("latents: the prompt has no tokens; give some text")
    tokens, codes = clean_codes(lm, stack, input_ids.unsqueeze(0), loop)
    if not len(tokens):
        raise ValueError("latents: the prompt has only special tokens; give some text")
    strongest: list[list[list[tuple[int, float]]]] = [
        [[] for _ in codes] for _ in range(len(input_ids))
    ]
    for layer, (acts, indices) in enumerate(codes):
        top = acts.topk(min(n, acts.shape[1]), dim=1)
        latents = indices.gather(1, top.indices)
        for token, values, found in zip(
            tokens.tolist(), top.values.tolist(), latents.tolist(), strict=True
        ):
            pairs = zip(found, values, strict=True)
            strongest[token][layer] = [(latent, act) for latent, act in pairs if act > 0]
    return PromptLatents(torch.as_tensor(input_ids).tolist(), strongest)
