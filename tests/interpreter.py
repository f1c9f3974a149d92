"""Triton's interpreter, which runs the kernels of the tests where there is no GPU, made faster: two
to three times, with the same results.

It does the same work again and again: it patches `triton.language` at each launch and at each call
of a device function inside of the kernel, repeats every addition in 64 bits to assert that nothing
overflowed, with assertions off, and makes the shape and the dtype of every value anew.
"""

from functools import cache
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any


def make_faster() -> None:
    """Skip the repeated work. Does nothing with a Triton whose interpreter works otherwise."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        _patch_the_language_once_per_launch(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        _look_dtypes_up_once(interpreter)
    _check_overflow_only_to_assert_it()
    _make_each_shape_once()


def _patch_the_language_once_per_launch(interpreter: Any) -> None:
    patch = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[ModuleType] = set()

    class Scope(interpreter._LangPatchScope):
        """Ends with the launch: a device function does not restore what it has patched."""

        def restore(self) -> None:
            patched.clear()
            super().restore()

    @cache
    def languages_of(fn: FunctionType) -> set[ModuleType]:
        return {language for language in languages if language in fn.__globals__.values()}

    def patch_missing(fn: FunctionType) -> Any:
        found = languages_of(fn)
        if found <= patched:
            return Scope()
        patched.update(found)
        return patch(fn)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_missing


def _look_dtypes_up_once(interpreter: Any) -> None:
    look_up = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = numpy_dtype


def _check_overflow_only_to_assert_it() -> None:
    from triton.language.semantic import TritonSemantic

    check = getattr(TritonSemantic, "binary_op_sanitize_overflow_impl", None)
    if check is None:
        return

    def check_if_asserted(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:  # otherwise `device_assert` drops the result
            check(self, *operation)

    TritonSemantic.binary_op_sanitize_overflow_impl = check_if_asserted


def _make_each_shape_once() -> None:
    from triton.language import core

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [n.value if isinstance(n, core.constexpr) else n for n in shape]
        key = (element_ty.name, *sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = vars(self) | {"handle": None}
        vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__ = init_type
    core.tensor.__init__ = init_tensor
