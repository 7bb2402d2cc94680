"""Shapes of operators for the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tinyllm.ops.backends import cuda, triton


def register_fake(
    name: str, library: torch.library.Library | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give an operator its shapes, in each backend's namespace that has it, and in this library."""
    from tinyllm.ops.backends import cpp

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if cpp.loaded:
            torch.library.register_fake(f"tinyllm::{name}")(function)
        if triton.has(name):
            torch.library.register_fake(f"{triton.NAMESPACE}::{name}", lib=triton.library)(function)
        if library is not None:
            torch.library.register_fake(f"{library.ns}::{name}", lib=library)(function)
        if cuda.emulated and cuda.has(name):
            torch.library.register_fake(f"{cuda.EMULATED_NAMESPACE}::{name}")(function)
        return function

    return register
