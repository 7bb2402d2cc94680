"""quantized_linear on NVIDIA GPUs: weights in 16, 8 or 4 bits under activations as they are, with sums in float32.

Few rows of activations, as in decoding: the time is that of reading the weight. A program takes some of its rows whole,
so that nothing has to be joined, unpacks them in registers, and multiplies them with every row of activations there.
The layout is the one that the CPU kernels read (`tinyllm.reference.quantized`), and serves as it is: a thread loads
PIECE = 16 bytes, which are 16 columns of int8, or 16 and the 16 that are 32 further of int4, all of one group, so that
a piece takes one scale; the threads of a warp load neighbouring pieces, 512 bytes of a row at once. Only the order of
the sums follows from the layout, and it depends on the sizes alone: the same input gives the same bits.

Many rows: the weight is unpacked once, in the activations' dtype, and cuBLAS multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activated
from .launch import cdiv, launch_options, multiprocessors, next_power_of_2

BLOCK = tl.constexpr(64)  # columns of a block, of which int4 keeps two halves in a byte
PIECE = tl.constexpr(16)  # bytes
INT8_ZERO, INT4_ZERO = tl.constexpr(128.0), tl.constexpr(8.0)  # what is stored for a weight of 0

# So many rows are multiplied in registers, at most MOST_ROWS by a program. For more, unpacking all weights once, and
# reading them again, costs no more than unpacking them for each MOST_ROWS.
FEW_ROWS, MOST_ROWS = 16, 4
# Pieces of a weight's row that a program loads at once.
MOST_PIECES = 64
# Weight's rows of a program are halved, down to one, until there are so many programs for each multiprocessor.
PROGRAMS = 4
# Pieces that a program unpacks.
UNPACK_TILE = 256


@triton.jit
def first_columns(element, BITS: tl.constexpr):
    """Return the column of a stored element; of int4 that of its lower half, the other is half a block further."""
    if BITS == 4:
        element = element // (BLOCK // 2) * BLOCK + element % (BLOCK // 2)
    return element


@triton.jit
def lower(packed, BITS: tl.constexpr):
    """Return stored elements in float32, without their scale; of int4 their lower halves."""
    if BITS == 16:
        result = packed.to(tl.float32)
    elif BITS == 8:
        result = packed.to(tl.float32) - INT8_ZERO
    else:
        result = (packed & 15).to(tl.float32) - INT4_ZERO
    return result


@triton.jit
def upper(packed):
    """Return the upper halves of int4."""
    return (packed >> 4).to(tl.float32) - INT4_ZERO


@triton.jit
def load_pieces(
    data,  # (N, row_elements)
    scales,  # (N, groups), or None for bfloat16
    row,  # (N), int64
    inside,  # (N)
    element,  # (P): each piece's first
    row_elements,
    groups,
    group_size,
    BITS: tl.constexpr,
    J: tl.constexpr,
):
    """Load pieces of rows, (N, P, J), and their scales, (N, P) or 1."""
    at = element[:, None] + tl.arange(0, J)[None, :]
    packed = tl.load(
        data + row[:, None, None] * row_elements + at[None, :, :],
        inside[:, None, None] & (at < row_elements)[None, :, :],
        other=0,
    )
    scale = 1.0
    if BITS < 16:
        group = first_columns(element, BITS) // group_size
        piece_inside = inside[:, None] & (element < row_elements)[None, :]
        scale = tl.load(scales + row[:, None] * groups + group[None, :], piece_inside, other=0.0).to(tl.float32)
    return packed, scale


@triton.jit
def add_products(
    sums,  # (N, P)
    unpacked,  # (N, P, J), float32
    input,  # a row of activations
    column,  # (P): each piece's first
    columns,  # those from here on are 0
    J: tl.constexpr,
):
    """Return sums + unpacked x, summed over the columns of each piece."""
    at = column[:, None] + tl.arange(0, J)[None, :]
    x = tl.load(input + at, at < columns, other=0.0).to(tl.float32)
    return sums + tl.sum(unpacked * x[None, :, :], 2)


@triton.jit
def few_rows_kernel(
    input,  # (rows, in_features), input_row elements from row to row
    data,  # (out_features, row_elements)
    scales,  # (out_features, groups), or None for bfloat16
    bias,  # (out_features), or None
    residual,  # (rows, out_features), or None
    out,  # (rows, out_features)
    input_row,
    rows,
    out_features,
    in_features,
    row_elements,
    groups,
    group_size,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,  # rows of the weight
    P: tl.constexpr,  # pieces of each at once
):
    # Elements of a piece; of int4 they are bytes, of two weights each.
    J: tl.constexpr = PIECE * 8 // 16 if BITS == 16 else PIECE
    parts = tl.cdiv(rows, ROWS)
    first_row = (tl.program_id(0) % parts * ROWS).to(tl.int64)
    n = tl.program_id(0) // parts * N + tl.arange(0, N)
    n_inside = n < out_features
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([N, P], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for first in range(0, row_elements, P * J):
        element = first + tl.arange(0, P) * J
        packed, scale = load_pieces(
            data, scales, n.to(tl.int64), n_inside, element, row_elements, groups, group_size, BITS, J
        )
        column = first_columns(element, BITS)
        added = ()
        for r in tl.static_range(ROWS):
            row = input + (first_row + r) * input_row
            columns = tl.where(first_row + r < rows, in_features, 0)
            products = tl.zeros([N, P], tl.float32)
            products = add_products(products, lower(packed, BITS), row, column, columns, J)
            if BITS == 4:
                products = add_products(products, upper(packed), row, column + BLOCK // 2, columns, J)
            added = added + (sums[r] + products * scale,)  # type: ignore[assignment]  # noqa: RUF005
        sums = added
    for r in tl.static_range(ROWS):
        result = tl.sum(sums[r], 1)
        if bias is not None:
            result += tl.load(bias + n, n_inside, other=0.0).to(tl.float32)
        result = activated(result, ACTIVATION)
        at = (first_row + r) * out_features + n
        stored = n < tl.where(first_row + r < rows, out_features, 0)
        if residual is not None:
            result += tl.load(residual + at, stored, other=0.0).to(tl.float32)
        tl.store(out + at, result.to(out.dtype.element_ty), stored)


@triton.jit
def unpack_kernel(
    ids,  # (rows): which row of the weight each is to be, or None for all in their order
    data,  # (table, row_elements)
    scales,  # (table, groups), or None for bfloat16
    out,  # (rows, in_features)
    rows,
    table,
    in_features,
    row_elements,
    groups,
    group_size,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
):
    J: tl.constexpr = PIECE * 8 // 16 if BITS == 16 else PIECE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    source = row
    if ids is not None:
        source = tl.load(ids + row, row_inside, other=0).to(tl.int64)
    known = (source >= 0) & (source < table)  # what is no id has no row to read
    element = (tl.program_id(1) * P + tl.arange(0, P)) * J
    packed, scale = load_pieces(
        data, scales, source, row_inside & known, element, row_elements, groups, group_size, BITS, J
    )
    if BITS < 16:
        scale = scale[:, :, None]
    column = first_columns(element, BITS)[:, None] + tl.arange(0, J)[None, :]
    to = out + row[:, None, None] * in_features + column[None, :, :]
    low = tl.where(known[:, None, None], lower(packed, BITS) * scale, float("nan")).to(out.dtype.element_ty)
    tl.store(to, low, row_inside[:, None, None] & (column < in_features)[None, :, :])
    if BITS == 4:
        high = tl.where(known[:, None, None], upper(packed) * scale, float("nan")).to(out.dtype.element_ty)
        tl.store(to + BLOCK // 2, high, row_inside[:, None, None] & (column + BLOCK // 2 < in_features)[None, :, :])


def quantized_linear(
    input: Tensor, data: Tensor, scales: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    out = torch.empty((*input.shape[:-1], data.size(0)), dtype=input.dtype, device=input.device)
    if out.numel() == 0:
        return out
    rows = input.reshape(-1, input.size(-1))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    residual = None if residual is None else residual.reshape(-1, data.size(0)).contiguous()
    if rows.size(0) <= FEW_ROWS:
        _few_rows(rows, data, scales, bias, residual, activation, out)
    else:
        _many_rows(rows, data, scales, bias, residual, activation, out.view(-1, data.size(0)))
    return out


def quantized_embedding(input: Tensor, data: Tensor, scales: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((*input.shape, inputs), dtype=dtype, device=input.device)
    _unpack(input.contiguous(), data, scales, out.view(-1, inputs))
    return out


def _few_rows(
    input: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    out_features, bits = data.size(0), _bits(data, input.size(1))
    rows = min(MOST_ROWS, next_power_of_2(input.size(0)))
    pieces = _pieces(data)
    together = 8 // (1 if rows == 1 else 2 if bits > 4 else 4)  # what a thread unpacks is to stay in its registers
    while together > 1 and cdiv(out_features, together) < PROGRAMS * multiprocessors(input):
        together //= 2
    few_rows_kernel[(cdiv(out_features, together) * cdiv(input.size(0), rows),)](
        input, *_contiguous(data, scales, bias), residual, out, input.stride(0),
        input.size(0), out_features, input.size(1), *_sizes(data, scales, input.size(1)),
        BITS=bits, ACTIVATION=activation, ROWS=rows, N=together, P=pieces,
        **launch_options(max(1, min(4, together * pieces // 64))),
    )  # fmt: skip


def _many_rows(
    input: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    whole = data
    if scales is not None or data.dtype != input.dtype:
        whole = torch.empty((data.size(0), input.size(1)), dtype=input.dtype, device=input.device)
        _unpack(None, data, scales, whole)
    if bias is None:
        torch.mm(input, whole.t(), out=out)
    else:
        torch.addmm(bias, input, whole.t(), out=out)
    if activation == "relu":
        out.relu_()
    elif activation == "silu":
        torch.ops.aten.silu_(out)
    elif activation != "none":
        torch.ops.aten.gelu_(out, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is not None:
        out.add_(residual)


def _unpack(ids: Tensor | None, data: Tensor, scales: Tensor | None, out: Tensor) -> None:
    if out.numel() == 0:
        return
    pieces = _pieces(data)
    rows = UNPACK_TILE // pieces if ids is None else 1  # few ids are not to leave most multiprocessors idle
    grid = cdiv(out.size(0), rows), cdiv(data.size(1) * data.element_size(), pieces * PIECE.value)
    unpack_kernel[grid](
        ids, *_contiguous(data, scales), out, out.size(0), data.size(0), out.size(1),
        *_sizes(data, scales, out.size(1)),
        BITS=_bits(data, out.size(1)), ROWS=rows, P=pieces, **launch_options(4 if rows > 1 else 1),
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _pieces(data: Tensor) -> int:
    """Return how many pieces of a row a program loads at once."""
    return min(MOST_PIECES, next_power_of_2(cdiv(data.size(1) * data.element_size(), PIECE.value)))


def _bits(data: Tensor, in_features: int) -> int:
    if data.dtype == torch.bfloat16:
        return 16
    return data.size(1) * 8 // (cdiv(in_features, BLOCK.value) * BLOCK.value)


def _sizes(data: Tensor, scales: Tensor | None, in_features: int) -> tuple[int, int, int]:
    """Return the elements of a stored row, and the number of groups and the columns of each, 0 where there are none."""
    groups = 0 if scales is None else scales.size(1)
    return data.size(1), groups, 0 if groups == 0 else data.size(1) * 8 // _bits(data, in_features) // groups
