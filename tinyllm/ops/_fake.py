"""Shapes of operators for the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tinyllm.ops import _cuda, _triton


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives an operator its shapes, in each namespace that has it."""
    from tinyllm import _extension

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _extension.loaded:
            torch.library.register_fake(f"tinyllm::{name}")(function)
        if _triton.has(name):
            torch.library.register_fake(f"{_triton.NAMESPACE}::{name}", lib=_triton.library)(function)
        if _cuda.emulated and _cuda.has(name):
            torch.library.register_fake(f"{_cuda.EMULATED_NAMESPACE}::{name}")(function)
        return function

    return register
