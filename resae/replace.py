"""Replace the residual stream at several layers of a running model by what a stack reconstructs.

    online          one pass; codes come from the running stream, which upstream replacements have
                    already changed; x̂_l goes in at once
    teacher_forced  codes of all layers come from the clean pass; all x̂_l go in during a second pass
    error_added     as teacher_forced, but x̂_l − x_l is added to the running stream instead

Teacher-forced, what goes in at the last layer overwrites everything before it: all layers at once
equal the last one alone, exactly. Online and error-added are the forms that see every layer.
(Online, adding the error of the running stream to that stream is replacing it.)

Online, the residual is taken against the reconstructions that were put into the stream (closed
loop); loop "open" takes it against the stream as it was before each replacement. The chain runs
through all selected layers, one token at a time, within one forward pass; nothing is kept between
decode steps but the model's own cache. `layers` chooses where its result enters the stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from resae.model import HookedLM, HookPoint
from resae.stack import AffineOnly, Loop, ReSAE

Mode = Literal["online", "teacher_forced", "error_added"]
MODES = ("online", "teacher_forced", "error_added")


@dataclass
class LayerCounts:
    """What happened at one hook point since the replacement began."""

    hook_point: str
    calls: int = 0
    """Forward passes: one for the prompt, then one per generated token."""
    replaced: int = 0
    """Tokens whose activation was replaced."""
    left: int = 0
    """Tokens left alone: special tokens and padding."""


class Replacement:
    """A replacement in force; made by `replacement`."""

    def __init__(
        self,
        lm: HookedLM,
        stack: ReSAE | AffineOnly,
        mode: Mode,
        loop: Loop,
        put_at: Sequence[HookPoint],
        replace_special: bool,
        clean: Sequence[Tensor] | None,
    ):
        self._lm = lm
        self._stack = stack
        self._mode: Mode = mode
        self._loop: Loop = loop
        self._points = [lm.hook_point(name) for name in stack.hook_points]
        self._put_at = set(put_at)
        self._replace_special = replace_special
        self._clean = clean
        self._capturing = False
        self._keep: Tensor | None = None  # [B, T, 1], where the stream is left alone
        self._seen: list[Tensor] = []  # running stream at the points passed so far
        self._x_hats: list[Tensor] = []
        self._calls = [0] * len(self._points)
        self._left = [torch.zeros((), dtype=torch.int64) for _ in self._points]
        self._tokens = [0] * len(self._points)

    @property
    def counts(self) -> list[LayerCounts]:
        """Per layer at which something is put in: calls, tokens replaced, tokens left alone."""
        return [
            LayerCounts(
                point.name, self._calls[i], self._tokens[i] - int(self._left[i]), int(self._left[i])
            )
            for i, point in enumerate(self._points)
            if point in self._put_at
        ]

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: forget the last one's chain, see which tokens are special."""
        if self._capturing:
            return
        input_ids = args[0] if args else kwargs.get("input_ids")
        self._seen, self._x_hats = [], []
        self._keep = self._kept(input_ids, kwargs)
        if self._mode == "online":
            return
        xs = self._clean
        if xs is None:
            xs = self._capture(input_ids, kwargs)
        self._seen = list(xs)
        wide = [x.to(_dtype(self._stack, x)) for x in xs]
        self._x_hats = self._stack(wide, loop=self._loop).x_hats

    def _kept(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        if self._replace_special:
            return None
        if input_ids is None:
            raise ValueError(
                "replacement: the model was called with inputs_embeds, so special tokens cannot be "
                "told; call it with input_ids, or use replace_special=True"
            )
        keep = self._lm.is_special(input_ids)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            keep = keep | (mask[:, -input_ids.shape[1] :] == 0)
        return keep.unsqueeze(-1)

    def _capture(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> list[Tensor]:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"replacement: mode {self._mode!r} needs the whole sequence in one forward pass; "
                f"use mode='online' for cached generation"
            )
        self._capturing = True
        try:
            captured = self._lm.capture(
                input_ids,  # type: ignore[arg-type]
                self._points,
                attention_mask=kwargs.get("attention_mask"),
                position_ids=kwargs.get("position_ids"),
            )
        finally:
            self._capturing = False
        return [captured[point] for point in self._points]

    def at(self, layer: int, stream: Tensor) -> Tensor | None:
        """The pass reaches selected layer `layer` with `stream [B, T, D]`; what goes on from
        there."""
        if self._capturing:
            return None
        if self._mode == "online":
            if len(self._x_hats) != layer:
                raise RuntimeError(
                    f"replacement: {self._points[layer].name} was reached outside a forward pass "
                    f"of the whole model; call the model, not its blocks"
                )
            x = stream.to(_dtype(self._stack, stream))
            seen = self._x_hats if self._loop == "closed" else self._seen
            x_hat, _ = self._stack.step(layer, x, seen, self._x_hats)
            self._seen.append(x)
            self._x_hats.append(x_hat)
        if self._points[layer] not in self._put_at:
            return None
        new = self._x_hats[layer].to(stream.dtype)
        if self._mode == "error_added":
            new = stream + (new - self._seen[layer])
        self._calls[layer] += 1
        self._tokens[layer] += stream.shape[0] * stream.shape[1]
        if self._keep is None:
            return new
        self._left[layer] = self._left[layer].to(self._keep.device) + self._keep.sum()
        return torch.where(self._keep, stream, new)


@contextmanager
def replacement(
    lm: HookedLM,
    stack: ReSAE | AffineOnly,
    *,
    mode: Mode = "online",
    loop: Loop = "closed",
    layers: Sequence[str | int] | None = None,
    replace_special: bool = False,
    clean: Sequence[Tensor] | None = None,
) -> Iterator[Replacement]:
    """While inside, every forward pass of `lm.model`, `generate` included, runs replaced.

    Args:
        lm: the model that the stack was trained on.
        stack: what reconstructs.
        mode: `online`, `teacher_forced` or `error_added` (above); only `online` with a KV cache.
        loop: `closed`: residuals against reconstructions; `open`: against true activations (online:
            against the running stream before replacement).
        layers: where reconstructions enter the stream, a subset of the stack's hook points; default
            all. The chain itself always runs through every selected layer before the last of these.
        replace_special: also replace at BOS, EOS and padding.
        clean: the clean activations `[B, T, D]` of the one batch that will be run, if at hand;
        saves
            the clean pass of the teacher-forced modes.

    Yields:
        A `Replacement`, whose `counts` tell what was replaced.

    Raises:
        ValueError: another model's stack, or one on another device; unknown mode or loop; layers
            that the stack has not.
    """
    stack.require_model(lm)
    where = _device(stack)
    if where is not None and where != lm.device:
        raise ValueError(
            f"replacement: the stack is on {where}, the model on {lm.device}; use "
            f"stack.to({str(lm.device)!r})"
        )
    if mode not in MODES:
        raise ValueError(f"replacement: mode={mode!r}, expected one of {', '.join(MODES)}")
    if loop not in ("open", "closed"):
        raise ValueError(f"replacement: loop={loop!r}, expected 'open' or 'closed'")
    points = lm.hook_points(stack.hook_points)
    put_at = points if layers is None else lm.hook_points(layers)
    for point in put_at:
        if point not in points:
            raise ValueError(
                f"replacement: the stack has no {point.name} but {', '.join(stack.hook_points)}"
            )
    active = Replacement(lm, stack, mode, loop, put_at, replace_special, clean)

    last = max(put_at)
    hooks = {
        point: (lambda stream, layer=layer: active.at(layer, stream))
        for layer, point in enumerate(points)
        if point <= last
    }
    with lm.hooked(hooks, begin=active.begin), torch.no_grad():
        yield active


def _device(stack: ReSAE | AffineOnly) -> torch.device | None:
    if isinstance(stack, ReSAE):
        return stack.sae(0).W_dec.device
    return next((c.device for c in stack.predictor.buffers()), None)


def _dtype(stack: ReSAE | AffineOnly, default: Tensor) -> torch.dtype:
    """The dtype that the stack computes in."""
    if isinstance(stack, ReSAE):
        return stack.sae(0).W_dec.dtype
    return next((c.dtype for c in stack.predictor.buffers()), default.dtype)


# -- generation ------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """A text written by the model, and what was replaced meanwhile."""

    text: str
    """Without the prompt."""
    tokens: int
    """New tokens."""
    counts: list[LayerCounts]
    """Empty for plain generation."""


def generate(
    lm: HookedLM,
    prompt: str,
    stack: ReSAE | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    loop: Loop = "closed",
) -> Generated:
    """Continue `prompt`, with every selected layer of `stack` replaced online (or none), KV cache
    on.

    Args:
        temperature: 0 picks the most likely token.
        seed: of the sampling; the global generator is left as it was.

    Raises:
        ValueError: the model has no tokenizer, or the text would outgrow its context.
    """
    if lm.tokenizer is None:
        raise ValueError(f"model {lm.name} has no tokenizer; load it with HookedLM.from_pretrained")
    ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = lm.tokenizer.bos_token_id
    ids = torch.tensor([ids if bos is None else [bos, *ids]], device=lm.device)
    limit = getattr(lm.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed "
            f"the context of {limit} tokens; shorten one"
        )
    if not ids.shape[1]:
        raise ValueError("generate: the prompt is empty and the model has no BOS; give a prompt")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)

        def run() -> Tensor:
            return lm.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=lm.tokenizer.eos_token_id,
                use_cache=True,
                **sampling,
            )

        if stack is None:
            out, counts = run(), []
        else:
            with replacement(lm, stack, loop=loop) as active:
                out = run()
            counts = active.counts
    new = out[0, ids.shape[1] :]
    return Generated(lm.tokenizer.decode(new), len(new), counts)
