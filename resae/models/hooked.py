"""A Hugging Face causal language model with named hook points on its residual stream.

    blocks.{i}.hook_resid_pre     the stream a block reads                        [B, T, D]
    blocks.{i}.hook_attn_out      what attention adds to it
    blocks.{i}.hook_resid_mid     the stream between attention and MLP (not in parallel blocks)
    blocks.{i}.hook_mlp_out       what the MLP adds
    blocks.{i}.hook_resid_post    the stream after the block

`resid_post ≈ resid_pre + attn_out + mlp_out` up to rounding, in every family: what is added is read
after any post-norm and multiplier. A family is one entry of `FAMILIES`; blocks of other models are
found by their shape (`models/detection.py`). Weights stay the raw HF weights. Blocks
that return a tuple get a tuple back, with everything but its first element untouched.
"""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resae.assets import TINY_PYTHIA
from resae.models.detection import detect
from resae.models.families import family_of, text_config
from resae.models.gguf_files import gguf_file
from resae.models.points import SITES, HookPoint
from resae.models.splice import (
    EAGER,
    add_function,
    copied,
    flattened,
    in_this_thread,
    on_input,
    on_output,
    scaled,
)

EMBEDDED = "embedded"
"""The name of the model and of the corpus that come with the package."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of keys and values in a model's arguments and output: of transformers 5.24 and before."""


class _PassEnded(Exception):
    """Raised by the last capturing function: nothing after it is needed."""


class HookedLM:
    """A causal LM, its tokenizer, and its hook points.

    Args:
        model: any HF decoder-only causal LM of a family in `FAMILIES`, or one whose blocks fit a
            known shape, which is then checked by a pass over a few random tokens and logged; also
            one inside a wrapper that hands on its attributes, as `peft.PeftModel`.
        tokenizer: its tokenizer, or None if only token ids are used.
        name: what results record as the model.

    Raises:
        TypeError: no module with a config.
        ValueError: no decoder-only model; an architecture that has no entry in `FAMILIES` and
            fits no known shape; or a model without the blocks that its entry names.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, name: str | None = None):
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                f"HookedLM: got {type_name(model)} as the model, expected a causal LM of "
                f"transformers; HookedLM.from_pretrained(name) loads one"
            )
        self.model = model
        self.tokenizer = tokenizer
        whole: Any = model.config
        self.config: Any = text_config(whole)
        """Config of the text model, also of a model that reads images too."""
        self.name = name or getattr(whole, "name_or_path", "") or whole.model_type
        local = Path(self.name).exists()
        self.revision: str | None = None if local else getattr(whole, "_commit_hash", None)
        """Commit of the hub repository that it was loaded from; None: of no repository."""
        self.family = family_of(whole, self.name) or detect(model, self.name)
        self._root = _root_of(model, self.family.blocks, self.name)
        self.blocks: Any = self._root.get_submodule(self.family.blocks)
        self._base = self.family.base or self.family.blocks.rpartition(".")[0]
        known = signature(type(self._root.get_submodule(self._base)).forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])
        """Keyword and output by which the model takes and returns keys and values."""

    def __repr__(self) -> str:
        return (
            f"HookedLM({self.name!r}, {self.config.model_type}, {self.n_layers} blocks, "
            f"d_model={self.d_model}, hook points blocks.{{0..{self.n_layers - 1}}}."
            f"hook_{{{', '.join(self.sites())}}}, on {self.device})"
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        tokenizer: bool = True,
    ) -> "HookedLM":
        """Load a model and its tokenizer by hub name, local path, or `embedded`.

        A local path may be a GGUF file or a folder with one, which needs the extra `gguf`: its
        weights are dequantised to `dtype`, and take as much memory as any others of that dtype.

        Args:
            revision: branch, tag or commit of a hub repository; None: its main branch.
            tokenizer: whether one is needed; without, there may be none.
            device: `auto` spreads a model that is too large for one over all devices
                (`device_map="auto"` of transformers, which needs accelerate).

        Raises:
            FileNotFoundError: no such model, neither local nor on the hub.
            ModuleNotFoundError: `auto` without accelerate, GGUF without the extra `gguf`.
            ValueError: a model without tokenizer, or one that `HookedLM` refuses.
        """
        spread = device == "auto"
        if spread and not find_spec("accelerate"):
            raise ModuleNotFoundError('device "auto" needs accelerate; pip install accelerate')
        from transformers import AutoConfig, AutoModelForCausalLM

        path, options = _source_of(name, revision)
        try:
            config = AutoConfig.from_pretrained(path, **options)
            if family_of(config, name) is None:  # an error before gigabytes are read
                _described(config, None, name)
            words = _tokenizer(path, name, options, needed=tokenizer)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map="auto" if spread else None, **options
            )
        except OSError as error:
            raise _not_found(name, error) from None
        except SafetensorError as error:
            raise ValueError(
                f"model {name!r}: its weights are truncated or not safetensors ({error}); copy or "
                f"download them again"
            ) from None
        return cls((model if spread else model.to(device)).eval(), words, name)  # type: ignore[arg-type]

    @classmethod
    def described(
        cls, name: str, *, tokenizer: bool | None = False, revision: str | None = None
    ) -> "HookedLM":
        """The shapes of a model, from its config alone: on the meta device, without weights.

        Args:
            tokenizer: whether to load the tokenizer too; None: if there is one.
            revision: branch, tag or commit of a hub repository; None: its main branch.

        Raises:
            FileNotFoundError: no such config, neither local nor on the hub.
            ValueError: no tokenizer, or a model that `HookedLM` refuses.
        """
        from transformers import AutoConfig

        path, options = _source_of(name, revision)
        try:
            config = AutoConfig.from_pretrained(path, **options)
            family_of(config, name)
            words = None
            if tokenizer is not False:
                words = _tokenizer(path, name, options, needed=bool(tokenizer))
        except OSError as error:
            raise _not_found(name, error) from None
        return _described(config, words, name)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def require_weights(self) -> None:
        """Raise ValueError if the first weights are on the meta device. Offloaded blocks are no
        hindrance: accelerate fetches them when their turn comes."""
        if self.device.type == "meta":
            raise ValueError(
                f"model {self.name}: its first weights are on no device but offloaded or not "
                f"loaded, so that it cannot be told where it runs; give a device_map that keeps "
                f"its embeddings on a device, or load it with HookedLM.from_pretrained"
            )

    def require_context(self, tokens: int) -> None:
        """Raise ValueError if the model was not made for rows of this length. Some families fail
        beyond their context, others continue with positions that they never saw in training."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"model {self.name}: rows of {tokens} tokens are longer than its context of "
                f"{limit} tokens; lower context_tokens (--context-tokens)"
            )

    @property
    def special_ids(self) -> tuple[int, ...]:
        """BOS, EOS and padding, whichever there are: left untouched by replacement by default."""
        ids: set[int] = set()
        for holder in (self.tokenizer, self.model.config, self.config):
            for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value: Any = getattr(holder, role, None)
                if value is not None:
                    ids.update(value if isinstance(value, (list, tuple)) else [value])
        return tuple(sorted(ids))

    def require_vocabulary(self, ids: Tensor, what: str) -> None:
        """Raise ValueError unless all of `ids` are tokens of the model; `what` names them."""
        size = int(self.config.vocab_size)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"{what}: token ids from {int(ids.min())} to {int(ids.max())}, but {self.name} has "
                f"{size} tokens, 0 to {size - 1}; they belong to another tokenizer"
            )

    def is_special(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` bool: which tokens are BOS, EOS or padding."""
        return torch.isin(
            input_ids, torch.tensor(self.special_ids, dtype=torch.int64, device=input_ids.device)
        )

    def sites(self) -> tuple[str, ...]:
        """The sites that this architecture has."""
        parallel = self.family.parallel
        if not isinstance(parallel, bool):
            parallel = any(getattr(self.config, flag) for flag in parallel)
        return tuple(site for site in SITES if not (parallel and site == "resid_mid"))

    def hook_point(self, name: str | int) -> HookPoint:
        """Parse `blocks.{i}.hook_{site}`, `layers.{i}` or a bare block number (its resid_post).

        Raises:
            ValueError: not a hook point of this model; the message lists what there is.
        """
        text = str(name)
        layer, site = text, "resid_post"
        if text.startswith("blocks.") and ".hook_" in text:
            layer, _, site = text.removeprefix("blocks.").partition(".hook_")
        elif text.startswith("layers."):
            layer = text.removeprefix("layers.")
        if not layer.isdigit() or site not in SITES:
            raise ValueError(
                f"unknown hook point {text!r}; {self.name} has blocks.{{0..{self.n_layers - 1}}}."
                f"hook_{{{', '.join(self.sites())}}} (or a block number for its resid_post)"
            )
        if site not in self.sites():
            raise ValueError(
                f"hook point {text!r}: the blocks of {self.name} add attention and MLP in parallel "
                f"and have no {site}; choose one of {', '.join(self.sites())}"
            )
        if int(layer) >= self.n_layers:
            raise ValueError(
                f"hook point {text!r}: layer {layer} is out of range, {self.name} has layers "
                f"0..{self.n_layers - 1}"
            )
        return HookPoint(int(layer), SITES.index(site), site)

    def hook_points(self, names: Sequence[str | int]) -> list[HookPoint]:
        """Parse a selection of hook points, which must be given in the order of the pass, once
        each.

        Raises:
            ValueError: none given, one named twice, out of order, or unknown.
        """
        if not names:
            raise ValueError("no layers selected; name at least one, for example 1,3,5")
        points = [self.hook_point(name) for name in names]
        for i, point in enumerate(points):
            if point in points[:i]:
                raise ValueError(f"{point.name} is selected twice; name each layer once")
        if points != sorted(points):
            raise ValueError(
                f"layers out of order: got {', '.join(p.name for p in points)}; give them in the "
                f"order of the forward pass: {', '.join(p.name for p in sorted(points))}"
            )
        return points

    @contextmanager
    def hooked(
        self,
        hooks: Mapping[HookPoint, Callable[[Tensor], Tensor | None]],
        *,
        around: Callable[..., Any] | None = None,
    ) -> Generator[None]:
        """While inside, call `hooks[p](activation [B, T, D])` at each point of every forward pass,
        whichever thread runs it; a tensor it returns takes the activation's place.

        Functions at one point run in the order in which they came, each on what the one before it
        left. While inside, stand-ins replace the modules concerned in their parents; on exit, in
        whatever order and after whatever error, the modules themselves are back. A model works
        under `torch.compile`, compiled before or inside. A copy of the model made inside, by
        `copy.deepcopy` or by pickling, is a plain one.

        Args:
            around: called as `around(forward, *args, **kwargs)` in place of each forward pass of
                the whole model; returns what `forward(*args, **kwargs)` returns.
        """
        self.require_weights()
        with ExitStack() as stack:
            if around is not None:
                stack.callback(add_function(self._root, self._base, "around", 0, around))
            for point, function in hooks.items():
                for splice in self._splices(point, function):
                    stack.callback(add_function(*splice))
            yield

    @contextmanager
    def recomputed(self) -> Generator[None]:
        """While inside, the backward computes every block anew, whose activations the forward does
        not keep (gradient checkpointing), in whatever mode the model is. Functions at `resid_pre`
        and `resid_post` run once, in the forward."""
        with ExitStack() as stack:
            for layer in range(self.n_layers):
                path = f"{self.family.blocks}.{layer}"
                stack.callback(add_function(self._root, path, "around", 0, _recomputed))
            yield

    def _splices(
        self, point: HookPoint, function: Callable[[Tensor], Tensor | None]
    ) -> list[tuple[nn.Module, str, str, int, Callable[..., Any]]]:
        """Arguments of `add_function` that have `function` called at one hook point."""
        block = str(point.layer)
        if point.site in ("resid_pre", "resid_post"):
            at, wrap = ("before", on_input) if point.site == "resid_pre" else ("after", on_output)
            return [(self.blocks, block, at, point.order, wrap(function))]
        if point.site == "mlp_out":
            return self._mlp_splices(point, function)
        attention = f"{block}.{self.family.attn_out}"
        if point.site == "attn_out":
            return [
                (self.blocks, attention, "after", point.order, on_output(self._added(function)))
            ]
        # No module returns resid_mid: it is the block's input plus attn_out, and is changed by
        # changing attn_out, since the block continues with that same sum.
        thread = threading.local()

        def remember(resid_pre: Tensor) -> None:
            thread.resid_pre = resid_pre

        def change(attn_out: Tensor) -> Tensor | None:
            resid_pre, thread.resid_pre = getattr(thread, "resid_pre", None), None
            if resid_pre is None:  # a pass of another thread, which was in this block before
                return None
            new = function(resid_pre + attn_out)
            return None if new is None else new - resid_pre

        return [
            (self.blocks, block, "before", point.order, on_input(remember)),
            (self.blocks, attention, "after", point.order, on_output(self._added(change))),
        ]

    def _mlp_splices(
        self, point: HookPoint, function: Callable[[Tensor], Tensor | None]
    ) -> list[tuple[nn.Module, str, str, int, Callable[..., Any]]]:
        """`_splices` at `mlp_out`."""
        block, function = str(point.layer), self._added(function)
        splices = []
        if self.family.flat_mlp:
            remember, function = flattened(function)
            splices.append((self.blocks, block, "before", point.order, on_input(remember)))
        if self.family.in_place:
            function = copied(function)
        mlp = f"{block}.{self.family.mlp_out}"
        return [*splices, (self.blocks, mlp, "after", point.order, on_output(function))]

    def _added(self, function: Callable[[Tensor], Tensor | None]):
        """`function` applied to the output of attention or MLP as the block will add it."""
        scale = self.family.scale
        return function if scale is None else scaled(function, getattr(self.config, scale))

    def logits(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, V]` of one uncached forward pass, without gradient."""
        self.require_context(input_ids.shape[1])
        with torch.no_grad():
            return self.model(input_ids=input_ids, use_cache=False, **kwargs).logits

    def capture(
        self, input_ids: Tensor, points: Sequence[HookPoint], **kwargs: Any
    ) -> dict[HookPoint, Tensor]:
        """Activations `[B, T, D]` at `points` (of `hook_points`), without gradient; the pass stops
        at the last one.

        A compiled model runs uncompiled here. Passes of other threads go on as they are.
        """
        if wrong := [point for point in points if not isinstance(point, HookPoint)]:
            raise TypeError(
                f"capture: got {wrong[0]!r} as a hook point; pass lm.hook_points(names), such as "
                f"lm.hook_points(stack.hook_points)"
            )
        self.require_context(input_ids.shape[1])
        reason = "capture stops the pass half-way, which no graph can"
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=reason)
        # Decorated at the call: decorating the method would load the compiler at every import.
        untraced = torch.compiler.disable(self._capture, reason=reason)
        return untraced(input_ids, points, kwargs)  # pyright: ignore[reportCallIssue]

    def _capture(
        self, input_ids: Tensor, points: Sequence[HookPoint], kwargs: dict[str, Any]
    ) -> dict[HookPoint, Tensor]:
        captured: dict[HookPoint, Tensor] = {}
        last = max(points)

        def save(point: HookPoint, activation: Tensor) -> None:
            captured[point] = activation
            if point == last:
                raise _PassEnded

        hooks = {p: in_this_thread(partial(save, p)) for p in points}
        with self.hooked(hooks), torch.no_grad(), EAGER, suppress(_PassEnded):
            self.model(input_ids=input_ids, use_cache=False, **kwargs)
        return captured

    def replace(
        self,
        input_ids: Tensor,
        replacements: Mapping[HookPoint, Tensor | Callable[[Tensor], Tensor | None]],
        **kwargs: Any,
    ) -> Tensor:
        """Logits `[B, T, V]` with activations replaced by tensors `[B, T, D]` or by functions of
        what the running pass holds there. Passes of other threads go on as they are."""
        with self.replacing(replacements):
            return self.logits(input_ids, **kwargs)

    def replacing(
        self, replacements: Mapping[HookPoint, Tensor | Callable[[Tensor], Tensor | None]]
    ) -> AbstractContextManager[None]:
        """Context in which the passes of this thread run with activations replaced (`replace`)."""
        return self.hooked(
            {
                point: in_this_thread(
                    (lambda _activation, new=new: new) if isinstance(new, Tensor) else new
                )
                for point, new in replacements.items()
            }
        )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def type_name(value: object) -> str:
    """Name of the class that a value is, or is of: for messages about wrong arguments."""
    return getattr(value, "__name__", type(value).__name__)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Keys and values among the keyword arguments of a pass; None: there are none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _described(config: Any, tokenizer: Any, name: str) -> HookedLM:
    """A model on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:
            raise ValueError(
                f"model {name}: transformers has no causal LM of architecture "
                f"{config.model_type!r}; resae needs a decoder-only model"
            ) from None
        return HookedLM(model, tokenizer, name)


def _not_found(name: str, error: OSError) -> FileNotFoundError:
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"model {name!r} not found ({reason}); give a hub name, a local folder with config.json, "
        f"or {EMBEDDED!r} for the model that comes with resae"
    )


def _source_of(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Folder or hub name of a model, and what `from_pretrained` of transformers needs besides."""
    if revision is not None and (name == EMBEDDED or Path(name).exists()):
        raise ValueError(
            f"model {name!r} is local and has no revision {revision!r}; leave --revision out, or "
            f"give a hub name"
        )
    if name == EMBEDDED:
        return str(TINY_PYTHIA), {"revision": None}
    if (file := gguf_file(name)) is not None:
        return str(file.parent), {"gguf_file": file.name}
    return name, {"revision": revision}


def _tokenizer(path: str, name: str, options: dict[str, Any], *, needed: bool) -> Any:
    """The tokenizer of a model; None: it has none, and none is needed. From a folder without one
    transformers makes, depending on the family, a tokenizer without words, or an error that names
    everything but the folder."""
    from transformers import AutoTokenizer

    tokenizer: Any = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
        reason = "only special tokens"
    except ValueError as error:
        tokenizer, empty, reason = None, True, str(error).strip().splitlines()[0]
    except OSError:
        if needed:
            raise
        return None
    if empty and not needed:
        return None
    if empty:
        raise ValueError(
            f"model {name!r} has no tokenizer ({reason}): save it there too, with "
            f"tokenizer.save_pretrained; for token ids alone, HookedLM(model) needs none"
        )
    return tokenizer


def _root_of(model: nn.Module, path: str, name: str) -> nn.Module:
    """The module that holds `path`: the model, or the one in a wrapper of it. A wrapper hands on
    attributes, and what is set on it by such a path would be in the model twice."""
    for module in model.modules():
        inner: nn.Module | None = module
        for part in path.split("."):
            inner = None if inner is None else inner._modules.get(part)
        if inner is not None:
            return module
    raise ValueError(
        f"model {name}: it has no {path}, which resae.models.families.FAMILIES names for it"
    )
