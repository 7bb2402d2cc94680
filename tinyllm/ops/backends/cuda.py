"""The CUDA C++ kernels: whether they are there, and for which GPUs.

They implement the operators that the compiled extension declares, `torch.ops.tinyllm.*`, for CUDA tensors. Without a
GPU their arithmetic can be tried on CPU tensors: TINYLLM_EMULATED_CUDA, read at import, is the path of a build of the
same sources for the host (tests/emulation), whose operators are `torch.ops.tinyllm_host.*`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from tinyllm.ops._compiler import constant_for_compiler
from tinyllm.ops.backends import cpp

EMULATED_NAMESPACE = "tinyllm_host"
# Older ones lack bfloat16 and asynchronous copies. Triton's kernels need the same.
_MINIMUM_CAPABILITY = (8, 0)


def _load() -> tuple[bool, str | None]:
    """Whether the kernels are emulated, and why they serve no CUDA tensors."""
    path = os.environ.get("TINYLLM_EMULATED_CUDA")
    if not path:
        return False, cpp.cuda_why_not
    failure = cpp.load_operators(path)
    if failure is not None:
        return False, f"TINYLLM_EMULATED_CUDA does not load: {failure}"
    return True, "it is emulated, for CPU tensors"


emulated, why_not = _load()


def operators() -> Any:
    """The namespace of the raw operators."""
    return torch.ops.tinyllm_host if emulated else torch.ops.tinyllm


def has(name: str) -> bool:
    """Whether this build has a kernel for a raw operator."""
    if not emulated:
        return why_not is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"tinyllm::{name}", "CUDA")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{EMULATED_NAMESPACE}::{name}", "CPU")


def may_serve(tensor: Tensor) -> bool:
    """Whether the limits of these kernels are of interest for a tensor at all."""
    return tensor.is_cuda or emulated


_capability = functools.cache(torch.cuda.get_device_capability)


@constant_for_compiler
def too_old(index: int) -> str | None:
    """Why neither these kernels nor Triton's run on a GPU."""
    found = _capability(index)
    if found >= _MINIMUM_CAPABILITY:
        return None
    return f"it needs compute capability 8.0 or later; cuda:{index} has {'.'.join(map(str, found))}"


@functools.cache
def _norm_columns(index: int) -> int:
    """What the library says of a GPU: it depends on the code that was compiled for it, not on the GPU alone."""
    ask = ctypes.CDLL(os.environ["TINYLLM_EMULATED_CUDA"] if emulated else str(cpp.cuda_path()))
    ask.tinyllm_norm_columns.restype = ctypes.c_int64
    return int(ask.tinyllm_norm_columns(ctypes.c_int32(index)))


@constant_for_compiler
def _most_columns(index: int) -> int:
    return _norm_columns(index)


def most_columns(tensor: Tensor) -> int:
    """Return how wide the rows may be that the norms' kernels hold in registers on a tensor's GPU."""
    return _most_columns(0 if emulated else tensor.get_device())
