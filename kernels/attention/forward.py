"""Attention, forward (Dao 2023, "FlashAttention-2"): a program keeps a tile of queries and goes through the keys and
values tile by tile. Of the scores it keeps a running maximum and sum; results so far are rescaled when the maximum
moves. Scores are in base 2, with the scale folded into the one multiply-add before exp2. Tiles that no mask, diagonal
or end touches skip all tests; causal programs with the most keys come first. On Hopper and later, tiles arrive by
tensor descriptors (the bulk copy engine), so that no registers or instructions go into addresses.

Heads wider than a chunk (256 columns): the scores are summed over chunks of the head, and each program makes one chunk
of the output's columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..random import kept_elements
from .tiles import (
    ADDITIVE,
    BOOLEAN,
    COLUMNS_AGAIN,
    NO_MASK,
    ROWS_AGAIN,
    add_infinities,
    any_nan,
    clear_rows,
    finite,
    hide,
    load_rows,
    of_sequence,
    product,
    store_log_total,
)


@triton.jit
def attend(
    accumulated,  # (ROWS, DV)
    total,  # (ROWS): sum of exp2(score - maximum)
    maximum,  # (ROWS)
    q,  # (ROWS, D) if CHUNKS is 1, else unused
    query,
    key,
    value,
    rng,
    batch,
    head,
    kv_head,
    first_query,
    first_value_column,
    begin,
    end,
    last_key,
    row_inside,
    mask_rows,
    mask_column_stride,
    dropout_row,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    queries,
    keys,  # visible ones
    all_keys,
    head_dim,
    value_dim,
    scale,  # times log2(e)
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTHS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Accumulate over the keys [begin, end).

    LENGTHS: whether some of all_keys may not be visible.
    AGAIN: whether hidden values may be NaN or infinite, also those that other rows of the tile see.
    """
    for first in tl.range(begin, end, COLUMNS, num_stages=1 if AGAIN else None):
        column = first + tl.arange(0, COLUMNS)
        if CHUNKS == 1:
            k = load_rows(
                key, batch, kv_head, first, 0, all_keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D, DESCRIPTORS
            )
            scores = product(q, tl.trans(k), None, PRECISION)
        else:
            scores = tl.zeros([ROWS, COLUMNS], tl.float32)
            for chunk in range(0, CHUNKS):
                d = chunk * D
                qc = load_rows(
                    query,
                    batch,
                    head,
                    first_query,
                    d,
                    queries,
                    head_dim,
                    q_row,
                    q_column,
                    ROWS,
                    D,
                    CHECK_D,
                    DESCRIPTORS,
                )
                kc = load_rows(
                    key, batch, kv_head, first, d, all_keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D, DESCRIPTORS
                )
                scores = product(qc, tl.trans(kc), scores, PRECISION)
        # A positive scale can wait for the multiply-add before exp2; another one would turn the maximum round, or make
        # a NaN of a hidden key's -inf.
        if MASK == ADDITIVE or SCALE_FIRST:
            scores *= scale
            scores = hide(scores, mask_rows, mask_column_stride, last_key, row_inside, column, keys, CAUSAL, EDGE, MASK)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        else:
            scores = hide(scores, mask_rows, mask_column_stride, last_key, row_inside, column, keys, CAUSAL, EDGE, MASK)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        visible = scores != float("-inf")
        shift = new_maximum
        if MASK != NO_MASK or (CAUSAL and EDGE):  # a row that has seen no key yet: -inf - -inf would be NaN
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        if MASK == ADDITIVE or SCALE_FIRST:
            weights = tl.exp2(scores - shift[:, None])
        else:
            weights = tl.exp2(scores * scale - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        accumulated = accumulated * rescale[:, None]
        if DROPOUT:
            kept = kept_elements(rng, dropout_row, first, all_keys, threshold, COLUMNS)
            weights = tl.where(kept, weights, 0.0)
        v = load_rows(
            value, batch, kv_head, first, first_value_column, all_keys, value_dim, v_row, v_column, COLUMNS, DV,
            CHECK_DV, DESCRIPTORS,
        )  # fmt: skip
        if AGAIN:
            accumulated = product(weights.to(v.dtype), finite(v), accumulated, PRECISION)
            accumulated = add_infinities(accumulated, visible, v, PRECISION)
        else:
            if EDGE and LENGTHS:
                v = clear_rows(v, column, keys)
            accumulated = product(weights.to(v.dtype), v, accumulated, PRECISION)
        maximum = new_maximum
    return accumulated, total, maximum


@triton.jit
def forward_rows(
    query,
    key,
    value,
    mask,
    rng,
    out,
    lse,
    lse_rest,
    batch,
    head,
    kv_head,
    first,
    chunk,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    mask_row,
    mask_column,
    out_row,
    heads,
    queries,
    visible,
    offset,
    keys,
    head_dim,
    value_dim,
    scale,
    threshold,
    kept_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTHS: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Compute the results of the queries [first, first + ROWS) of a head; mask and results point to its first row.

    Returns whether they have to be made AGAIN, because of what hidden values may have been: then none is stored.
    """
    row = first + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)
    row_inside = row < queries
    last_key = offset + row
    end = visible
    full = visible
    if CAUSAL:
        end = tl.minimum(visible, offset + first + ROWS)
        full = tl.minimum(visible, offset + first + 1)
    full = full // COLUMNS * COLUMNS
    mask_rows = row
    if MASK != NO_MASK:
        mask_rows = mask + wide_row * mask_row
    q = load_rows(query, batch, head, first, 0, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D, DESCRIPTORS)
    dropout_row = (batch.to(tl.int64) * heads + head) * queries + row
    accumulated = tl.zeros([ROWS, DV], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    if AGAIN:
        full = 0
    else:
        accumulated, total, maximum = attend(
            accumulated, total, maximum, q, query, key, value, rng, batch, head, kv_head, first, chunk * DV, 0, full,
            last_key, row_inside, mask_rows, mask_column, dropout_row, q_row, q_column, k_row, k_column, v_row,
            v_column, queries, visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, CHUNKS,
            CHECK_D, CHECK_DV, CAUSAL, False, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS, False,
        )  # fmt: skip
    accumulated, total, maximum = attend(
        accumulated, total, maximum, q, query, key, value, rng, batch, head, kv_head, first, chunk * DV, full, end,
        last_key, row_inside, mask_rows, mask_column, dropout_row, q_row, q_column, k_row, k_column, v_row, v_column,
        queries, visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV,
        CAUSAL, True, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS, AGAIN,
    )  # fmt: skip

    again = False
    stored = row_inside
    if (CAUSAL or MASK == BOOLEAN) and not AGAIN:
        again = any_nan(accumulated, row_inside)
        stored = row < tl.where(again, first, queries)
    blind = total == 0.0
    factor = 1.0 / tl.where(blind, 1.0, total)
    if DROPOUT:
        factor *= kept_scale
    accumulated = accumulated * factor[:, None]
    column = chunk * DV + tl.arange(0, DV)
    at = out + wide_row[:, None] * out_row + column[None, :]
    tl.store(at, accumulated.to(out.dtype.element_ty), stored[:, None] & (column < value_dim)[None, :])
    if chunk == 0:
        store_log_total(lse, lse_rest, row, maximum, total, stored, MASK)
    return again


@triton.jit
def forward_kernel(
    query,  # descriptor, or pointer to (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    plain_query,  # pointer in either case
    plain_key,  # likewise
    plain_value,  # likewise
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    causal_offset,  # (B), or None: with CAUSAL, query i sees keys 0 ... causal_offset + i
    rng,  # (2), or None
    out,  # (B, H, queries, value_dim), columns next to each other
    lse,  # (B, H, queries): log2 of the sum of exp2 of the scores
    lse_rest,  # (B, H, queries): what rounding took from lse; None without an additive mask
    q_batch,
    q_head,
    q_row,
    q_column,
    k_batch,
    k_head,
    k_row,
    k_column,
    v_batch,
    v_head,
    v_row,
    v_column,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    out_batch,
    out_head,
    out_row,
    heads,
    group,
    queries,
    keys,
    head_dim,
    value_dim,
    scale,
    threshold,
    kept_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    if CAUSAL:
        block = blocks - 1 - block
    chunk, rest = rest % CHUNKS, rest // CHUNKS
    head, batch = rest % heads, rest // heads
    kv_head = head // group
    wide_batch, wide_head, wide_kv_head = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    if not DESCRIPTORS:
        query += wide_batch * q_batch + wide_head * q_head
        key += wide_batch * k_batch + wide_kv_head * k_head
        value += wide_batch * v_batch + wide_kv_head * v_head

    LENGTHS: tl.constexpr = key_lengths is not None
    visible = of_sequence(key_lengths, batch, keys, keys)
    offset = of_sequence(causal_offset, batch, keys, 0)
    if MASK != NO_MASK:
        mask += wide_batch * mask_batch + wide_head * mask_head
    out += wide_batch * out_batch + wide_head * out_head
    lse += (wide_batch * heads + head) * queries
    if MASK == ADDITIVE:
        lse_rest += (wide_batch * heads + head) * queries
    first = block * ROWS
    again = forward_rows(
        query, key, value, mask, rng, out, lse, lse_rest, batch, head, kv_head, first, chunk, q_row, q_column, k_row,
        k_column, v_row, v_column, mask_row, mask_column, out_row, heads, queries, visible, offset, keys, head_dim,
        value_dim, scale, threshold, kept_scale, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, MASK, DROPOUT,
        SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS, False,
    )  # fmt: skip
    if CAUSAL or MASK == BOOLEAN:  # noqa: SIM102 - known when it is compiled
        if again:  # in tiles so small that the registers are those of the first time
            plain_query += wide_batch * q_batch + wide_head * q_head
            plain_key += wide_batch * k_batch + wide_kv_head * k_head
            plain_value += wide_batch * v_batch + wide_kv_head * v_head
            for few in range(first, tl.minimum(first + ROWS, queries), ROWS_AGAIN):
                forward_rows(
                    plain_query, plain_key, plain_value, mask, rng, out, lse, lse_rest, batch, head, kv_head, few,
                    chunk, q_row, q_column, k_row, k_column, v_row, v_column, mask_row, mask_column, out_row, heads,
                    queries, visible, offset, keys, head_dim, value_dim, scale, threshold, kept_scale, ROWS_AGAIN,
                    COLUMNS_AGAIN, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, MASK, DROPOUT, SCALE_FIRST, False,
                    PRECISION, LENGTHS, True,
                )  # fmt: skip
