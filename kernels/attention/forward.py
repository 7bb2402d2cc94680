"""Attention, forward (Dao 2023, "FlashAttention-2"): a program keeps a tile of queries and goes through the keys and
values tile by tile. Of the scores it keeps a running maximum and sum; results so far are rescaled when the maximum
moves. Scores are in base 2, with the scale folded into the one multiply-add before exp2. Tiles that no mask, diagonal
or end touches skip all tests; causal programs with the most keys come first. On Hopper and later, tiles arrive by
tensor descriptors (the bulk copy engine), so that no registers or instructions go into addresses.

Heads wider than a chunk (256 columns): the scores are summed over chunks of the head, and each program makes one chunk
of the output's columns.

Few queries (decoding): the queries of a group of heads share one tile, since they share keys and values; the keys are
split over programs, and a second kernel joins the parts by their log-sum-exp (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..random import kept_elements
from .tiles import ADDITIVE, NO_MASK, hide, load_rows, product


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
    row,
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
):
    """Goes through the keys [begin, end)."""
    for first in range(begin, end, COLUMNS):
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
            scores = hide(scores, mask_rows, mask_column_stride, row, row_inside, column, keys, CAUSAL, EDGE, MASK)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        else:
            scores = hide(scores, mask_rows, mask_column_stride, row, row_inside, column, keys, CAUSAL, EDGE, MASK)
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        shift = new_maximum
        if MASK != NO_MASK:  # a row that has seen no key yet: -inf - -inf would be NaN
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
        accumulated = product(weights.to(v.dtype), v, accumulated, PRECISION)
        maximum = new_maximum
    return accumulated, total, maximum


@triton.jit
def forward_kernel(
    query,  # descriptor, or pointer to (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    rng,  # (2), or None
    out,  # (B, H, queries, value_dim), columns next to each other
    lse,  # (B, H, queries): log2 of the sum of exp2 of the scores
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

    first = block * ROWS
    row = first + tl.arange(0, ROWS)
    row_inside = row < queries
    visible = keys
    if key_lengths is not None:
        visible = tl.maximum(tl.minimum(tl.load(key_lengths + batch), keys), 0).to(tl.int32)
    end = visible
    full = visible
    if CAUSAL:
        end = tl.minimum(visible, first + ROWS)
        full = tl.minimum(visible, first + 1)
    full = full // COLUMNS * COLUMNS
    mask_rows = row
    if MASK != NO_MASK:
        mask_rows = mask + wide_batch * mask_batch + wide_head * mask_head + row.to(tl.int64) * mask_row
    statistic = (wide_batch * heads + head) * queries + row

    q = load_rows(query, batch, head, first, 0, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D, DESCRIPTORS)
    accumulated = tl.zeros([ROWS, DV], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    accumulated, total, maximum = attend(
        accumulated, total, maximum, q, query, key, value, rng, batch, head, kv_head, first, chunk * DV, 0, full, row,
        row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries,
        visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL,
        False, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    accumulated, total, maximum = attend(
        accumulated, total, maximum, q, query, key, value, rng, batch, head, kv_head, first, chunk * DV, full, end, row,
        row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries,
        visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL,
        True, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION,
    )  # fmt: skip

    blind = total == 0.0
    factor = 1.0 / tl.where(blind, 1.0, total)
    if DROPOUT:
        factor *= kept_scale
    accumulated = accumulated * factor[:, None]
    column = chunk * DV + tl.arange(0, DV)
    at = wide_batch * out_batch + wide_head * out_head + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(out + at, accumulated.to(out.dtype.element_ty), row_inside[:, None] & (column < value_dim)[None, :])
    if chunk == 0:
        tl.store(lse + statistic, tl.where(blind, float("-inf"), maximum + tl.log2(total)), row_inside)


@triton.jit
def decode_kernel(
    query,  # (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    rng,  # (2), or None
    parts,  # (splits, B, H, queries, value_dim), float32
    parts_lse,  # (splits, B, H, queries)
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
    part = tl.program_id(0)
    kv_heads = heads // group
    kv_head, batch = tl.program_id(1) % kv_heads, tl.program_id(1) // kv_heads
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
    q = tl.load(
        query + wide_batch * q_batch + (head * q_head + row.to(tl.int64) * q_row)[:, None] + d[None, :] * q_column,
        row_inside[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    visible = keys
    if key_lengths is not None:
        visible = tl.maximum(tl.minimum(tl.load(key_lengths + batch), keys), 0).to(tl.int32)
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
            accumulated, total, maximum, q, query, key, value, rng, batch, kv_head, kv_head, 0, 0, begin, full, row,
            row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries,
            visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, 1, CHECK_D, CHECK_DV, CAUSAL,
            False, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    else:
        end = tl.minimum(end, queries)
    accumulated, total, maximum = attend(
        accumulated, total, maximum, q, query, key, value, rng, batch, kv_head, kv_head, 0, 0, full, end, row,
        row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column, queries,
        visible, keys, head_dim, value_dim, scale, threshold, ROWS, COLUMNS, D, DV, 1, CHECK_D, CHECK_DV, CAUSAL,
        True, MASK, DROPOUT, SCALE_FIRST, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    blind = total == 0.0
    factor = 1.0 / tl.where(blind, 1.0, total)
    if DROPOUT:
        factor *= kept_scale
    accumulated = accumulated * factor[:, None]
    place = part.to(tl.int64) * batches * heads * queries + statistic
    column = tl.arange(0, DV)
    at = place[:, None] * value_dim + column[None, :]
    tl.store(parts + at, accumulated, row_inside[:, None] & (column < value_dim)[None, :])
    tl.store(parts_lse + place, tl.where(blind, float("-inf"), maximum + tl.log2(total)), row_inside)


@triton.jit
def join_kernel(
    parts,  # (splits, B, H, queries, value_dim), float32
    parts_lse,  # (splits, B, H, queries)
    out,  # (B, H, queries, value_dim), columns next to each other
    lse,  # (B, H, queries)
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
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DV)
    maximum = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulated = tl.zeros([DV], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = split.to(tl.int64) * rows + row
        part_lse = tl.load(parts_lse + place, split < splits, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(part_lse, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(part_lse - shift)
        rescale = tl.exp2(maximum - shift)
        inside = (split < splits)[:, None] & (column < value_dim)[None, :]
        part = tl.load(parts + place[:, None] * value_dim + column[None, :], inside, other=0.0)
        accumulated = accumulated * rescale + tl.sum(part * weights[:, None], 0)
        total = total * rescale + tl.sum(weights, 0)
        maximum = new_maximum
    blind = total == 0.0
    result = accumulated / tl.where(blind, 1.0, total)
    head_row = row // queries
    at = head_row // heads * out_batch + head_row % heads * out_head + row % queries * out_row + column
    tl.store(out + at, result.to(out.dtype.element_ty), column < value_dim)
    tl.store(lse + row, tl.where(blind, float("-inf"), maximum + tl.log2(total)))
