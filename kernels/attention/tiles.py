"""Functions that the attention kernels share: loading tiles, masking scores, and keeping out what is hidden.

A hidden key or value may be NaN or infinite, and 0 times that is NaN, in a product of tiles as anywhere. So:

- Rows behind key_lengths are cleared in the one tile of a sequence that has both kinds.
- Keys that the diagonal or a bool mask hides from some rows of a tile are visible to others. The kernels multiply as if
  everything were finite, which costs nothing, and look at their sums once, at the end: a NaN there may have come from a
  hidden key. Then they begin again with zeros in place of what is not finite. Forward adds that to the sums of those
  queries that see it; in backward they have a NaN already, from their log-sum-exp or grad V^T.
- In the kernel of keys' gradients each key is a row by itself, so that nothing of it gets into another's sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(3.3e38)  # of what a mask adds, so that with a score it stays finite

# Kinds of masks.
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The tile of results that are made a second time; no other has fewer rows.
ROWS_AGAIN, COLUMNS_AGAIN = tl.constexpr(16), tl.constexpr(32)


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
    """Load rows [first, first + ROWS) and columns [first_column, first_column + COLUMNS), 0 where there are none."""
    if DESCRIPTORS:
        tile = tl.reshape(source.load([batch, head, first, first_column]), [ROWS, COLUMNS])
    else:
        row = first + tl.arange(0, ROWS).to(tl.int64)
        column = first_column + tl.arange(0, COLUMNS)
        at = source + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
        inside = (row < rows)[:, None]
        if CHECK_COLUMNS:
            inside = inside & (column < columns)[None, :]
        tile = tl.load(at, inside, other=0.0)
    return tile


# A precision of its own: Triton's interpreter takes the bits of bfloat16 for integers, so there they become float32.
WIDENED = tl.constexpr("widened")


@triton.jit
def product(a, b, accumulated, PRECISION: tl.constexpr):
    """Compute a b + accumulated (or None), in float32."""
    if PRECISION == WIDENED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulated)
    else:
        result = tl.dot(a, b, accumulated, input_precision=PRECISION)
    return result


@triton.jit
def of_sequence(
    numbers,  # (B), int32 or int64, or None
    batch,
    keys,
    otherwise,
):
    """Return a sequence's number of keys, within 0 ... keys; `otherwise` where there are no such numbers."""
    number = otherwise
    if numbers is not None:
        number = tl.maximum(tl.minimum(tl.load(numbers + batch), keys), 0).to(tl.int32)
    return number


@triton.jit
def clear_rows(tile, row, rows):
    """Return the tile with 0 in the rows from `rows` on."""
    return tl.where((row < rows)[:, None], tile, 0.0).to(tile.dtype)


@triton.jit
def any_nan(
    sums,  # (ROWS, N)
    row_inside,  # (ROWS)
):
    """Return whether any row that is inside has a NaN."""
    return tl.max(((sums != sums) & row_inside[:, None]).to(tl.int32)) > 0


@triton.jit
def finite(tile):
    """Return the tile with 0 where it is NaN or infinite."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def add_infinities(
    sums,  # (ROWS, N)
    visible,  # (ROWS, COLUMNS)
    tile,  # (COLUMNS, N)
    PRECISION: tl.constexpr,
):
    """Return the sums plus the infinite elements that each row sees; a NaN counts as both infinities."""
    for sign in range(0, 2):
        infinity = tl.where(sign == 0, float("inf"), float("-inf"))
        wide = tile.to(tl.float32)
        those = tl.where((wide == infinity) | (wide != wide), 1.0, 0.0).to(tile.dtype)
        seen = product(tl.where(visible, 1.0, 0.0).to(tile.dtype), those, None, PRECISION)
        sums = tl.where(seen > 0.0, sums + infinity, sums)
    return sums


@triton.jit
def hide(
    scores,  # (ROWS, COLUMNS), to be added to in base 2
    mask_rows,  # (ROWS) pointers to the rows of the mask; unused without one
    mask_column_stride,
    last_key,  # (ROWS): up to which key each query sees; unused unless CAUSAL
    row_inside,  # (ROWS): whether there is such a query
    column,  # (COLUMNS): which key
    keys,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
    MASK: tl.constexpr,
):
    """Return the scores with -inf where a key is hidden, and with an additive mask added.

    EDGE: whether the tile may reach beyond the last key, or across the diagonal.
    """
    if MASK != NO_MASK:
        at = mask_rows[:, None] + column.to(tl.int64)[None, :] * mask_column_stride
        inside = row_inside[:, None] & (column < keys)[None, :]
        if MASK == BOOLEAN:
            scores = tl.where(tl.load(at, inside, other=0), scores, float("-inf"))
        else:
            mask = tl.load(at, inside, other=float("-inf")).to(tl.float32)
            bounded = tl.clamp(mask * LOG2_E, -MOST, MOST, tl.PropagateNan.ALL)  # only -inf may become -inf
            scores += tl.where(mask == float("-inf"), mask, bounded)
    if EDGE:
        visible = (column < keys)[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= last_key[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def store_log_total(lse, lse_rest, row, maximum, total, stored, MASK: tl.constexpr):
    """Store the rows' log2 of the sum of exp2, for backward; with an additive mask also what rounding takes from it.

    A mask's most negative number swallows the logarithm: each of n keys that have it would count as 1, not as 1 / n.
    """
    blind = total == 0.0
    log_total = tl.log2(tl.where(blind, 1.0, total))
    maximum = tl.where(blind, 0.0, maximum)
    log_sum = maximum + log_total
    tl.store(lse + row, tl.where(blind, float("-inf"), log_sum), stored)
    if MASK == ADDITIVE:
        tl.store(lse_rest + row, maximum - log_sum + log_total, stored)
