"""Reductions of the losses on NVIDIA GPUs: the divisor of the mean, the sum of the rows' losses, and its gradient.

The sums take one program each, so that their bits do not depend on the device. And nothing waits for the device, so
that a loss can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, compute_dtype, launch_options, multiprocessors

NONE, MEAN = 0, 1  # PyTorch's numbers for reductions; the third is the sum
# Elements at a time of the kernels of one program, and of a program that scales.
SUM_BLOCK, SCALE_BLOCK = 8192, 4096


@triton.jit(do_not_specialize=["ignore_index"])
def totals_kernel(
    target,  # (rows)
    weight,  # (columns) or None
    totals,  # (2)
    rows,
    columns,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Return the sum of the weights of all targets that are not ignored, and the sum over all classes."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, rows, BLOCK):
        row_target = tl.load(target + begin + i, begin + i < rows, other=0)
        counted = (begin + i < rows) & (row_target != ignore_index)
        if weight is not None:
            counted = counted & (row_target >= 0) & (row_target < columns)
            sums += tl.load(weight + row_target, counted, other=0.0).to(tl.float64)
        else:
            sums += tl.where(counted, 1.0, 0.0)
    tl.store(totals, tl.sum(sums, 0).to(totals.dtype.element_ty))
    if weight is not None:
        sums = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, columns, BLOCK):
            sums += tl.load(weight + begin + i, begin + i < columns, other=0.0).to(tl.float64)
        tl.store(totals + 1, tl.sum(sums, 0).to(totals.dtype.element_ty))


@triton.jit
def reduce_kernel(
    losses,  # (rows)
    totals,  # (2)
    out,  # ()
    rows,
    AVERAGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, rows, BLOCK):
        sums += tl.load(losses + begin + i, begin + i < rows, other=0.0).to(tl.float64)
    result = tl.sum(sums, 0)
    if AVERAGED:
        result = result / tl.load(totals).to(tl.float64)
    tl.store(out, result.to(out.dtype.element_ty))


@triton.jit
def scale_kernel(
    x,  # (size)
    factor,  # ()
    size,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(x.dtype.element_ty)
    if by != 1.0:
        i = tl.arange(0, BLOCK)
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        for _ in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            inside = begin + i < size
            tl.store(x + begin + i, tl.load(x + begin + i, inside) * by, inside)
            begin += tl.num_programs(0).to(tl.int64) * BLOCK


def totals_of(
    input: Tensor,
    classes: int,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Return the divisor of the mean and the sum of the class weights, computing only what is needed of them."""
    totals = torch.empty(2, dtype=compute_dtype(input.dtype), device=input.device)
    if reduction == MEAN or (weight is not None and label_smoothing > 0.0):
        totals_kernel[(1,)](
            target, weight, totals, target.numel(), classes, ignore_index, BLOCK=SUM_BLOCK, **launch_options(32)
        )
    return totals


def reduced(losses: Tensor, totals: Tensor, reduction: int) -> Tensor:
    """Return the mean or the sum of the rows' losses, taken in order, or the losses themselves without a reduction."""
    if reduction == NONE:
        return losses
    out = torch.empty((), dtype=losses.dtype, device=losses.device)
    reduce_kernel[(1,)](
        losses, totals, out, losses.numel(), AVERAGED=reduction == MEAN, BLOCK=SUM_BLOCK, **launch_options(32)
    )
    return out


def scale_unless_one_(x: Tensor, factor: Tensor) -> Tensor:
    """Compute x *= factor, a scalar at which only the device looks; where it is 1, x, contiguous, is not touched."""
    if x.numel() > 0:
        programs = min(multiprocessors(x) * 8, cdiv(x.numel(), SCALE_BLOCK))
        scale_kernel[(programs,)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, **launch_options(8))
    return x
