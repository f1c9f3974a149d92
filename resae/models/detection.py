"""Hook points of a model whose architecture has no entry in `FAMILIES`, found by its shape.

A list of blocks in which every block has a submodule named as attention and one named as an MLP is
a candidate; a pass over a few random tokens decides whether, and after which norms, the sum
`resid_post ≈ resid_pre + attn_out + mlp_out` holds.
"""

import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from resae.models.families import Family, text_config
from resae.models.splice import EAGER

log = logging.getLogger(__name__)

ATTENTION = ("self_attn", "self_attention", "attention", "attn")
MLP = ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe", "fc2")
AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm", "post_attention_norm")
"""Norms of the output of attention in some families; in others of the input of the MLP."""
AFTER_MLP = ("post_mlp_layernorm", "post_feedforward_layernorm", "post_ffw_norm")

TOKENS = 8
"""Length of the one row of random tokens."""


def detect(model: Any, name: str) -> Family:
    """The entry that fits a model without one; a log line says which.

    The sum is checked by passes over `TOKENS` random tokens, one per candidate and two more,
    without gradient and in evaluation mode; a model on the meta device has the most likely entry,
    unchecked. Neither the model nor the state of the random number generators changes.

    Raises:
        ValueError: nothing fits; the message has the entry to write, as far as it was found.
    """
    candidates = _candidates(model)
    if not candidates:
        entry = Family(blocks="?", attn_out="?", mlp_out="?")
        reason = "no list of blocks has an attention and an MLP in each block"
        raise ValueError(_to_write(model, name, entry, reason))
    if all(parameter.is_meta for parameter in model.parameters()):
        return candidates[0]
    family, error = _closest(model, name, candidates)
    if not error <= 1:  # also where the error is NaN
        reason = (
            f"resid_post differs from resid_pre + attn_out + mlp_out by {error:.2g} times the "
            f"error of rounding"
        )
        raise ValueError(_to_write(model, name, family, reason))
    log.warning(
        "model %s: architecture %r has no entry in FAMILIES; its blocks fit %s",
        name,
        model.config.model_type,
        entry_text(model.config.model_type, family),
    )
    return family


def entry_text(model_type: str, family: Family) -> str:
    """A line of `FAMILIES`: the fields that differ from their defaults."""
    default = Family(blocks="", attn_out="", mlp_out="")
    fields = {key: value for key, value in vars(family).items() if value != vars(default)[key]}
    return f'"{model_type}": Family({", ".join(f"{k}={v!r}" for k, v in fields.items())})'


def _to_write(model: Any, name: str, family: Family, reason: str) -> str:
    kind = model.config.model_type
    return (
        f"model {name}: architecture {kind!r} has no entry in "
        f"resae.models.families.FAMILIES and fits no known shape ({reason}); add "
        f"{entry_text(kind, family)} with the right submodules"
    )


def _candidates(model: Any) -> list[Family]:
    """Entries that the names of submodules allow, the most likely one first."""
    config, root = text_config(model.config), _inside_wrappers(model)
    lists = [
        (path, blocks)
        for path, blocks in root.named_modules()
        if isinstance(blocks, nn.ModuleList) and "." in path and len(blocks)
    ]
    layers = getattr(config, "num_hidden_layers", None)
    nested = config is not model.config  # the text model is in one with vision
    scale = "residual_multiplier" if hasattr(config, "residual_multiplier") else None
    found = []
    for path, blocks in lists:
        if layers is not None and len(blocks) != layers:
            continue
        inside = set.intersection(*(set(dict(block.named_children())) for block in blocks))
        attention = [name for name in (*AFTER_ATTENTION, *ATTENTION) if name in inside]
        mlp = [name for name in (*AFTER_MLP, *MLP) if name in inside]
        if inside.isdisjoint(ATTENTION) or inside.isdisjoint(MLP):
            continue
        if inside.isdisjoint(AFTER_MLP):  # then the norm is that of the MLP's input
            attention.sort(key=lambda name: name in AFTER_ATTENTION)
        base = path.partition(".")[0] if nested else None
        found += [Family(path, a, m, scale=scale, base=base) for a, m in product(attention, mlp)]
    return found


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """The causal LM of transformers in a wrapper such as PEFT's, or the model itself."""
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _closest(model: Any, name: str, candidates: list[Family]) -> tuple[Family, float]:
    """The candidate whose sum is closest, and its error (of `_error`)."""
    config = text_config(model.config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(config.vocab_size), (1, TOKENS), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    root = _inside_wrappers(model)
    results: list[tuple[float, Family]] = []
    with _evaluation(model), EAGER, torch.no_grad():
        for family in candidates:
            try:
                parts = _parts(model, root, family, ids)
            except KeyError:  # blocks that a pass over text does not reach, as a vision tower's
                continue
            except (TypeError, RuntimeError, ValueError, IndexError) as error:
                reason = f"a pass over {TOKENS} tokens failed: {error}".splitlines()[0]
                raise ValueError(_to_write(model, name, family, reason)) from error
            scale = 1.0 if family.scale is None else float(getattr(config, family.scale))
            family = replace(family, flat_mlp=parts[0][2].ndim < parts[0][3].ndim)
            results.append((_error(parts, scale), family))
        if not results:
            reason = f"a pass over {TOKENS} tokens does not reach its blocks"
            raise ValueError(_to_write(model, name, candidates[0], reason))
        error, family = min(results, key=lambda result: result[0])
        parallel = _is_parallel(model, root, family, ids)
    return replace(family, parallel=parallel), error


def _parts(
    model: nn.Module, root: nn.Module, family: Family, ids: Tensor, gain: float = 1.0
) -> list[tuple[Tensor, ...]]:
    """`resid_pre, attn_out, mlp_out, resid_post` per block of one pass in which attn_out of the
    first block is multiplied by `gain`."""
    blocks: Any = root.get_submodule(family.blocks)
    kept: list[dict[str, Tensor]] = [{} for _ in blocks]

    def read(key: str, at: dict[str, Tensor], _module: Any, args: Any, kwargs: Any) -> None:
        at[key] = args[0] if args else kwargs["hidden_states"]

    def keep(key: str, at: dict[str, Tensor], _module: Any, _args: Any, output: Any) -> None:
        at[key] = output[0] if isinstance(output, tuple) else output

    def multiply(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] * gain, *output[1:]) if isinstance(output, tuple) else output * gain

    with ExitStack() as hooks:
        for at, block in zip(kept, blocks, strict=True):
            attention, mlp = (block.get_submodule(p) for p in (family.attn_out, family.mlp_out))
            for handle in (
                block.register_forward_pre_hook(partial(read, "pre", at), with_kwargs=True),
                attention.register_forward_hook(partial(keep, "attn", at)),
                mlp.register_forward_hook(partial(keep, "mlp", at)),
                block.register_forward_hook(partial(keep, "post", at)),
            ):
                hooks.callback(handle.remove)
        first = blocks[0].get_submodule(family.attn_out)
        hooks.callback(first.register_forward_hook(multiply).remove)
        model(input_ids=ids, use_cache=False)
    return [(at["pre"], at["attn"], at["mlp"], at["post"]) for at in kept]


def _error(parts: list[tuple[Tensor, ...]], scale: float) -> float:
    """Largest difference between resid_post and the sum over blocks, as a multiple of what rounding
    may do; at most a tenth of what attention or MLP adds counts as that."""
    errors = []
    for pre, attention, mlp, post in (tuple(t.cpu() for t in block) for block in parts):
        if not pre.numel() == attention.numel() == mlp.numel() == post.numel():
            return float("inf")
        attention, mlp = (scale * added.reshape(post.shape) for added in (attention, mlp))
        # In the dtype of the model and both orders: in bfloat16 a sum of higher precision differs
        # from resid_post by more than a small addition that was overlooked.
        sums = ((pre + attention) + mlp, pre + (attention + mlp))
        error = min(float((post - total).double().norm()) for total in sums)
        size = sum(float(term.double().norm()) for term in (pre, attention, mlp))
        smaller = min(float(added.double().norm()) for added in (attention, mlp))
        rounding = min(2 * torch.finfo(post.dtype).eps * size, 0.1 * smaller)
        errors.append(error / rounding if error else 0.0)
    return max(errors)


def _is_parallel(model: nn.Module, root: nn.Module, family: Family, ids: Tensor) -> bool:
    """True if the MLP of the first block does not depend on the output of attention."""
    clean, moved = (_parts(model, root, family, ids, gain)[0][2] for gain in (1.0, 3.0))
    return torch.equal(clean, moved)


@contextmanager
def _evaluation(model: nn.Module) -> Generator[None]:
    """Evaluation mode, in which no module draws random numbers; each is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
