"""Attention of few queries, forward (Dao et al. 2023, "Flash-Decoding"): the queries of a group of heads share one
tile, since they share keys and values; the keys are split over programs, and a second kernel joins the parts by the
maxima and sums of their softmax. See forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import attend
from .tiles import BOOLEAN, NO_MASK, any_nan, of_sequence, store_log_total


@triton.jit
def decode_kernel(
    query,  # (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    causal_offset,  # (B), or None: with CAUSAL, query i sees keys 0 ... causal_offset + i
    rng,  # (2), or None
    parts,  # (splits, B, H, queries, value_dim), float32
    statistics,  # (2, splits, B, H, queries): maximum of the scores, sum of exp2 of what they are below it
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
    batches,
    heads,
    group,
    queries,
    keys,
    head_dim,
    value_dim,
    scale,
    threshold,
    kept_scale,
    split,  # keys of a part, a multiple of COLUMNS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(1)
    kv_heads = heads // group
    kv_head, batch = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    wide_batch, wide_kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    if not DESCRIPTORS:
        key += wide_batch * k_batch + wide_kv_head * k_head
        value += wide_batch * v_batch + wide_kv_head * v_head
    # Row r is query r % queries of the group's head r // queries.
    packed = tl.arange(0, ROWS)
    row_inside = packed < group * queries
    row = packed % queries
    head = wide_kv_head * group + packed // queries
    d = tl.arange(0, D)
    q_rows = query + wide_batch * q_batch + head * q_head + row.to(tl.int64) * q_row
    q = tl.load(
        q_rows[:, None] + d.to(tl.int64)[None, :] * q_column,
        row_inside[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    LENGTHS: tl.constexpr = key_lengths is not None
    visible = of_sequence(key_lengths, batch, keys, keys)
    offset = of_sequence(causal_offset, batch, keys, 0)
    last_key = offset + row
    begin = part * split
    end = tl.minimum(begin + split, visible)
    mask_rows = row
    if MASK != NO_MASK:
        mask_rows = mask + wide_batch * mask_batch + head * mask_head + row.to(tl.int64) * mask_row
    statistic = (wide_batch * heads + head) * queries + row
    accumulated = tl.zeros([ROWS, DV], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    full = begin
    if not CAUSAL:
        full = tl.maximum(begin + (end - begin) // COLUMNS * COLUMNS, begin)
        accumulated, total, maximum = attend(
            accumulated, total, maximum, q, query, key, value, rng, batch, kv_head, kv_head, 0, 0, begin, full,
            last_key, row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column,
            queries, visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, 1, CHECK_D, CHECK_DV,
            CAUSAL, False, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS,
        )  # fmt: skip
    else:
        end = tl.minimum(end, offset + queries)
    accumulated, total, maximum = attend(
        accumulated, total, maximum, q, query, key, value, rng, batch, kv_head, kv_head, 0, 0, full, end, last_key,
        row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries,
        visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, 1, CHECK_D, CHECK_DV, CAUSAL, True,
        MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS,
    )  # fmt: skip
    if CAUSAL or MASK == BOOLEAN:  # noqa: SIM102 - known when it is compiled
        if any_nan(accumulated, row_inside):
            accumulated, total, maximum = attend(
                tl.zeros_like(accumulated), tl.zeros_like(total), tl.full([ROWS], float("-inf"), tl.float32), q, query,
                key, value, rng, batch, kv_head, kv_head, 0, 0, begin, end, last_key, row_inside, mask_rows,
                mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries, visible, keys,
                head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, 1, CHECK_D, CHECK_DV, CAUSAL, True,
                MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION, LENGTHS, True,
            )  # fmt: skip
    if DROPOUT:
        accumulated = accumulated * kept_scale
    place = part.to(tl.int64) * batches * heads * queries + statistic
    column = tl.arange(0, DV)
    at = place[:, None] * value_dim + column[None, :]
    tl.store(parts + at, accumulated, row_inside[:, None] & (column < value_dim)[None, :])
    tl.store(statistics + place, maximum, row_inside)
    tl.store(statistics + tl.num_programs(1).to(tl.int64) * batches * heads * queries + place, total, row_inside)


@triton.jit
def join_kernel(
    parts,  # (splits, B, H, queries, value_dim), float32
    statistics,  # (2, splits, B, H, queries)
    out,  # (B, H, queries, value_dim), columns next to each other
    lse,  # (B, H, queries)
    lse_rest,  # (B, H, queries), or None
    out_batch,
    out_head,
    out_row,
    rows,  # B H queries
    heads,
    queries,
    value_dim,
    splits,
    SPLITS: tl.constexpr,  # at once
    DV: tl.constexpr,
    MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DV)
    maximum = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulated = tl.zeros([DV], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = split.to(tl.int64) * rows + row
        part_maximum = tl.load(statistics + place, split < splits, other=float("-inf"))
        part_total = tl.load(statistics + splits * rows.to(tl.int64) + place, split < splits, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(part_maximum - shift)
        rescale = tl.exp2(maximum - shift)
        inside = (split < splits)[:, None] & (column < value_dim)[None, :]
        part = tl.load(parts + place[:, None] * value_dim + column[None, :], inside, other=0.0)
        accumulated = accumulated * rescale + tl.sum(part * weights[:, None], 0)
        total = total * rescale + tl.sum(part_total * weights, 0)
        maximum = new_maximum
    result = accumulated / tl.where(total == 0.0, 1.0, total)
    head_row = row // queries
    at = head_row // heads * out_batch + head_row % heads * out_head + row % queries * out_row + column
    tl.store(out + at, result.to(out.dtype.element_ty), column < value_dim)
    store_log_total(lse, lse_rest, row, maximum, total, None, MASK)
