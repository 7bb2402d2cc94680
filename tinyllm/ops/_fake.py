"""Shapes of operators for the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tinyllm.ops import _cuda, _triton


def register_fake(
    name: str, library: torch.library.Library | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give an operator its shapes, in each backend's namespace that has it, and in this library."""
    from tinyllm import _extension

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _extension.loaded:
            torch.library.register_fake(f"tinyllm::{name}")(function)
        if _triton.has(name):
            torch.library.register_fake(f"{_triton.NAMESPACE}::{name}", lib=_triton.library)(function)
        if library is not None:
            torch.library.register_fake(f"{library.ns}::{name}", lib=library)(function)
        if _cuda.emulated and _cuda.has(name):
            torch.library.register_fake(f"{_cuda.EMULATED_NAMESPACE}::{name}")(function)
        return function

    return register
