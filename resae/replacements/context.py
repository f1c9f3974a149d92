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

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from resae.choices import KeptError, Loop, Mode
from resae.models.hooked import HookedLM, type_name
from resae.models.points import HookPoint
from resae.replacements.active import Replacement, device_ref
from resae.replacements.edits import ActiveEdits, Interventions
from resae.replacements.settings import OnCodes, Settings
from resae.stack.stack import AffineOnly, ReSAE

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
    settings = Settings(
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
        active.start(in_force)
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
        ref = device_ref(stack, layer)
        if ref is not None and ref.device not in devices:
            raise ValueError(
                f"replacement: the stack is on {ref.device}, the model on {lm.device}; use "
                f"stack.to({str(lm.device)!r})"
            )
