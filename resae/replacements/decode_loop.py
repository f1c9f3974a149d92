"""Fast generation: static KV cache and one compiled single-token step.

    with replacement(lm, stack):
        write = DecodeLoop(lm, max_length=128)
        tokens = write(input_ids, max_new_tokens=100)

On a GPU the step runs as a CUDA graph (`torch.compile`, mode "reduce-overhead"). The model is run
as it is at each call: replaced, if that is inside a replacement.

Requirements of the graph: the tensors that a step changes stay at their addresses (keys and values:
`StaticLayer` declares it; counts: `Replacement`), nothing in a step depends on a Python number that
changes, and the output of a step is used before the next step begins. Codes are passed to
`on_codes` between two steps, outside the graph.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resae.models.hooked import HookedLM

if TYPE_CHECKING:
    from transformers import Cache

LOOK_EVERY = 16
"""Tokens between two checks whether every row has ended: a check waits for a GPU."""


class _Deferred(threading.local):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] | None = None


DEFERRED = _Deferred()
"""In each thread that runs a step, functions with their arguments that are called after it, since
no compiled graph can; None elsewhere: they are called at once."""


class DecodeLoop:
    """Generation of up to `max_length` tokens, prompt included, call after call; threads need a
    loop each.

    Args:
        lm: the model; a replacement of its layers must stay active as long as the loop is used.
        max_length: tokens per row for which the KV cache has room.
        compile: whether to compile the step. None: on a GPU. On a CPU compiling takes some seconds
            per layer and gains a few percent.
        options: further options of `torch.compile` (`backend`, `mode`, …).
    """

    def __init__(
        self,
        lm: HookedLM,
        *,
        max_length: int,
        compile: bool | None = None,
        **options: Any,
    ):
        limit = getattr(lm.config, "max_position_embeddings", None)
        if max_length < 2 or (limit is not None and max_length > limit):
            raise ValueError(
                f"DecodeLoop: max_length={max_length}, expected 2 to {limit}, the context of "
                f"{lm.name}"
            )
        self.lm = lm
        self.max_length = max_length
        self._cache: Cache | None = None
        self._rows = 0
        self._writing = threading.Lock()
        self._on_gpu = lm.device.type == "cuda"
        self._step = self._forward
        if self._on_gpu if compile is None else compile:
            if self._on_gpu:
                options = {"mode": "reduce-overhead"} | options
            self._step = torch.compile(self._forward, fullgraph=True, **options)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Tensor:
        """Continue each row.

        Args:
            input_ids: `[B, T]` prompts; shorter ones padded on the left.
            attention_mask: `[B, T]`, 0 at padding; None: there is none.
            temperature: 0 takes the most likely token.
            generator: of the sampling, on the model's device.
            stop_ids: tokens that end a row; it is filled up with the first of them.

        Returns:
            `[B, n]`, the new tokens; n ≤ max_new_tokens, fewer where all rows have ended before.

        Raises:
            ValueError: nothing to continue, no room for the text, padding on the right.
            RuntimeError: the loop is writing another text, in this thread or another.
        """
        B, T = self._check(input_ids, max_new_tokens, attention_mask)
        with self._alone():
            mask = torch.ones(B, self.max_length, dtype=torch.int64, device=input_ids.device)
            if attention_mask is not None:
                mask[:, :T] = attention_mask
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            padded = attention_mask is not None and not bool(attention_mask.all())
            cache = self._empty_cache(B)
            stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=input_ids.device)
            ended = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
            prompt_mask = mask[:, :T] if padded else None
            logits = self._run(self._forward, input_ids, positions[:, :T], prompt_mask, cache)
            tokens: list[Tensor] = []
            for i in range(max_new_tokens):
                token = _pick(logits, temperature, generator)
                if len(stops):
                    token = torch.where(ended, stops[0], token)
                    ended |= torch.isin(token, stops)
                tokens.append(token)
                last = i + 1 == max_new_tokens
                if last or (len(stops) and (i + 1) % LOOK_EVERY == 0 and bool(ended.all())):
                    break
                if self._on_gpu:
                    torch.compiler.cudagraph_mark_step_begin()
                at = positions[:, T + i : T + i + 1]
                logits = self._run(self._step, token, at, mask if padded else None, cache)
            written = torch.cat(tokens, dim=1)
            if len(stops):
                # Beyond the last row's end there is nothing but filling.
                length = int((~torch.isin(written, stops)).sum(1).max()) + 1
                written = written[:, :length]
            return written

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Hold the keys and values for one text."""
        if not self._writing.acquire(blocking=False):
            raise RuntimeError(
                "DecodeLoop: the loop is writing another text, whose keys and values it holds; "
                "make a loop for each thread"
            )
        try:
            yield
        finally:
            self._writing.release()

    def _check(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None
    ) -> tuple[int, int]:
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(
                f"DecodeLoop: input_ids has shape {list(input_ids.shape)}, expected [B, T], at "
                f"least one token per row"
            )
        B, T = input_ids.shape
        if max_new_tokens < 1 or T + max_new_tokens > self.max_length:
            raise ValueError(
                f"DecodeLoop: {T} prompt tokens and max_new_tokens={max_new_tokens}, expected at "
                f"least 1 new one and at most max_length={self.max_length} together"
            )
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"DecodeLoop: attention_mask has shape {list(attention_mask.shape)}, expected "
                    f"{[B, T]}"
                )
            if not bool(attention_mask[:, -1].all()):
                raise ValueError("DecodeLoop: padding on the right; pad prompts on the left")
        return B, T

    def _empty_cache(self, rows: int) -> "Cache":
        from transformers import Cache
        from transformers.cache_utils import StaticLayer

        if self._cache is None or rows != self._rows:
            # Layers with a sliding window are held whole too, and the mask does the window: their
            # own cache counts its tokens in Python, and a graph would be captured for each count.
            layers = [StaticLayer(self.max_length) for _ in range(self.lm.n_layers)]
            self._cache = Cache(layers=layers)  # type: ignore[arg-type]
            self._rows = rows
        else:
            self._cache.reset()
        return self._cache

    def _run(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run a step, then the calls that it deferred."""
        calls = DEFERRED.calls = []
        try:
            logits = step(*args)
        finally:
            DEFERRED.calls = None
        for function, *arguments in calls:
            if function(*arguments) is not None:
                raise ValueError(
                    "DecodeLoop: on_codes returned a code, but is called after the step, whose "
                    "code it cannot replace; return None, or write with lm.model.generate"
                )
        return logits

    def _forward(
        self, input_ids: Tensor, positions: Tensor, mask: Tensor | None, cache: "Cache"
    ) -> Tensor:
        """`[B, V]`, logits after the last of `input_ids [B, t]`."""
        out = self.lm.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **{self.lm.cache_name: cache},
        )
        return out.logits[:, -1]


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """`[B, 1]`, the next tokens."""
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)
