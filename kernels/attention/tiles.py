"""What the attention kernels share: tiles of rows, scores, and what hides keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Kinds of masks.
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(
    source,  # descriptor of (B, H, rows, columns), or pointer to one head's first element
    batch,
    head,
    first,
    first_column,
    rows,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows [first, first + ROWS) and columns [first_column, first_column + COLUMNS); 0 where there are none."""
    if DESCRIPTORS:
        tile = tl.reshape(source.load([batch, head, first, first_column]), [ROWS, COLUMNS])
    else:
        row = first + tl.arange(0, ROWS).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)
        at = source + row[:, None] * row_stride + column[None, :] * column_stride
        inside = (row < rows)[:, None]
        if CHECK_COLUMNS:
            inside = inside & (column < columns)[None, :]
        tile = tl.load(at, inside, other=0.0)
    return tile


# A precision of its own: Triton's interpreter takes the bits of bfloat16 for integers, so there they become float32.
WIDENED = tl.constexpr("widened")


@triton.jit
def product(a, b, accumulated, PRECISION: tl.constexpr):
    """a b + accumulated (or None), in float32."""
    if PRECISION == WIDENED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulated)
    else:
        result = tl.dot(a, b, accumulated, input_precision=PRECISION)
    return result


@triton.jit
def hide(
    scores,  # (ROWS, COLUMNS), to be added to in base 2
    mask_rows,  # (ROWS) pointers to the rows of the mask; unused without one
    mask_column_stride,
    row,  # (ROWS): which query each row is
    row_inside,  # (ROWS): whether there is such a query
    column,  # (COLUMNS): which key
    keys,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
    MASK: tl.constexpr,
):
    """The scores with -inf where a key is hidden, and with an additive mask added.

    EDGE: whether the tile may reach beyond the last key, or across the diagonal.
    """
    if MASK != NO_MASK:
        at = mask_rows[:, None] + column.to(tl.int64)[None, :] * mask_column_stride
        inside = row_inside[:, None] & (column < keys)[None, :]
        if MASK == BOOLEAN:
            scores = tl.where(tl.load(at, inside, other=0), scores, float("-inf"))
        else:
            scores += tl.load(at, inside, other=float("-inf")).to(tl.float32) * LOG2_E
    if EDGE:
        visible = (column < keys)[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= row[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores
