"""Text from a model, with or without replaced layers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae.choices import Loop
from resae.models.hooked import HookedLM
from resae.replacements.context import replacement
from resae.replacements.counts import LayerCounts
from resae.replacements.decode_loop import DecodeLoop
from resae.replacements.edits import EditCount
from resae.stack.stack import ReSAE


class Generated(NamedTuple):
    """A text written by the model, and what was replaced meanwhile."""

    text: str
    """Without the prompt."""
    tokens: int
    """New tokens."""
    counts: list[LayerCounts]
    """Empty for plain generation."""
    ids: list[int]
    """All tokens, of BOS and prompt too."""
    edits: list[EditCount]
    """Number of changes that each edit made."""


def prompt_ids(lm: HookedLM, prompt: str, max_new_tokens: int) -> list[int]:
    """The token ids of a prompt, BOS first where the model has one.

    Raises:
        ValueError: the model has no tokenizer, the prompt no tokens, or the text would outgrow the
            model's context.
    """
    if lm.tokenizer is None:
        raise ValueError(f"model {lm.name} has no tokenizer; load it with HookedLM.from_pretrained")
    ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = lm.tokenizer.bos_token_id
    ids = ids if bos is None else [bos, *ids]
    limit = getattr(lm.config, "max_position_embeddings", None)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"context of {limit} tokens; shorten one"
        )
    if not ids:
        raise ValueError("generate: the prompt is empty and the model has no BOS; give a prompt")
    return ids


def token_id(lm: HookedLM, text: str) -> int:
    """The id of a text that is one token. Raises ValueError if it is not."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = [lm.tokenizer.decode([i]) for i in ids]
        raise ValueError(
            f"{text!r} is {len(ids)} tokens ({', '.join(map(repr, parts))}), expected one; most "
            f"words are one with a space before"
        )
    return ids[0]


def generate(
    lm: HookedLM,
    prompt: str,
    stack: ReSAE | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    loop: Loop | str = "closed",
    fast: bool = False,
    **options: Any,
) -> Generated:
    """Continue `prompt`, with every selected layer of `stack` replaced online (or none), KV cache
    on.

    Args:
        temperature: 0 picks the most likely token.
        seed: of the sampling; the global generator is left as it was.
        fast: whether to write the same tokens with a `DecodeLoop` in place of `model.generate`. On
            a GPU it compiles the step anew for every text: for many texts, use one loop yourself
            inside one replacement. It may run, count and read up to 15 steps beyond a text's end.
        options: further ones of `replacement`: interventions, on_codes, keep_error, …

    Raises:
        ValueError: the model has no tokenizer, or the text would outgrow its context; a mode that
            writes nothing; with `fast`, what the loop does not follow.
    """
    if options.get("mode", "online") != "online":
        raise ValueError(
            f"generate: mode={options['mode']!r} needs the whole text in one pass; use "
            f"mode='online'"
        )
    if fast:
        _require_fast(lm, temperature)
    ids = torch.tensor([prompt_ids(lm, prompt, max_new_tokens)], device=lm.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)

        def run() -> Tensor:
            if fast:
                write = DecodeLoop(lm, max_length=ids.shape[1] + max_new_tokens)
                stop = lm.model.generation_config.eos_token_id  # type: ignore[union-attr]
                stop_ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
                new = write(
                    ids,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    stop_ids=stop_ids,  # type: ignore[arg-type]
                )
                return torch.cat([ids, new], dim=1)
            return lm.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=lm.tokenizer.eos_token_id,
                use_cache=True,
                **sampling,
            )

        if stack is None:
            out, counts, edits = run(), [], []
        else:
            with replacement(lm, stack, loop=loop, **options) as active:
                out = run()
            counts = active.counts
            edits = [] if active.edits is None else active.edits.counts
    new = out[0, ids.shape[1] :]
    return Generated(lm.tokenizer.decode(new), len(new), counts, out[0].tolist(), edits)


# Settings of a model's own generation_config that do not change the tokens of the fast loop: those
# that `generate` sets itself, and those that are not about tokens; if greedy, cut-offs too.
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length"),
    *("max_new_tokens", "do_sample", "temperature", "top_k", "use_cache", "cache_implementation"),
    *("_from_model_config", "transformers_version", "output_attentions", "output_hidden_states"),
}


_CUT_OFFS = {"top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


def _require_fast(lm: HookedLM, temperature: float) -> None:
    """Raise ValueError where the fast loop would not write what `model.generate` writes."""
    config: Any = lm.model.generation_config
    harmless = _WITHOUT_EFFECT | (set() if temperature > 0 else _CUT_OFFS)
    for name, value in config.to_diff_dict().items():
        if name not in harmless and value is not None:
            raise ValueError(
                f"generate: fast=True follows the temperature alone, but the generation_config of "
                f"{lm.name} sets {name}={value!r}; use fast=False, or set it to None there"
            )
