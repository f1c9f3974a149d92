"""Replace the residual stream at several layers of a running model by a stack's reconstruction.

    online          one pass; codes come from the running stream, which upstream replacements have
                    already changed; x̂_l is written at once
    teacher_forced  codes of all layers come from the clean pass; a second pass writes all x̂_l
    error_added     as teacher_forced, but x̂_l − x_l is added to the running stream instead

Teacher-forced, the replacement of the last layer overwrites all earlier ones: replacing all layers
equals replacing only the last one, exactly. Online and error-added measure every layer.
(Online, adding the error of the running stream to that stream is replacing it.)

Special tokens are left alone, and sink tokens (`resae.models.sinks`) where the stack has a rule for
them: by the clean stream in modes of two passes, online by the running stream, at the layer where a
token is found to be one and all later ones.

Online, the residual is taken against the reconstructions that were put into the stream (closed
loop); loop "open" takes it against the stream as it was before each replacement. The chain runs
through all selected layers, one token at a time, within one forward pass; between decode steps
only the model's own KV cache is kept, and beams may be reordered between them. `layers` chooses
where its result enters the stream. Codes can be read and edited on the way
(`resae.replacements.edits`).

With `gradient=True` gradients flow through every replaced layer: to the codes, to dictionaries and
maps, and to the model. Where the error h − x̂ is kept, its gradient has a name:

    detached      x̂ + (h − x̂)₀, ( )₀ a constant: the layers below are reached through the latents
                  alone, as without the error
    pass_through  h + (x̂ − x̂₀), x̂ from the constants h₀ and x̂₀ of earlier layers: the stream has
                  the gradient of the plain model, and a latent that of its own direction in it
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resae.choices import KeptError, Loop, Mode
from resae.models.hooked import HookedLM, cache_of, type_name
from resae.models.points import HookPoint
from resae.replacements.counts import LayerCounts, PassCounts
from resae.replacements.decode_loop import DEFERRED
from resae.replacements.edits import ActiveEdits, Change, Interventions, PassTokens
from resae.stack.stack import AffineOnly, ReSAE
from resae.threads import PerThread
from resae_kernels import SparseCode, Transported
from resae_kernels.step import FEW_TOKENS

OnCodes = Callable[[str, SparseCode], SparseCode | None]


@dataclass(frozen=True)
class _Settings:
    """Arguments of `replacement`, checked."""

    mode: str
    loop: str
    write_points: Sequence[HookPoint]
    replace_special: bool
    clean: Sequence[Tensor] | None
    keep_error: str | bool
    """A `KeptError`, or False."""
    gradient: bool
    interventions: Interventions
    on_codes: OnCodes | None

    def check(self, stack: ReSAE | AffineOnly) -> None:
        """Raise ValueError for settings that do not go together, or not with this stack."""
        Mode.check(self.mode, "replacement: mode")
        Loop.check(self.loop, "replacement: loop")
        if self.keep_error is not False:
            KeptError.check(self.keep_error, "replacement: keep_error", "True", "False")
        if self.needs_codes and (self.mode != "online" or not isinstance(stack, ReSAE)):
            raise ValueError(
                "replacement: interventions and on_codes need the codes of the running stream; use "
                "mode='online' and a stack with autoencoders"
            )
        if self.keep_error and self.mode != "online":
            raise ValueError(
                f"replacement: keep_error={self.keep_error!r} with mode={self.mode!r}; use "
                f"mode='online'"
            )
        if self.gradient and self.mode != "online":
            raise ValueError(
                f"replacement: gradient=True with mode={self.mode!r}, whose clean pass has no "
                f"gradient; use mode='online'"
            )

    @property
    def needs_codes(self) -> bool:
        return bool(self.interventions.edits) or self.on_codes is not None

    def transported(
        self, stack: ReSAE | AffineOnly, max_bytes: int, edits: ActiveEdits | None
    ) -> Transported | None:
        """Dictionaries transported to later layers, where they are asked for and fit."""
        if not max_bytes or not isinstance(stack, ReSAE):
            return None
        if self.mode != "online" or self.loop != "closed":
            raise ValueError(
                f"replacement: transport_bytes with mode={self.mode!r} and loop={self.loop!r}; "
                f"transported dictionaries predict from codes what was put in: use mode='online' "
                f"and loop='closed', or leave it out"
            )
        if self.gradient:
            raise ValueError(
                "replacement: transport_bytes with gradient=True; transported dictionaries pass no "
                "gradient on, leave one of the two out"
            )
        return stack.transported(max_bytes, vectors=edits.vectors if edits else None)


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
        settings: _Settings,
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
        self._device_refs = [_device_ref(stack, layer) for layer in range(len(self._points))]
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
        latents = self._stack.sae(layer).config.d_sae
        if _on_host(returned.indices) and returned.indices.numel():
            low, high = (int(bound) for bound in returned.indices.aminmax())
            if low < 0 or high >= latents:
                raise ValueError(
                    f"replacement: on_codes returned the latent {low if low < 0 else high} at "
                    f"{name}, expected 0 to {latents - 1}"
                )
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


def _on_host(tensor: Tensor) -> bool:
    """Can the tensor be looked into without waiting for a GPU or breaking a graph?"""
    return tensor.is_cpu and not torch.compiler.is_compiling()


_REPLACED: WeakKeyDictionary[nn.Module, set[HookPoint]] = WeakKeyDictionary()
"""Per list of blocks, hook points at which active replacements write."""
_CLAIMING = RLock()


@contextmanager
def _claimed(lm: HookedLM, write_points: Sequence[HookPoint]) -> Generator[None]:
    """Hold hook points against other replacements. Raises ValueError if one is held already."""
    with _CLAIMING:
        replaced = _REPLACED.setdefault(lm.blocks, set())
        for point in write_points:
            if point in replaced:
                raise ValueError(
                    f"replacement: {point.name} of {lm.name} is being replaced already; remove() "
                    f"that replacement first, or choose other layers"
                )
        replaced.update(write_points)
    try:
        yield
    finally:
        with _CLAIMING:
            replaced.difference_update(write_points)


def replacement(
    lm: HookedLM | nn.Module,
    stack: ReSAE | AffineOnly,
    *,
    mode: Mode | str = "online",
    loop: Loop | str = "closed",
    layers: Sequence[str | int] | None = None,
    replace_special: bool = False,
    clean: Sequence[Tensor] | None = None,
    keep_error: KeptError | str | bool = False,
    gradient: bool = False,
    interventions: Any = None,
    on_codes: OnCodes | None = None,
    transport_bytes: int = 0,
) -> Replacement:
    """Replace the stream in every forward pass of the model from now on, `generate` included.

        with replacement(lm, stack): …                until the block ends, and without gradient
        active = replacement(lm, stack); …            until active.remove()

    The model stays an ordinary Hugging Face model: all of `generate` works (sampling, beams, any
    cache, assisted generation, streamers, left-padded batches), and `torch.compile`, in mode
    `online` in one graph. Threads may run it at the same time, each its own passes.

    A model spread over devices (`device_map`) may have its stack on any of them, in mode `online`
    each layer's autoencoder and maps on another: they compute where they are, and activations are
    moved there and back.

    Args:
        lm: the model that the stack was trained on, or the Hugging Face model inside.
        stack: reconstructs the stream.
        mode: `online`, `teacher_forced` or `error_added` (above); only `online` with a KV cache.
        loop: `closed`: residuals against reconstructions; `open`: against true activations (online:
            against the running stream before replacement).
        layers: where reconstructions enter the stream, a subset of the stack's hook points; default
            all. The chain itself always runs through every selected layer before the last of these.
        replace_special: also replace at BOS, EOS, padding and sink tokens (`resae.models.sinks`;
            which tokens these are is the stack's rule, `stack.sinks`).
        clean: the clean activations `[B, T, D]` of the one batch that will be run, if already
            computed; saves the clean pass of the teacher-forced modes.
        keep_error: online only: x̂ + (h − x̂) goes in, the running stream h itself up to rounding.
            The codes are computed all the same: this is the clean model, and its codes can be
            read. Not needed where the interventions keep the error. Of its gradient: `detached`,
            which True stands for, or `pass_through` (above).
        gradient: online only: leave gradients on inside the `with` block (call `lm.model`;
            `lm.logits` has none). They reach codes, autoencoders, maps (buffers: where
            `requires_grad_()` was called on them) and model, by sparse sums, never `[N, M]`;
            under `torch.compile` and, at `resid_pre` and `resid_post`, under gradient
            checkpointing too.
        interventions: online only: edits of the codes, as `resae.Interventions.parse` reads them.
        on_codes: online only: called at every selected layer of every pass with the name of its
            hook point and its code `[B, T, k]`, edited, on the device, in the thread of the pass.
            A `SparseCode` that it returns, of any k, replaces the code, as an edit does; None
            leaves it. In a `DecodeLoop` it is called after each step and may only read.
            `resae.StrongestLatents` is one such function.
        transport_bytes: online, closed loop: where the L(L−1)/2 dictionaries transported to later
            layers take no more than this, they are made now, and passes of up to 16 tokens predict
            by gathering their rows instead of multiplying by the maps; on a CPU as long as these
            are at most D rows, as more take longer than a map. They do not follow later changes of
            the stack. Not in an open loop, whose predictions come from streams
            instead of codes, and not with `gradient`.

    Returns:
        A `Replacement`, whose `counts` tell what was replaced, and `edits` what was edited.

    Raises:
        TypeError: something else than a model and a stack.
        ValueError: another model's stack, or one on another device; unknown mode or loop, or
            options that do not go together; layers that the stack does not have, or that are
            replaced already; interventions that cannot be parsed, or that the stack cannot do.
    """
    _require_stack(stack)
    lm = lm if isinstance(lm, HookedLM) else HookedLM(lm)
    stack.require_model(lm)
    asked = Interventions() if interventions is None else Interventions.parse(interventions)
    kept = KeptError.DETACHED if keep_error or asked.keep_error else False
    settings = _Settings(
        mode=mode,
        loop=loop,
        write_points=_write_points(lm, stack, layers),
        replace_special=replace_special,
        clean=clean,
        keep_error=keep_error if isinstance(keep_error, str) else kept,
        gradient=gradient,
        interventions=asked,
        on_codes=on_codes,
    )
    settings.check(stack)
    _require_devices(lm, stack)
    with ExitStack() as in_force:  # which undoes what was done, if any of it fails
        in_force.enter_context(_claimed(lm, settings.write_points))
        edits = None
        if asked.edits:
            assert isinstance(stack, ReSAE)
            names = [point.name for point in settings.write_points]
            edits = ActiveEdits(asked, stack, names)
        transported = settings.transported(stack, transport_bytes, edits)
        active = Replacement(lm, stack, settings, edits, transported)
        in_force.enter_context(lm.hooked(active._hooks(), around=active._run))
        active._in_force = in_force.pop_all()
    return active


def _require_stack(stack: Any) -> None:
    if not isinstance(stack, ReSAE | AffineOnly):
        raise TypeError(
            f"replacement: got {type_name(stack)} as the stack, "
            f"expected a ReSAE or AffineOnly; ReSAE.from_pretrained(folder) opens one, "
            f"ReSAE([hook_point], AffinePredictor('none'), [sae]) makes one of an autoencoder"
        )


def _write_points(
    lm: HookedLM, stack: ReSAE | AffineOnly, layers: Sequence[str | int] | None
) -> list[HookPoint]:
    """The hook points at which reconstructions enter the stream. Raises ValueError for one that
    the stack does not have."""
    points = lm.hook_points(stack.hook_points)
    written = points if layers is None else lm.hook_points(layers)
    for point in written:
        if point not in points:
            raise ValueError(
                f"replacement: the stack has no {point.name} but {', '.join(stack.hook_points)}"
            )
    return written


def _require_devices(lm: HookedLM, stack: ReSAE | AffineOnly) -> None:
    lm.require_weights()
    devices = {parameter.device for parameter in lm.model.parameters()}
    for layer in range(stack.n_layers):
        ref = _device_ref(stack, layer)
        if ref is not None and ref.device not in devices:
            raise ValueError(
                f"replacement: the stack is on {ref.device}, the model on {lm.device}; use "
                f"stack.to({str(lm.device)!r})"
            )


def _device_ref(stack: ReSAE | AffineOnly, layer: int) -> Tensor | None:
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
