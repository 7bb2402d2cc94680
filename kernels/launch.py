"""Helpers of the launchers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Interpreted on the CPU (TRITON_INTERPRET=1), where there are no multiprocessors: enough programs for loops to wrap.
_INTERPRETED_MULTIPROCESSORS = 4
# The interpreter runs what the newest chips run, tensor descriptors too.
_INTERPRETED_CAPABILITY = (9, 0)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU, which TRITON_INTERPRET decides at import."""
    return bool(triton.knobs.runtime.interpret)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return `compute_dtype` as a kernel's constant."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def multiprocessors(tensor: Tensor) -> int:
    """Return the number of multiprocessors of the tensor's device."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else _INTERPRETED_MULTIPROCESSORS


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def capability(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability, (major, minor), of the tensor's device."""
    return _capability(tensor.get_device()) if tensor.is_cuda else _INTERPRETED_CAPABILITY


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# Triton's functions of these names take some microseconds each time.
def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int, per_thread: int, most: int = 16) -> int:
    """Return the number of warps, a power of two, with which each thread holds `per_thread` elements of a tile."""
    return max(1, min(most, elements // (32 * per_thread)))


def launch_options(warps: int) -> dict[str, Any]:
    """Return the options of a launch. Multiply-adds are fused, which later versions of Triton do only on request."""
    return {"num_warps": warps, "enable_fp_fusion": True}
