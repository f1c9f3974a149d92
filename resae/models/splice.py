"""Functions around the forward of a module, by a stand-in that takes its place."""

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import copy, deepcopy
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn


class _Eager:
    """Within it nothing runs compiled. torch has one stance for all threads: the first one in sets
    it, the last one out takes it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


EAGER = _Eager()


_Entry = tuple[int, Callable[..., Any]]
"""Order of its hook point, and a function."""


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
        self.stand_in = copy(self.module)
        self.own = self.inner = self.stand_in.forward
        # Tuples, made anew at every change: passes of other threads may be going through them.
        self.before: tuple[_Entry, ...] = ()
        self.after: tuple[_Entry, ...] = ()
        self.around: tuple[_Entry, ...] = ()
        vars(self.stand_in).update(
            forward=self.forward,
            __deepcopy__=lambda memo: deepcopy(self.plain(), memo),
            __reduce_ex__=lambda protocol: self.plain().__reduce_ex__(protocol),
        )
        setattr(parent, name, self.stand_in)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _, function in self.before:
            args, kwargs = function(args, kwargs)
        output = self.inner(*args, **kwargs)
        for _, function in self.after:
            output = function(output)
        return output

    def plain(self) -> nn.Module:
        """A module without the functions, of the same parameters and submodules."""
        module = copy(self.module)
        vars(module).update(self._meanwhile())
        return module

    def set(self, place: str, entries: Iterable[_Entry]) -> None:
        """Call these functions at one of the places; restore the module if there are none."""
        # By order of the hook points: resid_mid is made of resid_pre and attn_out, and must see
        # what the functions there left.
        setattr(self, place, tuple(sorted(entries, key=itemgetter(0))))
        inner = self.own
        for _, function in self.around:
            inner = partial(function, inner)
        self.inner = inner
        if not self.before and not self.after and not self.around:
            vars(self.module).update(self._meanwhile())
            setattr(self.parent, self.name, self.module)

    def _meanwhile(self) -> dict[str, Any]:
        """Attributes set since, as by `model.eval()`: they were set on the stand-in."""
        ours = ("forward", "__deepcopy__", "__reduce_ex__")
        return {name: value for name, value in vars(self.stand_in).items() if name not in ours}


_STRUCTURE = threading.RLock()
"""Held while stand-ins come and go: also when the garbage collector ends a forgotten context."""


def add_function(
    root: nn.Module, path: str, place: str, order: int, function: Callable[..., Any]
) -> Callable[[], None]:
    """Call `function` at the submodule `path` of `root`; returns what undoes it.

    before  `function(args, kwargs)`, which returns those that the module is called with
    after   `function(output)`, which returns the output
    around  `function(forward, *args, **kwargs)`, which calls the module and returns the output
    """
    entry = (order, function)
    with _STRUCTURE:
        splice = _Splice.at(root, path)
        splice.set(place, (*getattr(splice, place), entry))

    def remove() -> None:
        with _STRUCTURE:
            splice.set(place, (other for other in getattr(splice, place) if other is not entry))

    return remove


def in_this_thread(function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Any]:
    """`function` in the passes of the calling thread; nothing in those of others."""
    thread = threading.local()
    thread.calling = True
    return lambda activation: function(activation) if hasattr(thread, "calling") else None


def around_in_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `around`, in the passes of the calling thread; those of others go on."""
    thread = threading.local()
    thread.calling = True

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if hasattr(thread, "calling"):
            return function(forward, *args, **kwargs)
        return forward(*args, **kwargs)

    return around


def on_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """`function` applied to the stream that a block is called with, wherever it is passed."""

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = function(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return args, kwargs
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return before


def on_output(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """`function` applied to a tensor output, or to a tuple's first element."""

    def after(output: Any) -> Any:
        if not isinstance(output, tuple):
            new = function(output)
            return output if new is None else new
        new = function(output[0])
        return output if new is None else (new, *output[1:])

    return after


def scaled(function: Callable[[Tensor], Tensor | None], scale: float):
    """`function` applied to `scale` times a tensor, where the caller multiplies afterwards."""

    def change(activation: Tensor) -> Tensor | None:
        new = function(activation * scale)
        return None if new is None else new / scale

    return change


def copied(function: Callable[[Tensor], Tensor | None]):
    """`function` applied to a tensor, of which the caller, who writes into it, gets a copy."""

    def change(activation: Tensor) -> Tensor:
        new = function(activation)
        return (activation if new is None else new).clone()

    return change


def flattened(function: Callable[[Tensor], Tensor | None]):
    """Two functions: one takes the stream `[B, T, D]` at the block's beginning, the other applies
    `function` to `[B·T, D]` in the shape of that stream."""
    thread = threading.local()

    def remember(stream: Tensor) -> None:
        thread.shape = stream.shape

    def change(activation: Tensor) -> Tensor | None:
        shape, thread.shape = getattr(thread, "shape", None), None
        if shape is None:  # a pass of another thread, which was in this block before
            return None
        new = function(activation.view(shape))
        return None if new is None else new.reshape(activation.shape)

    return remember, change
