"""The CUDA C++ kernels: whether they are there, and for which GPUs.

They implement the operators that the compiled extension declares, `torch.ops.tinyllm.*`, for CUDA tensors. Without a
GPU their arithmetic can be tried on CPU tensors: TINYLLM_EMULATED_CUDA, read at import, is the path of a build of the
same sources for the host (tests/emulation), whose operators are `torch.ops.tinyllm_host.*`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyllm.ops._context import constant_for_compiler
from tinyllm.ops.backends import cpp

# Older ones lack bfloat16 and asynchronous copies. Triton's kernels need the same.
_MINIMUM_CAPABILITY = (8, 0)


def _load() -> tuple[bool, str | None]:
    """Return whether the kernels are emulated, and why they serve no CUDA tensors."""
    path = os.environ.get("TINYLLM_EMULATED_CUDA")
    if not path:
        return False, cpp.cuda_why_not
    failure = cpp.load_operators(path)
    if failure is not None:
        return False, f"TINYLLM_EMULATED_CUDA does not load: {failure}"
    return True, "it is emulated, for CPU tensors"


emulated, why_not = _load()


def unavailable(device_type: str, forced: bool, here: bool) -> str | None:
    """Return why the CUDA C++ kernels serve no tensors of a device type; see `Backend`. `here` makes no difference: not
    every installation for GPUs has them."""
    if device_type == "cpu" and emulated:
        return None if forced else "it serves CUDA tensors; emulated, CPU tensors where it is forced"
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type} ones"
    return why_not


def provide(raw: Sequence[str], source: str) -> str | None:
    """Return why a library that is there has no kernels for an operator, as a build of some of its sources has not."""
    there = emulated or why_not is None
    if not there or all(map(has, raw)):
        return None
    return "this build of the CUDA library has no kernel for it"


def has(name: str) -> bool:
    """Return whether there is a kernel for a raw operator."""
    if not emulated and why_not is not None:
        return False
    if not hasattr(operators(), name):  # of those that only Triton has, nothing is declared
        return False
    key = "CPU" if emulated else "CUDA"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{operators().name}::{name}", key)


def operators() -> Any:
    """Return the namespace of the raw operators."""
    return torch.ops.tinyllm_host if emulated else torch.ops.tinyllm


_capability = functools.cache(torch.cuda.get_device_capability)


@constant_for_compiler
def too_old(index: int) -> str | None:
    """Return why neither these kernels nor Triton's run on a GPU, None where they do."""
    found = _capability(index)
    if found >= _MINIMUM_CAPABILITY:
        return None
    return f"it needs compute capability 8.0 or later; cuda:{index} has {'.'.join(map(str, found))}"


@functools.cache
def _norm_columns(index: int) -> int:
    """Return what the library says: it depends on the code that was compiled for the GPU, not on the GPU alone."""
    ask = ctypes.CDLL(os.environ["TINYLLM_EMULATED_CUDA"] if emulated else str(cpp.cuda_path()))
    ask.tinyllm_norm_columns.restype = ctypes.c_int64
    return int(ask.tinyllm_norm_columns(ctypes.c_int32(index)))


@constant_for_compiler
def _most_columns(index: int) -> int:
    return _norm_columns(index)


def most_columns(tensor: Tensor) -> int:
    """Return how wide the rows may be that the norms' kernels hold in registers on a tensor's GPU."""
    return _most_columns(0 if emulated else tensor.get_device())
