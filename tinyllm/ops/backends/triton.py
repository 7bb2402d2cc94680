"""The Triton kernels as operators: `torch.ops.tinyllm_triton.*`, with the names and arguments of the compiled ones.

A namespace of their own, because one process may have both for the same device: CPU tensors go to the compiled kernels,
or, where Triton interprets, to these. Schemas are the launchers' own signatures.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_installed = importlib.util.find_spec("triton") is not None
# As Triton reads it. It is not imported to ask, because that takes long and is of no use without a GPU.
interpreted = _installed and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_library = torch.library.Library("tinyllm_triton", "DEF")
defined: list[str] = []  # raw operators


def _absent() -> str | None:
    if not _installed:
        return "triton is not installed (the extra tinyllm[gpu] brings it)"
    if torch.version.cuda is None and not interpreted:
        return "this build of torch has no CUDA"
    return None


why_not = _absent()


def unavailable(device_type: str, forced: bool, here: bool) -> str | None:
    """Return why the Triton kernels serve no tensors of a device type; see `Backend`."""
    if device_type == "cpu" and interpreted:
        if not forced:
            return "it serves CUDA tensors; in its interpreter, CPU tensors where it is forced"
    elif device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type} ones"
    return why_not if here else None


def provide(raw: Sequence[str], source: str) -> str | None:
    """Define the raw operators of an operator from its launchers in kernels/<source>.py; see `Backend`."""
    define(source, *raw)
    return None


def define(source: str, *names: str) -> None:
    """Define launchers of kernels/<source>.py as raw operators. Where the file does not load, `why_not` says so."""
    global why_not
    if why_not is not None:
        return
    try:
        module = importlib.import_module(f"tinyllm.kernels.{source}")
    except ImportError as error:
        why_not = f"triton does not load: {error}"
        return
    for name in names:
        launcher = getattr(module, name)
        schema = torch.library.infer_schema(launcher, mutates_args=())
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA") if interpreted else ("CUDA",):
            _library.impl(name, _on_its_device(launcher), key)
        defined.append(name)


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and stream; this makes the current device the first argument's."""

    @functools.wraps(launcher)
    def run(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launcher(first, *arguments)
        with torch.cuda.device(first.device):
            return launcher(first, *arguments)

    return run


def has(name: str) -> bool:
    """Return whether there is a kernel for a raw operator."""
    return why_not is None and name in defined


def operators() -> Any:
    """Return the namespace of the raw operators."""
    return torch.ops.tinyllm_triton
