"""The Triton kernels as operators: `torch.ops.tinyllm_triton.*`, with the names and arguments of the compiled ones.

A namespace of their own, because one process may have both for the same device: CPU tensors go to the compiled kernels,
or, where Triton interprets, to these. Schemas are the launchers' own signatures.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "tinyllm_triton"

# File -> the launchers that become operators.
_LAUNCHERS = {
    "layer_norm": (
        "layer_norm_fwd",
        "layer_norm_bwd",
        "add_layer_norm_fwd",
        "add_layer_norm_bwd",
        "rms_norm_fwd",
        "rms_norm_bwd",
    ),
    "random": ("dropout_factors",),
    "embedding": ("embedding_fwd", "embedding_bwd"),
    "cross_entropy": ("cross_entropy_fwd", "cross_entropy_bwd"),
    "linear_cross_entropy": ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
    "attention": ("attention_fwd", "attention_bwd"),
}

library: torch.library.Library | None = None


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and stream; this makes the current device the first argument's."""

    @functools.wraps(launcher)
    def run(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launcher(first, *arguments)
        with torch.cuda.device(first.device):
            return launcher(first, *arguments)

    return run


def _register() -> tuple[bool, str | None]:
    """Defines the operators; whether Triton interprets, and why they are not there."""
    global library
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (the extra tinyllm[gpu] brings it)"
    import os

    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if torch.version.cuda is None and not interpreted:
        return False, "this build of torch has no CUDA"  # and its users need not wait for the import of triton
    try:
        modules = {name: importlib.import_module(f"tinyllm.kernels.{name}") for name in _LAUNCHERS}
    except ImportError as error:
        return interpreted, f"triton does not load: {error}"
    library = torch.library.Library(NAMESPACE, "DEF")
    for module, names in _LAUNCHERS.items():
        for name in names:
            launcher = getattr(modules[module], name)
            schema = torch.library.infer_schema(launcher, mutates_args=())
            library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            for key in ("CPU", "CUDA") if interpreted else ("CUDA",):
                library.impl(name, _on_its_device(launcher), key)
    return interpreted, None


interpreted, why_not = _register()


def has(name: str) -> bool:
    """Whether there is such a raw operator."""
    return why_not is None and any(name in names for names in _LAUNCHERS.values())
