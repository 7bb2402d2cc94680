"""A quicker interpreter of Triton's kernels."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def patch_language_once() -> None:
    """Have the interpreter patch Triton's language once a launch and module.

    It does so at every call of a function within a kernel, too, which takes two fifths of its time and changes nothing:
    what is patched lasts until the launch ends.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        try:
            launch(self, *arguments, **options)
        finally:
            patched.clear()  # what the launch has patched, it has undone

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
