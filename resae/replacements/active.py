"""The active replacement: what it does in every forward pass of the model.

The state of a pass (tokens left alone, reconstructions so far) belongs to the pass, counts to a
thread. Modes and their mathematics: `resae.replacements.context`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resae.models.hooked import HookedLM, cache_of, type_name
from resae.models.points import HookPoint
from resae.replacements.counts import LayerCounts, PassCounts
from resae.replacements.decode_loop import DEFERRED
from resae.replacements.edits import ActiveEdits, Change, PassTokens
from resae.replacements.settings import Settings
from resae.stack.stack import AffineOnly, ReSAE
from resae.threads import PerThread
from resae_kernels import SparseCode, Transported
from resae_kernels.step import FEW_TOKENS


@dataclass
class _Pass:
    """State of one forward pass of the whole model."""

    skip: Tensor | None
    """`[B, T, 1]` bool, special tokens and padding; None: none."""
    sinks: Tensor | None
    """`[B, T, 1]` bool, sink tokens found so far that are not among those; None: none."""
    tokens: PassTokens | None
    """Tokens of this pass, among which edits look for theirs; None without edits."""
    predictor_inputs: list[Tensor]
    """Running stream at the selected layers passed so far, from which later ones are predicted in
    open loop; in modes of two passes the clean stream at all layers."""
    x_hats: list[Tensor]
    """Reconstructions of the selected layers passed so far; of two passes of all."""
    changes: list[Change | None]
    """Change added by edits at each selected layer."""
    codes: list[SparseCode] = field(default_factory=list)
    """Codes of the layers passed so far, where dictionaries are transported."""
    tally: Tensor | None = None
    """`[4]` calls, tokens, tokens skipped, sinks; the same until further sinks are found."""

    @property
    def left_alone(self) -> Tensor | None:
        """`[B, T, 1]` bool, tokens whose stream is not replaced; None: none."""
        if self.sinks is None or self.skip is None:
            return self.skip if self.sinks is None else self.sinks
        return self.skip | self.sinks


class _ThreadState:
    """Pass and counts of one thread."""

    def __init__(self, n_layers: int, device: torch.device):
        self.current: _Pass | None = None
        """The pass that this thread runs; None outside a pass."""
        self.capturing = False
        """True while this thread runs the clean pass of a mode of two passes."""
        # [2, 4] per layer, (prefill, decode) by (calls, tokens, skipped, sinks), so that counting
        # waits for no GPU, recompiles nothing and goes on in a replayed graph. Each thread has its
        # own: an addition to a tensor is not atomic. (`inference_mode` would make tensors that
        # later passes outside it could not change.)
        with torch.inference_mode(False):
            self.counts = [
                torch.zeros(2, 4, dtype=torch.int64, device=device) for _ in range(n_layers)
            ]
        # The same of passes on a CPU that are not compiled.
        self.host_counts = [[[0, 0, 0, 0], [0, 0, 0, 0]] for _ in range(n_layers)]

    def totals(self, layer: int) -> Tensor:
        """`[2, 4]` on the CPU: (prefill, decode) by (calls, tokens, skipped, sinks)."""
        return self.counts[layer].cpu() + torch.tensor(self.host_counts[layer])


class Replacement:
    """An active replacement; made by `replacement`. As a context manager it is removed on exit,
    and what the calling thread runs inside runs without gradient, unless it was made with
    `gradient=True`.

    The state of a pass belongs to the pass: any number of threads may run the model at a time. A
    pass during which the replacement is removed, or that began before it, ends in a RuntimeError.
    """

    def __init__(
        self,
        lm: HookedLM,
        stack: ReSAE | AffineOnly,
        settings: Settings,
        edits: ActiveEdits | None,
        transported: Transported | None,
    ):
        self._lm = lm
        self._stack = stack
        self._mode = str(settings.mode)  # plain, as torch.compile compares it
        self._loop = str(settings.loop)
        self._points = [lm.hook_point(name) for name in stack.hook_points]
        self._writes = [point in settings.write_points for point in self._points]
        self._last = self._points.index(max(settings.write_points))
        self._clean = settings.clean
        self._keep_error = settings.keep_error and str(settings.keep_error)
        self._gradient = settings.gradient
        self.edits = edits
        """The active interventions, with counts of their changes; None without any."""
        self._propagates = settings.interventions.effects == "propagated"
        self._on_codes = settings.on_codes
        self._transported = transported
        self._reads_codes = settings.needs_codes or transported is not None
        self._device_refs = [device_ref(stack, layer) for layer in range(len(self._points))]
        self._spread = len({ref.device for ref in self._device_refs if ref is not None}) > 1
        self._special = None  # [S] ids of special tokens, made once: a copy to a GPU waits for it
        if not settings.replace_special:
            self._special = torch.tensor(lm.special_ids, dtype=torch.int64, device=lm.device)
        self._special_ids = frozenset(lm.special_ids)
        self._sinks = None if settings.replace_special else stack.sinks
        self._in_force = ExitStack()
        self._no_grad = ExitStack()
        self._removed = False
        self._threads = PerThread(partial(_ThreadState, len(self._points), lm.device))
        # A CUDA graph knows addresses, not tensors: `torch.compile` copies each input to an address
        # of the graph's own at every replay, and makes no graph at all where a pass writes to an
        # input, but for inputs that it takes to stay where they are. It takes to stay whatever it
        # reaches through a module: these counts, dictionaries and edits too, by the forward of the
        # stand-ins that hold them (`model._Splice`). So they are written in place and never made
        # anew while the model runs; a test looks at the compiled step's inputs.

    def __repr__(self) -> str:
        layers = ", ".join(
            point.name for point, writes in zip(self._points, self._writes, strict=True) if writes
        )
        state = "removed" if self._removed else "active"
        return (
            f"Replacement({state} at {layers} of {self._lm.name!r}, mode={self._mode!r}, "
            f"loop={self._loop!r}, keep_error={self._keep_error!r}, "
            f"edits={0 if self.edits is None else len(self.edits.edits)})"
        )

    @property
    def counts(self) -> list[LayerCounts]:
        """Per layer that is replaced: calls, tokens replaced, tokens skipped, sinks."""
        counts = []
        for layer, point in enumerate(self._points):
            if self._writes[layer]:
                sums = sum(thread.totals(layer) for thread in self._threads)
                assert isinstance(sums, Tensor)
                kinds = [
                    PassCounts(calls, tokens - skipped - sinks, skipped, sinks)
                    for calls, tokens, skipped, sinks in sums.tolist()
                ]
                counts.append(LayerCounts(point.name, *kinds))
        return counts

    def assert_replaced(
        self, *, decode_steps: int | None = None, layers: Sequence[str | int] | None = None
    ) -> None:
        """Check, in tests of code that uses a replacement, that it did replace tokens.

        Args:
            decode_steps: how many single-token passes each layer must have run, with tokens
                replaced in them; default: any number.
            layers: layers to check; default all that are replaced.

        Raises:
            AssertionError: naming the first layer that was never reached, whose tokens were all
                left alone, or whose decode steps were not all run and replaced.
        """
        counts = {count.hook_point: count for count in self.counts}
        names = list(counts) if layers is None else [p.name for p in self._lm.hook_points(layers)]
        for name in names:
            count = counts.get(name)
            if count is None:
                raise AssertionError(f"{name}: nothing is put in there, only at {list(counts)}")
            if not count.calls:
                raise AssertionError(f"{name} was never reached by a forward pass")
            if not count.replaced:
                raise AssertionError(
                    f"{name} was reached by {count.calls} passes, but all "
                    f"{count.skipped + count.sinks} tokens were left alone as special, padding or "
                    f"sinks"
                )
            if decode_steps is None:
                continue
            if count.decode.calls != decode_steps:
                raise AssertionError(
                    f"{name} saw {count.decode.calls} decode steps, expected {decode_steps}"
                )
            if decode_steps and not count.decode.replaced:
                raise AssertionError(
                    f"{name}: no token of its {decode_steps} decode steps was replaced; all "
                    f"{count.decode.skipped + count.decode.sinks} were left alone as special, "
                    f"padding or sinks"
                )

    def start(self, in_force: ExitStack) -> None:
        """Begin to replace, as `replacement` does once; `in_force` is closed on removal."""
        in_force.enter_context(self._lm.hooked(self._hooks(), around=self._run))
        self._in_force = in_force.pop_all()

    def remove(self) -> None:
        """Restore the model. A second call does nothing."""
        self._removed = True
        self._in_force.close()

    def __enter__(self) -> "Replacement":
        if self._removed:
            raise RuntimeError("this replacement was removed; make a new one")
        if not self._gradient:
            self._no_grad.enter_context(torch.no_grad())
        return self

    def __exit__(self, *_exception: object) -> None:
        self._no_grad.close()
        self.remove()

    def _hooks(self) -> dict[HookPoint, Callable[[Tensor], Tensor | None]]:
        """Functions of the hook points up to the last that is written at."""
        points = self._points[: self._last + 1]
        return {point: partial(self._on_activation, layer) for layer, point in enumerate(points)}

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One forward pass of the whole model, with a state of its own."""
        thread = self._threads.here
        if thread.capturing:
            return forward(*args, **kwargs)
        if self._gradient and DEFERRED.calls is not None:
            raise ValueError(
                "DecodeLoop: the active replacement was made with gradient=True, and the loop "
                "writes without gradient; leave gradient out there"
            )
        outer = thread.current
        state = thread.current = self._begin(args, kwargs)
        try:
            output = forward(*args, **kwargs)
        finally:
            thread.current = outer
        if self._removed:
            raise RuntimeError(
                "this replacement was removed while a pass was running, which is replaced in part; "
                "remove it after the pass"
            )
        if self.edits is not None:
            self.edits.changes = state.changes
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Pass:
        """The state at the beginning: which tokens are special, and the outputs of a clean pass."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        skip = self._skip_mask(input_ids, kwargs.get("attention_mask"))
        sinks = self._first_positions(input_ids, skip, kwargs)
        tokens = None
        changes: list[Change | None] = [None] * len(self._points)
        if self.edits is not None:
            given = kwargs["inputs_embeds"] if input_ids is None else input_ids
            tokens = PassTokens.of_pass(given, kwargs)
        if self._mode == "online":
            return _Pass(skip, sinks, tokens, [], [], changes)
        xs = self._clean
        if xs is None:
            xs = self._capture(input_ids, kwargs)
        x_hats = self._stack(
            [_cast_like(x, self._device_refs[0]) for x in xs], loop=self._loop
        ).x_hats
        state = _Pass(skip, sinks, tokens, list(xs), x_hats, changes)
        for layer, x in enumerate(xs):
            self._find_sinks(layer, x, state)
        return state

    def _first_positions(
        self, input_ids: Tensor | None, skip: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """`[B, T, 1]` bool, tokens at the beginning of a sequence that are not special."""
        if self._sinks is None or input_ids is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = cache_of(kwargs)
            past = 0 if cache is None else cache.get_seq_length()
            if input_ids.shape[1] == 1 and isinstance(past, int) and past > 0:
                return None  # a decode step
            positions = PassTokens.of_pass(input_ids, kwargs).positions
        elif (
            input_ids.shape[1] == 1
            and _on_host(positions)
            and 0 not in positions.flatten().tolist()
        ):
            return None  # looked at as numbers, as in `_replaces_all`
        first = (positions == 0).expand(input_ids.shape)
        return _unless_none(first.unsqueeze(-1), skip)

    def _find_sinks(self, layer: int, stream: Tensor, state: _Pass) -> None:
        """Add to the sinks of a pass those of selected layer `layer`."""
        if self._sinks is None or (_on_host(stream) and self._sinks.has_none(layer, stream)):
            return
        found = _unless_none(self._sinks.at(layer, stream).unsqueeze(-1), state.skip)
        if found is not None:
            state.tally = None
            state.sinks = (
                found if state.sinks is None else state.sinks | found.to(state.sinks.device)
            )

    def _skip_mask(self, input_ids: Tensor | None, mask: Any) -> Tensor | None:
        """`[B, T, 1]` bool, which tokens are special or padding."""
        if self._special is None:
            return None
        if input_ids is None:
            raise ValueError(
                "replacement: the model was called with inputs_embeds, so special tokens cannot be "
                "told; call it with input_ids, or use replace_special=True"
            )
        if self._replaces_all(input_ids, mask):
            return None
        skip = torch.isin(input_ids, self._special)
        if isinstance(mask, dict):  # one per kind of attention
            mask = next(iter(mask.values()))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            skip = skip | (mask[:, -input_ids.shape[1] :] == 0)
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            # [B, 1, T, past + T], made by `generate` for a static cache: True or 0 where a token
            # may look. One that may look nowhere, not even at itself, is padding.
            visible = mask if mask.dtype == torch.bool else mask == 0
            skip = skip | ~visible[:, 0].any(-1)
        if _on_host(skip) and not skip.any():
            return None  # as for most tokens that a model writes: nothing to pick, nothing to count
        return skip.unsqueeze(-1)

    def _replaces_all(self, input_ids: Tensor, mask: Any) -> bool:
        """Are these single tokens of a few rows for certain neither special nor padding? Looked at
        as numbers: the operations of tensors take longer than a prediction."""
        if not (_on_host(input_ids) and input_ids.ndim == 2 and input_ids.shape[1] == 1):
            return False
        if len(input_ids) > FEW_TOKENS or not self._special_ids.isdisjoint(*input_ids.T.tolist()):
            return False
        if mask is None:
            return True
        is_plain = isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == len(input_ids)
        return is_plain and all(mask[:, -1].tolist())

    def _capture(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> list[Tensor]:
        cache = cache_of(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"replacement: mode {self._mode!r} needs the whole sequence in one forward pass; "
                f"use mode='online' for cached generation"
            )
        thread = self._threads.here
        thread.capturing = True
        try:
            captured = self._lm.capture(
                input_ids,  # type: ignore[arg-type]
                self._points,
                attention_mask=kwargs.get("attention_mask"),
                position_ids=kwargs.get("position_ids"),
            )
        finally:
            thread.capturing = False
        return [captured[point] for point in self._points]

    def _on_activation(self, layer: int, stream: Tensor) -> Tensor | None:
        """Hook at selected layer `layer`: returns the replacement for `stream [B, T, D]`, or
        None."""
        thread = self._threads.here
        if thread.capturing:
            return None
        state = thread.current
        if state is None or (self._mode == "online" and len(state.x_hats) != layer):
            raise RuntimeError(
                f"replacement: {self._points[layer].name} was reached outside a forward pass of "
                f"the whole model, or by a pass that began before the replacement; call the "
                f"model, not its blocks, and begin passes after `replacement`; gradient "
                f"checkpointing (transformers 5.24 or newer) needs hook points resid_pre or "
                f"resid_post, which it does not recompute"
            )
        delta = None
        if self._mode == "online":
            self._find_sinks(layer, stream, state)
            x_hat, code = self._step(layer, stream, state)
            state.x_hats.append(x_hat)
            if self._reads_codes and code is not None:
                delta = self._edit(layer, code, state)
        new = state.x_hats[layer]
        if self._keep_error == "pass_through":
            new = _cast_like(stream, new) + (new - new.detach())
        elif self._keep_error:
            # Without gradient: through x̂ + h − x̂ none would reach the latents.
            new = new + (_cast_like(stream, new) - new).detach()
        if delta is not None:
            new = new + delta
            if self._propagates:
                state.x_hats[layer] = state.x_hats[layer] + delta
        new = _cast_like(new, stream)
        if self._mode == "error_added":
            new = stream + (new - _cast_like(state.predictor_inputs[layer], stream))
        if not self._writes[layer]:
            return None
        self._count(layer, stream, thread, state)
        left_alone = state.left_alone
        return new if left_alone is None else torch.where(left_alone.to(stream.device), stream, new)

    def _step(self, layer: int, stream: Tensor, state: _Pass) -> tuple[Tensor, SparseCode | None]:
        """x̂ `[B, T, D]` and code of selected layer `layer`, where its parameters are."""
        ref = self._device_refs[layer]
        x = _cast_like(stream, ref)
        reconstructions, predictor_inputs = state.x_hats, state.predictor_inputs
        if self._spread:
            reconstructions, predictor_inputs = (
                [_cast_like(y, ref) for y in ys] for ys in (reconstructions, predictor_inputs)
            )
        if self._keep_error == "pass_through" and torch.is_grad_enabled():
            x = x.detach()
            reconstructions, predictor_inputs = (
                [y.detach() for y in ys] for ys in (reconstructions, predictor_inputs)
            )
        if self._loop == "closed":
            predictor_inputs = reconstructions
        if self._transported is None or not isinstance(self._stack, ReSAE):
            step = self._stack.step(layer, x, predictor_inputs, reconstructions)
        else:
            step = self._stack.step(
                layer,
                x,
                predictor_inputs,
                reconstructions,
                codes=state.codes,
                transported=self._transported,
            )
        state.predictor_inputs.append(x)
        return step

    def _edit(self, layer: int, code: SparseCode, state: _Pass) -> Tensor | None:
        """Edit the code of selected layer `layer` and pass it to `on_codes`; returns what the edits
        and a code that `on_codes` returned add to the stream, `[B, T, D]`."""
        encoded, change, delta = code, None, None
        if self.edits is not None and state.tokens is not None:
            left_alone = state.left_alone
            if left_alone is not None:
                left_alone = left_alone.squeeze(-1)
            of_pass = state.tokens
            tokens = PassTokens(of_pass.positions, of_pass.starts, of_pass.attended, left_alone)
            code, change = self.edits.at(layer, code, tokens)
            state.changes[layer] = change
            delta = None if change is None else change.delta
        edited, code = code, self._read(layer, code)
        if code is not edited:
            assert isinstance(self._stack, ReSAE)
            sae = self._stack.sae(layer)
            added = sae.decode(*code) - sae.decode(*edited)
            delta = added if delta is None else delta + added
        if self._transported is not None:
            if self.edits is not None:
                code = self.edits.code_for_prediction(layer, encoded, code, change)
            state.codes.append(code if self._propagates else encoded)
        return delta

    def _read(self, layer: int, code: SparseCode) -> SparseCode:
        """Pass a code to `on_codes`; returns the code that it returned, otherwise the same."""
        if self._on_codes is None:
            return code
        name = self._points[layer].name
        if DEFERRED.calls is not None:
            DEFERRED.calls.append((self._on_codes, name, code))
            return code
        returned = self._on_codes(name, code)
        if returned is None:
            return code
        if not isinstance(returned, SparseCode):
            raise TypeError(
                f"replacement: on_codes returned {type_name(returned)} at {name}, expected a "
                f"SparseCode, which replaces the code, or None"
            )
        shapes = returned.acts.shape, returned.indices.shape
        if shapes[0] != shapes[1] or shapes[0][:-1] != code.acts.shape[:-1]:
            raise ValueError(
                f"replacement: on_codes returned acts {list(shapes[0])} and indices "
                f"{list(shapes[1])} at {name}, expected both {[*code.acts.shape[:-1], 'k']}"
            )
        assert isinstance(self._stack, ReSAE)
        _require_latents(returned.indices, self._stack.sae(layer).config.d_sae, name)
        return returned

    def _count(self, layer: int, stream: Tensor, thread: _ThreadState, state: _Pass) -> None:
        B, T, _ = stream.shape
        row = 0 if T > 1 else 1
        if _on_host(stream):  # in numbers: a tensor would take longer than a prediction
            sums = thread.host_counts[layer][row]
            sums[0] += 1
            sums[1] += B * T
            sums[2] += 0 if state.skip is None else int(state.skip.sum())
            sums[3] += 0 if state.sinks is None else int(state.sinks.sum())
            return
        counts = thread.counts[layer]
        if counts.device != stream.device:  # of a model spread over devices, in its first pass
            counts = thread.counts[layer] = counts.to(stream.device)
        if state.tally is None:
            skipped, sinks = (
                counts.new_zeros(()) if mask is None else mask.sum().to(counts.device)
                for mask in (state.skip, state.sinks)
            )
            calls, tokens = torch.ones_like(skipped), torch.full_like(skipped, B * T)
            state.tally = torch.stack([calls, tokens, skipped, sinks])
        counts[row].add_(state.tally.to(stream.device))


def _unless_none(found: Tensor, skip: Tensor | None) -> Tensor | None:
    """The tokens `found [B, T, 1]` that are not in `skip`; None where that can be told to be none,
    as in most passes: nothing to pick, nothing to count."""
    if _on_host(found) and not found.any():
        return None
    return found if skip is None else found & ~skip.to(found.device)


def _require_latents(indices: Tensor, latents: int, name: str) -> None:
    """Raise ValueError for latents that the layer does not have, where they can be looked at."""
    if _on_host(indices) and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= latents:
            raise ValueError(
                f"replacement: on_codes returned the latent {low if low < 0 else high} at {name}, "
                f"expected 0 to {latents - 1}"
            )


def _on_host(tensor: Tensor) -> bool:
    """Can the tensor be looked into without waiting for a GPU or breaking a graph?"""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def device_ref(stack: ReSAE | AffineOnly, layer: int) -> Tensor | None:
    """A tensor of the device and dtype that selected layer `layer` of the stack computes in; None
    where the stack has no parameters."""
    if isinstance(stack, ReSAE):
        return stack.sae(layer).b_dec
    return next(stack.predictor.buffers(), None)


def _cast_like(x: Tensor, like: Tensor | None) -> Tensor:
    # Not always by `to`, which takes as long as a prediction for one token.
    if like is None or (x.dtype == like.dtype and x.device == like.device):
        return x
    return x.to(like.device, like.dtype)
