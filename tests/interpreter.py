"""Triton's interpreter, which runs the kernels of the tests where there is no GPU, made faster.

It patches `triton.language` at each launch, and again at each call of a device function inside of
the kernel, where that changes nothing: a third of the time of the kernel tests.
"""

from functools import cache
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any


def patch_the_language_once_per_launch() -> None:
    """Skip the repeated patches. Does nothing with a Triton whose interpreter works otherwise."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
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
