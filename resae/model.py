"""A Hugging Face causal language model with named hook points on its residual stream.

    blocks.{i}.hook_resid_pre     the stream a block reads                        [B, T, D]
    blocks.{i}.hook_attn_out      what attention adds to it
    blocks.{i}.hook_resid_mid     the stream between attention and MLP (not in parallel blocks)
    blocks.{i}.hook_mlp_out       what the MLP adds
    blocks.{i}.hook_resid_post    the stream the block leaves

`resid_post ≈ resid_pre + attn_out + mlp_out` up to rounding, in every family: what is added is read
after any post-norm. A family is one entry of `FAMILIES`. Weights stay the raw HF weights. Blocks
that return a tuple get a tuple back, with everything but its first element untouched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from resae.assets import TINY_PYTHIA

EMBEDDED = "embedded"
"""The name of the model and of the corpus that come with the package."""

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Family:
    """Where one HF architecture keeps what the hook points name; paths are relative to a block."""

    blocks: str
    """Path from the causal LM to its list of blocks."""
    attn_out: str
    """Submodule whose output attention adds to the stream."""
    mlp_out: str
    """Submodule whose output the MLP adds to the stream."""
    parallel: str | None = None
    """Config flag which, when true, says that the block has no `resid_mid`."""


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(  # Pythia
        blocks="gpt_neox.layers",
        attn_out="attention",
        mlp_out="mlp",
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp"),
    **{
        name: Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp")
        for name in ("llama", "qwen2", "qwen3")
    },
    **{
        name: Family(
            blocks="model.layers",
            attn_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
        )
        for name in ("gemma2", "gemma3_text")
    },
}


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place in the forward pass; ordered as the pass meets them."""

    layer: int
    order: int
    site: str

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"


class _PassEnded(Exception):
    """Raised by the last capturing function: nothing after it is needed."""


class HookedLM:
    """A causal LM, its tokenizer, and its hook points.

    Args:
        model: any HF causal LM of a family in `FAMILIES`.
        tokenizer: its tokenizer, or None if only token ids are used.
        name: what results record as the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, name: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.config: Any = model.config
        self.name = name or getattr(self.config, "name_or_path", "") or self.config.model_type
        self.family = _family_of(self.config, self.name)
        self.blocks: Any = model.get_submodule(self.family.blocks)
        self.deferred: list[tuple[Any, ...]] | None = None
        """Functions with their arguments, which whoever runs a pass will call after it; None: they
        are called at once, as no compiled graph can."""

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "HookedLM":
        """Load a model and its tokenizer by hub name, local path, or `embedded`.

        Args:
            device: `auto` spreads a model that is too large for one over all devices
                (`device_map="auto"` of transformers, which needs accelerate).

        Raises:
            FileNotFoundError: no such model, neither local nor on the hub.
            ModuleNotFoundError: `auto` without accelerate.
        """
        spread = device == "auto"
        if spread and not find_spec("accelerate"):
            raise ModuleNotFoundError('device "auto" needs accelerate; pip install accelerate')
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        path = str(TINY_PYTHIA) if name == EMBEDDED else name
        try:
            config = AutoConfig.from_pretrained(path)
            _family_of(config, name)  # an unknown one is an error before gigabytes are read
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map="auto" if spread else None
            )
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"model {name!r} not found ({reason}); give a hub name, a local folder with "
                f"config.json, or {EMBEDDED!r} for the model that comes with resae"
            ) from None
        return cls((model if spread else model.to(device)).eval(), tokenizer, name)  # type: ignore[arg-type]

    @classmethod
    def described(cls, name: str) -> "HookedLM":
        """The shapes of a model, from its config alone: on the meta device, without tokenizer.

        Raises:
            FileNotFoundError: no such config, neither local nor on the hub.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        path = str(TINY_PYTHIA) if name == EMBEDDED else name
        try:
            config = AutoConfig.from_pretrained(path)
        except OSError as error:
            raise FileNotFoundError(
                f"model {name!r} not found ({str(error).splitlines()[0]}); give a hub name, or a "
                f"local folder with config.json"
            ) from None
        _family_of(config, name)
        with torch.device("meta"):
            return cls(AutoModelForCausalLM.from_config(config), None, name)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def special_ids(self) -> tuple[int, ...]:
        """BOS, EOS and padding, whichever there are: left untouched by replacement by default."""
        ids: set[int] = set()
        for holder in (self.tokenizer, self.config):
            for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value: Any = getattr(holder, role, None)
                if value is not None:
                    ids.update(value if isinstance(value, (list, tuple)) else [value])
        return tuple(sorted(ids))

    def is_special(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` bool: which tokens are BOS, EOS or padding."""
        return torch.isin(
            input_ids, torch.tensor(self.special_ids, dtype=torch.int64, device=input_ids.device)
        )

    def sites(self) -> tuple[str, ...]:
        """The sites that this architecture has."""
        flag = self.family.parallel
        parallel = flag is not None and getattr(self.config, flag)
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
        begin: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> Iterator[None]:
        """While inside, call `hooks[p](activation [B, T, D])` at each point of every forward pass;
        a tensor it returns takes the activation's place.

        Functions at one point run in the order in which they came, each on what the one before it
        left. While inside, stand-ins replace the modules concerned in their parents; on exit, in
        whatever order and after whatever error, the modules themselves are back. A model works
        under `torch.compile`, be it compiled before or inside.

        Args:
            begin: called with the arguments and keyword arguments of each forward pass of the whole
                model, before any hook.
        """
        with ExitStack() as stack:
            if begin is not None:
                stack.callback(self._splice_in_model(begin))
            for point, function in hooks.items():
                for remove in self._splice_in(point, function):
                    stack.callback(remove)
            yield

    def _splice_in_model(self, begin: Callable[..., None]) -> Callable[[], None]:
        """Call `begin` before each pass through the model that holds the blocks."""

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]):
            begin(args, kwargs)
            return args, kwargs

        path = self.family.blocks.rpartition(".")[0]
        return _Splice.at(self.model, path).add_before(0, before)

    def _splice_in(
        self, point: HookPoint, function: Callable[[Tensor], Tensor | None]
    ) -> list[Callable[[], None]]:
        """Have `function` called at one hook point; returns what undoes it."""
        block = str(point.layer)
        if point.site == "resid_pre":
            splice = _Splice.at(self.blocks, block)
            return [splice.add_before(point.order, _on_input(function))]
        if point.site != "resid_mid":
            inside = {"attn_out": self.family.attn_out, "mlp_out": self.family.mlp_out}
            path = f"{block}.{inside[point.site]}" if point.site in inside else block
            splice = _Splice.at(self.blocks, path)
            return [splice.add_after(point.order, _on_output(function))]
        # No module returns resid_mid: it is the block's input plus attn_out, and is changed by
        # changing attn_out, since the block goes on with that same sum.
        stream: list[Tensor] = []

        def remember(resid_pre: Tensor) -> None:
            stream[:] = [resid_pre]

        def change(attn_out: Tensor) -> Tensor | None:
            resid_pre = stream.pop()
            new = function(resid_pre + attn_out)
            return None if new is None else new - resid_pre

        attention = f"{block}.{self.family.attn_out}"
        return [
            _Splice.at(self.blocks, block).add_before(point.order, _on_input(remember)),
            _Splice.at(self.blocks, attention).add_after(point.order, _on_output(change)),
        ]

    def logits(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, V]` of one uncached forward pass, without gradient."""
        with torch.no_grad():
            return self.model(input_ids=input_ids, use_cache=False, **kwargs).logits

    def capture(
        self, input_ids: Tensor, points: Sequence[HookPoint], **kwargs: Any
    ) -> dict[HookPoint, Tensor]:
        """Activations `[B, T, D]` at `points`, without gradient; the pass stops at the last one.

        A compiled model runs uncompiled here.
        """
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

        hooks = {p: (lambda activation, p=p: save(p, activation)) for p in points}
        eager = torch.compiler.set_stance("force_eager")
        with self.hooked(hooks), torch.no_grad(), eager, suppress(_PassEnded):
            self.model(input_ids=input_ids, use_cache=False, **kwargs)
        return captured

    def replace(
        self,
        input_ids: Tensor,
        replacements: Mapping[HookPoint, Tensor | Callable[[Tensor], Tensor | None]],
        **kwargs: Any,
    ) -> Tensor:
        """Logits `[B, T, V]` with activations replaced by tensors `[B, T, D]` or by functions of
        what the running pass holds there."""
        hooks = {
            point: ((lambda _activation, new=new: new) if isinstance(new, Tensor) else new)
            for point, new in replacements.items()
        }
        with self.hooked(hooks):
            return self.logits(input_ids, **kwargs)


def _family_of(config: Any, name: str) -> Family:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model {name}: architecture {config.model_type!r} has no entry in "
            f"resae.model.FAMILIES (there are {', '.join(sorted(FAMILIES))}); add one"
        )
    return FAMILIES[config.model_type]


class _Splice:
    """Functions around the forward of one module of a model.

    A stand-in takes the module's place in its parent: a shallow copy, of the same class and with
    the same parameters, submodules, hooks and names, so that whatever looks at the layer finds the
    layer; only its forward is ours. `torch.compile` traces through it, and notices it in a model
    compiled before, where a forward hook breaks the graph or is ignored. Hooks of the module, those
    of `output_hidden_states` among them, see what the functions leave.
    """

    @classmethod
    def at(cls, root: nn.Module, path: str) -> "_Splice":
        """The splice at the submodule `path` of `root`: the one that is there, or a new one."""
        parent_path, _, name = path.rpartition(".")
        parent = root.get_submodule(parent_path)
        there = getattr(parent.get_submodule(name).forward, "__self__", None)
        return there if isinstance(there, cls) else cls(parent, name)

    def __init__(self, parent: nn.Module, name: str):
        self.parent = parent
        self.name = name
        self.module = parent.get_submodule(name)
        self.before: list[tuple[int, Callable[..., Any]]] = []
        self.after: list[tuple[int, Callable[..., Any]]] = []
        self.stand_in = copy(self.module)
        self.inner = self.stand_in.forward
        self.stand_in.forward = self.forward
        setattr(parent, name, self.stand_in)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _, function in self.before:
            args, kwargs = function(args, kwargs)
        output = self.inner(*args, **kwargs)
        for _, function in self.after:
            output = function(output)
        return output

    def add_before(self, order: int, function: Callable[..., Any]) -> Callable[[], None]:
        """Call `function(args, kwargs) -> (args, kwargs)` before the module; returns what undoes
        it."""
        return self._add(self.before, order, function)

    def add_after(self, order: int, function: Callable[..., Any]) -> Callable[[], None]:
        """Call `function(output) -> output` after the module; returns what undoes it."""
        return self._add(self.after, order, function)

    def _add(self, functions: list, order: int, function: Callable[..., Any]):
        # By order of the hook points: resid_mid is made of resid_pre and attn_out, and must see
        # what the functions there left.
        entry = (order, function)
        functions.append(entry)
        functions.sort(key=itemgetter(0))

        def remove() -> None:
            functions.remove(entry)
            if not self.before and not self.after:
                self._restore()

        return remove

    def _restore(self) -> None:
        # What was set meanwhile, as by model.eval(), was set on the stand-in.
        meanwhile = {k: v for k, v in vars(self.stand_in).items() if k != "forward"}
        vars(self.module).update(meanwhile)
        setattr(self.parent, self.name, self.module)


def _on_input(function: Callable[[Tensor], Tensor | None]):
    """`function` applied to the stream that a block is called with, wherever it is passed."""

    def before(args, kwargs):
        new = function(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return args, kwargs
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return before


def _on_output(function: Callable[[Tensor], Tensor | None]):
    """`function` applied to a tensor output, or to a tuple's first element."""

    def after(output):
        if not isinstance(output, tuple):
            new = function(output)
            return output if new is None else new
        new = function(output[0])
        return output if new is None else (new, *output[1:])

    return after
