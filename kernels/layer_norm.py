"""layer_norm, add_layer_norm and rms_norm on NVIDIA GPUs.

Forward: a program takes a tile of whole rows into registers: one read, one write, and statistics in two passes over
what is in registers (Ba et al. 2016; Zhang & Sennrich 2019 for RMS). Rows too wide for registers are read three times,
twice of them from the second-level cache.

Backward: with g = grad * weight and n = (x - mean) * rstd, of each row

    grad_x      = rstd * (g - mean(g) - n * mean(g * n))        (RMS: without mean(g))
    grad_weight = sum over rows of grad * n
    grad_bias   = sum over rows of grad

A fixed number of programs go through the rows, a grid's width apart, and keep the sums over their rows in registers;
a second, small kernel adds the programs' sums in their order. So x and grad are read once, and the bits depend on the
device alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    cdiv,
    compute_dtype,
    launch_options,
    multiprocessors,
    next_power_of_2,
    triton_compute_dtype,
    warps_for,
)

# Elements that a program, and a thread, hold of each tensor; in float64 a quarter as many.
FORWARD_TILE, BACKWARD_TILE = 4096, 4096
PER_THREAD = 16
# Columns up to which a whole row is held in registers.
FORWARD_ROW, BACKWARD_ROW = 16384, 8192
# Columns at a time of rows that are wider.
WIDE_BLOCK = 4096
# Bytes on their way to shared memory: two tiles ahead where that many suffice. The smallest chips have 99 KiB.
AHEAD_BYTES = 96 * 1024
SUM_ROWS, SUM_COLUMNS = 128, 16


@triton.jit
def forward_kernel(
    x,  # (rows, columns), x_row elements from row to row
    residual,  # likewise, or None
    weight,  # (columns) or None
    bias,  # (columns) or None
    normed,  # (rows, columns)
    total,  # (rows, columns): x + residual; None without residual
    mean,  # (rows) or None
    rstd,  # (rows)
    x_row,
    residual_row,
    rows,
    columns,
    eps,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], inside, other=0.0)
    if residual is not None:
        value = value.to(COMPUTE) + tl.load(residual + row[:, None] * residual_row + column[None, :], inside, other=0.0)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, inside)
    value = value.to(COMPUTE)
    if CENTERED:
        row_mean = tl.sum(value, 1) / columns
        tl.store(mean + row, row_mean, row < rows)
        value = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(rstd + row, row_rstd, row < rows)
    value = value * row_rstd[:, None]
    if weight is not None:
        value *= tl.load(weight + column, column < columns, other=0.0).to(COMPUTE)[None, :]
    if bias is not None:
        value += tl.load(bias + column, column < columns, other=0.0).to(COMPUTE)[None, :]
    tl.store(normed + at, value.to(normed.dtype.element_ty), inside)


@triton.jit
def forward_wide_kernel(
    x,  # (rows, columns), x_row elements from row to row
    residual,  # likewise, or None
    weight,  # (columns) or None
    bias,  # (columns) or None
    normed,  # (rows, columns)
    total,  # (rows, columns): x + residual; None without residual
    mean,  # (rows) or None
    rstd,  # (rows)
    x_row,
    residual_row,
    columns,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x += row * x_row
    normed += row * columns
    sums = tl.zeros([BLOCK], COMPUTE)
    if residual is not None:
        residual += row * residual_row
        total += row * columns
    for begin in range(0, columns, BLOCK):
        inside = begin + column < columns
        value = tl.load(x + begin + column, inside, other=0.0).to(COMPUTE)
        if residual is not None:
            value += tl.load(residual + begin + column, inside, other=0.0)
            value = value.to(total.dtype.element_ty)
            tl.store(total + begin + column, value, inside)
            value = value.to(COMPUTE)
        sums += value
    tl.debug_barrier()  # in spite of its name: what one thread wrote, another may read back
    source = x
    if residual is not None:
        source = total
    row_mean = 0.0
    if CENTERED:
        row_mean = tl.sum(sums, 0) / columns
        tl.store(mean + row, row_mean)
    squares = tl.zeros([BLOCK], COMPUTE)
    for begin in range(0, columns, BLOCK):
        inside = begin + column < columns
        value = tl.load(source + begin + column, inside, other=0.0).to(COMPUTE)
        if CENTERED:
            value = tl.where(inside, value - row_mean, 0.0)
        squares += value * value
    row_rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / columns + eps)
    tl.store(rstd + row, row_rstd)
    for begin in range(0, columns, BLOCK):
        inside = begin + column < columns
        value = tl.load(source + begin + column, inside, other=0.0).to(COMPUTE)
        value = (value - row_mean) * row_rstd if CENTERED else value * row_rstd
        if weight is not None:
            value *= tl.load(weight + begin + column, inside, other=0.0).to(COMPUTE)
        if bias is not None:
            value += tl.load(bias + begin + column, inside, other=0.0).to(COMPUTE)
        tl.store(normed + begin + column, value.to(normed.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad,  # (rows, columns), grad_row elements from row to row
    grad_sum,  # likewise, or None: added to grad_x
    x,  # (rows, columns), x_row elements from row to row
    weight,  # (columns) or None
    mean,  # (rows) or None
    rstd,  # (rows)
    grad_x,  # (rows, columns)
    weight_parts,  # (programs, columns) or None
    bias_parts,  # (programs, columns) or None
    grad_row,
    grad_sum_row,
    x_row,
    rows,
    columns,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if weight is not None:
        scale = tl.load(weight + column, column < columns, other=0.0).to(COMPUTE)[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], COMPUTE)
    bias_sum = tl.zeros([ROWS, BLOCK], COMPUTE)
    for begin in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = tl.load(grad + row[:, None] * grad_row + column[None, :], inside, other=0.0).to(COMPUTE)
        n = tl.load(x + row[:, None] * x_row + column[None, :], inside, other=0.0).to(COMPUTE)
        row_rstd = tl.load(rstd + row, row < rows, other=0.0)[:, None]
        if CENTERED:
            n -= tl.load(mean + row, row < rows, other=0.0)[:, None]
        n = tl.where(inside, n * row_rstd, 0.0)
        if weight_parts is not None:
            weight_sum += g * n
        if bias_parts is not None:
            bias_sum += g
        if weight is not None:
            g *= scale
        result = g - n * (tl.sum(g * n, 1) / columns)[:, None]
        if CENTERED:
            result -= (tl.sum(g, 1) / columns)[:, None]
        result *= row_rstd
        if grad_sum is not None:
            result += tl.load(grad_sum + row[:, None] * grad_sum_row + column[None, :], inside, other=0.0).to(COMPUTE)
        tl.store(grad_x + row[:, None] * columns + column[None, :], result.to(grad_x.dtype.element_ty), inside)
    part = program.to(tl.int64) * columns + column
    if weight_parts is not None:
        tl.store(weight_parts + part, tl.sum(weight_sum, 0), column < columns)
    if bias_parts is not None:
        tl.store(bias_parts + part, tl.sum(bias_sum, 0), column < columns)


@triton.jit
def backward_wide_kernel(
    grad,  # (rows, columns), grad_row elements from row to row
    grad_sum,  # likewise, or None: added to grad_x
    x,  # (rows, columns), x_row elements from row to row
    weight,  # (columns) or None
    mean,  # (rows) or None
    rstd,  # (rows)
    grad_x,  # (rows, columns)
    grad_row,
    grad_sum_row,
    x_row,
    columns,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row_rstd = tl.load(rstd + row)
    row_mean = 0.0
    if CENTERED:
        row_mean = tl.load(mean + row)
    along_n = tl.zeros([BLOCK], COMPUTE)
    along_one = tl.zeros([BLOCK], COMPUTE)
    for begin in range(0, columns, BLOCK):
        inside = begin + column < columns
        g = tl.load(grad + row * grad_row + begin + column, inside, other=0.0).to(COMPUTE)
        n = (tl.load(x + row * x_row + begin + column, inside, other=0.0).to(COMPUTE) - row_mean) * row_rstd
        if weight is not None:
            g *= tl.load(weight + begin + column, inside, other=0.0).to(COMPUTE)
        along_n += tl.where(inside, g * n, 0.0)
        along_one += g
    mean_along_n = tl.sum(along_n, 0) / columns
    mean_along_one = tl.sum(along_one, 0) / columns
    for begin in range(0, columns, BLOCK):
        inside = begin + column < columns
        g = tl.load(grad + row * grad_row + begin + column, inside, other=0.0).to(COMPUTE)
        n = (tl.load(x + row * x_row + begin + column, inside, other=0.0).to(COMPUTE) - row_mean) * row_rstd
        if weight is not None:
            g *= tl.load(weight + begin + column, inside, other=0.0).to(COMPUTE)
        result = g - n * mean_along_n
        if CENTERED:
            result -= mean_along_one
        result *= row_rstd
        if grad_sum is not None:
            result += tl.load(grad_sum + row * grad_sum_row + begin + column, inside, other=0.0).to(COMPUTE)
        tl.store(grad_x + row * columns + begin + column, result.to(grad_x.dtype.element_ty), inside)


@triton.jit
def parameter_parts_wide_kernel(
    grad,  # (rows, columns), grad_row elements from row to row
    x,  # (rows, columns), x_row elements from row to row
    mean,  # (rows) or None
    rstd,  # (rows)
    weight_parts,  # (parts, columns)
    bias_parts,  # (parts, columns) or None
    grad_row,
    x_row,
    rows,
    columns,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight_sum = tl.zeros([BLOCK], COMPUTE)
    bias_sum = tl.zeros([BLOCK], COMPUTE)
    row = tl.program_id(1).to(tl.int64)
    for _ in range(tl.program_id(1), rows, tl.num_programs(1)):
        g = tl.load(grad + row * grad_row + column, inside, other=0.0).to(COMPUTE)
        n = tl.load(x + row * x_row + column, inside, other=0.0).to(COMPUTE)
        if CENTERED:
            n -= tl.load(mean + row)
        weight_sum += g * n * tl.load(rstd + row)
        bias_sum += g
        row += tl.num_programs(1)
    part = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(weight_parts + part, weight_sum, inside)
    if bias_parts is not None:
        tl.store(bias_parts + part, bias_sum, inside)


@triton.jit
def sum_parts_kernel(
    weight_parts,  # (count, columns)
    bias_parts,  # likewise; only there if the launch has a second row of programs
    grad_weight,  # (columns)
    grad_bias,  # likewise
    count,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts, out = weight_parts, grad_weight
    if bias_parts is not None and tl.program_id(1) == 1:
        parts, out = bias_parts, grad_bias
    sums = tl.zeros([ROWS, BLOCK], COMPUTE)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < columns)[None, :]
        sums += tl.load(parts + row[:, None] * columns + column[None, :], inside, other=0.0)
    tl.store(out + column, tl.sum(sums, 0), column < columns)


def layer_norm_fwd(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, _, mean, rstd = forward(input, None, normalized_shape, weight, bias, eps, centered=True)
    assert mean is not None
    return normed, mean, rstd


def add_layer_norm_fwd(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, total, mean, rstd = forward(input, residual, normalized_shape, weight, bias, eps, centered=True)
    assert total is not None
    assert mean is not None
    return normed, total, mean, rstd


def rms_norm_fwd(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    normed, _, _, rstd = forward(input, None, normalized_shape, weight, None, eps, centered=False)
    return normed, rstd


def layer_norm_bwd(
    grad: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, None, input, normalized_shape, weight, mean, rstd, parameter_grads)


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad_normed, grad_sum, sum, normalized_shape, weight, mean, rstd, parameter_grads)


def rms_norm_bwd(
    grad: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    rstd: Tensor,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = backward(grad, None, input, normalized_shape, weight, None, rstd, parameter_grads)
    return grad_input, grad_weight


def _as_rows(x: Tensor, columns: int) -> Tensor:
    """Return (rows, columns) with neighbouring columns side by side; a copy only where the strides ask for one."""
    rows = x.reshape(x.numel() // max(1, columns), columns)
    return rows if columns < 2 or rows.stride(1) == 1 else rows.contiguous()


def _columns(normalized_shape: Sequence[int]) -> int:
    columns = 1
    for size in normalized_shape:
        columns *= size
    return columns


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1).contiguous()


def _held(elements: int, compute: torch.dtype) -> int:
    """Return how many elements fit into the registers that hold so many float32 elements without spills."""
    return elements // 4 if compute == torch.float64 else elements


def _tile(columns: int, elements: int, compute: torch.dtype) -> tuple[int, int, int]:
    """Return the rows and columns of a tile, powers of two, and its number of warps."""
    block = next_power_of_2(columns)
    rows = max(1, min(64, _held(elements, compute) // block))
    return rows, block, warps_for(rows * block, _held(PER_THREAD, compute))


def forward(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    columns = _columns(normalized_shape)
    x = _as_rows(input, columns)
    r = None if residual is None else _as_rows(residual, columns)
    normed = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    total = None if residual is None else torch.empty_like(normed)
    shape, compute = input.shape[: input.dim() - len(normalized_shape)], compute_dtype(input.dtype)
    mean = torch.empty(shape, dtype=compute, device=input.device) if centered else None
    rstd = torch.empty(shape, dtype=compute, device=input.device)
    rows = rstd.numel()
    if input.numel() == 0:
        return normed, total, mean, rstd
    common = (x, r, _flat(weight), _flat(bias), normed, total, mean, rstd, x.stride(0), 0 if r is None else r.stride(0))
    constants = {"CENTERED": centered, "COMPUTE": triton_compute_dtype(input.dtype)}
    if columns > _held(FORWARD_ROW, compute):
        forward_wide_kernel[(rows,)](*common, columns, eps, BLOCK=WIDE_BLOCK, **launch_options(8), **constants)
    else:
        tile_rows, block, warps = _tile(columns, FORWARD_TILE, compute)
        forward_kernel[(cdiv(rows, tile_rows),)](
            *common, rows, columns, eps, ROWS=tile_rows, BLOCK=block, **launch_options(warps), **constants
        )
    return normed, total, mean, rstd


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns, rows = _columns(normalized_shape), rstd.numel()
    centered, compute = mean is not None, compute_dtype(input.dtype)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    shape = list(normalized_shape) if parameter_grads else [0]
    grad_weight = torch.empty(shape, dtype=compute, device=input.device)
    grad_bias = torch.empty(shape if centered else [0], dtype=compute, device=input.device)
    if input.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    g, x = _as_rows(grad, columns), _as_rows(input, columns)
    s = None if grad_sum is None else _as_rows(grad_sum, columns)
    strides = (g.stride(0), 0 if s is None else s.stride(0), x.stride(0))
    tile_rows, block, warps = _tile(columns, BACKWARD_TILE, compute)
    wide = columns > _held(BACKWARD_ROW, compute)
    # As many as run at a time: a thread needs up to 128 registers.
    programs = multiprocessors(input) * (1 if warps > 8 and not wide else 2)
    programs = min(programs, rows if wide else cdiv(rows, tile_rows))
    weight_parts = bias_parts = None
    if parameter_grads:
        weight_parts = torch.empty((programs, columns), dtype=compute, device=input.device)
        bias_parts = torch.empty_like(weight_parts) if centered else None
    constants = {"CENTERED": centered, "COMPUTE": triton_compute_dtype(input.dtype)}
    common = (g, s, x, _flat(weight), mean, rstd, grad_input)
    if wide:
        backward_wide_kernel[(rows,)](*common, *strides, columns, BLOCK=WIDE_BLOCK, **launch_options(8), **constants)
        if weight_parts is not None:
            parameter_parts_wide_kernel[(cdiv(columns, 1024), programs)](
                g, x, mean, rstd, weight_parts, bias_parts, strides[0], strides[2], rows, columns, BLOCK=1024,
                **launch_options(4), **constants,
            )  # fmt: skip
    else:
        tile_bytes = tile_rows * block * (g.itemsize + x.itemsize + (0 if s is None else s.itemsize))
        backward_kernel[(programs,)](
            *common, weight_parts, bias_parts, *strides, rows, columns, ROWS=tile_rows, BLOCK=block,
            STAGES=3 if 2 * tile_bytes <= AHEAD_BYTES else 2, **launch_options(warps), **constants,
        )  # fmt: skip
    if weight_parts is not None:
        sum_parts_kernel[(cdiv(columns, SUM_COLUMNS), 1 + centered)](
            weight_parts, bias_parts, grad_weight, grad_bias, programs, columns, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS,
            COMPUTE=constants["COMPUTE"], **launch_options(4),
        )  # fmt: skip
    return grad_input, grad_weight, grad_bias
