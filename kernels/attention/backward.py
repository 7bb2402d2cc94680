"""Attention, backward (Dao 2023). With P = exp2(S - lse) made again from the scores S, and delta = rowsum(grad out):

    dV = P^T grad        dS = P (grad V^T - delta)        dQ = scale dS K        dK = scale dS^T Q

Two kernels, each of which makes S again: in one a program keeps a tile of keys and values and goes through the queries
of all heads that share them, in the other it keeps a tile of queries and goes through the keys. Every sum is thus made
by one program in a fixed order: no atomics, equal bits each time. The keys' kernel works on S^T, so that P^T and dS^T
are operands as they stand. Tiles that no mask, diagonal or end touches skip all tests. With an additive mask lse is the
sum of two numbers, see `store_log_total`.

Heads wider than a chunk: S and grad V^T are summed over chunks, and each program makes one chunk of the columns.
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
    any_nan,
    clear_rows,
    finite,
    hide,
    load_rows,
    of_sequence,
    product,
)


@triton.jit
def delta_kernel(
    grad,  # (B, H, queries, value_dim)
    out,  # likewise
    delta,  # (B, H, queries)
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    out_batch,
    out_head,
    out_row,
    out_column,
    heads,
    queries,
    value_dim,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, batch = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(0, value_dim, DV):
        column = first + tl.arange(0, DV)
        inside = (row < queries)[:, None] & (column < value_dim)[None, :]
        wide_column = column.to(tl.int64)[None, :]
        at = batch * grad_batch + head * grad_head + wide_row[:, None] * grad_row + wide_column * grad_column
        g = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        at = batch * out_batch + head * out_head + wide_row[:, None] * out_row + wide_column * out_column
        sums += tl.sum(g * tl.load(out + at, inside, other=0.0).to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * queries + row, sums, row < queries)


@triton.jit
def queries_pass(
    grad_q,  # (ROWS, D)
    q,  # (ROWS, D) if CHUNKS is 1
    g,  # (ROWS, DV) if CHUNKS is 1
    row_lse,
    row_delta,
    query,
    key,
    value,
    grad,
    rng,
    batch,
    head,
    kv_head,
    first_query,
    chunk,
    begin,
    end,
    last_key,
    row_inside,
    mask_rows,
    mask_column,
    dropout_row,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    g_row,
    g_column,
    queries,
    keys,  # visible ones
    all_keys,
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
    EDGE: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTHS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Accumulate over the keys [begin, end).

    LENGTHS: whether some of all_keys may not be visible.
    AGAIN: whether keys that are NaN or infinite count as 0 in the last product, and hidden values not at all.
    """
    for first in tl.range(begin, end, COLUMNS, num_stages=1 if AGAIN else None):
        column = first + tl.arange(0, COLUMNS)
        k = load_rows(
            key, batch, kv_head, first, chunk * D, all_keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D, DESCRIPTORS
        )
        if CHUNKS == 1:
            scores = product(q, tl.trans(k), None, PRECISION)
        else:
            scores = tl.zeros([ROWS, COLUMNS], tl.float32)
            for c in range(0, CHUNKS):
                qc = load_rows(
                    query, batch, head, first_query, c * D, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D,
                    DESCRIPTORS,
                )  # fmt: skip
                kc = load_rows(
                    key, batch, kv_head, first, c * D, all_keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D,
                    DESCRIPTORS,
                )  # fmt: skip
                scores = product(qc, tl.trans(kc), scores, PRECISION)
        scores *= scale
        scores = hide(scores, mask_rows, mask_column, last_key, row_inside, column, keys, CAUSAL, EDGE, MASK)
        hidden = scores == float("-inf")
        weights = tl.exp2(scores - row_lse[:, None])
        if CHUNKS == 1:
            v = load_rows(
                value, batch, kv_head, first, 0, all_keys, value_dim, v_row, v_column, COLUMNS, DV, CHECK_DV,
                DESCRIPTORS,
            )  # fmt: skip
            grad_weights = product(g, tl.trans(v), None, PRECISION)
        else:
            grad_weights = tl.zeros([ROWS, COLUMNS], tl.float32)
            for c in range(0, CHUNKS):
                gc = load_rows(
                    grad, batch, head, first_query, c * DV, queries, value_dim, g_row, g_column, ROWS, DV, CHECK_DV,
                    DESCRIPTORS,
                )  # fmt: skip
                vc = load_rows(
                    value, batch, kv_head, first, c * DV, all_keys, value_dim, v_row, v_column, COLUMNS, DV, CHECK_DV,
                    DESCRIPTORS,
                )  # fmt: skip
                grad_weights = product(gc, tl.trans(vc), grad_weights, PRECISION)
        if DROPOUT:
            kept = kept_elements(rng, dropout_row, first, all_keys, threshold, COLUMNS)
            grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        if AGAIN or (EDGE and LENGTHS):
            grad_scores = tl.where(hidden, 0.0, grad_scores)
        if AGAIN:
            k = finite(k)
        elif EDGE and LENGTHS:
            k = clear_rows(k, column, keys)
        grad_q = product(grad_scores.to(k.dtype), k, grad_q, PRECISION)
    return grad_q


@triton.jit
def queries_rows(
    query,
    key,
    value,
    grad,
    mask,
    rng,
    lse,
    lse_rest,
    delta,
    grad_query,
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
    g_row,
    g_column,
    mask_row,
    mask_column,
    dq_row,
    first_statistic,
    queries,
    visible,
    offset,
    keys,
    head_dim,
    value_dim,
    scale,
    plain_scale,
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
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTHS: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Compute the gradients of the queries [first, first + ROWS) of a head; mask and grad_query point to its first row.

    Returns whether they have to be made AGAIN, because of what hidden keys and values may have been: then none is
    stored.
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
    statistic = first_statistic + row
    q = load_rows(query, batch, head, first, 0, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D, DESCRIPTORS)
    g = load_rows(grad, batch, head, first, 0, queries, value_dim, g_row, g_column, ROWS, DV, CHECK_DV, DESCRIPTORS)
    # A query that sees no key has no gradient: exp2(... - inf) is 0.
    row_lse = tl.load(lse + statistic, row_inside, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    row_delta = tl.load(delta + statistic, row_inside, other=0.0)
    grad_q = tl.zeros([ROWS, D], tl.float32)
    if AGAIN:
        full = 0
    else:
        grad_q = queries_pass(
            grad_q, q, g, row_lse, row_delta, query, key, value, grad, rng, batch, head, kv_head, first, chunk, 0, full,
            last_key, row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row, v_column,
            g_row, g_column, queries, visible, keys, head_dim, value_dim, scale, threshold, kept_scale, ROWS, COLUMNS,
            D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, False, MASK, DROPOUT, DESCRIPTORS, PRECISION, LENGTHS, False,
        )  # fmt: skip
    grad_q = queries_pass(
        grad_q, q, g, row_lse, row_delta, query, key, value, grad, rng, batch, head, kv_head, first, chunk,
        full, end, last_key, row_inside, mask_rows, mask_column, statistic, q_row, q_column, k_row, k_column, v_row,
        v_column, g_row, g_column, queries, visible, keys, head_dim, value_dim, scale, threshold, kept_scale, ROWS,
        COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, True, MASK, DROPOUT, DESCRIPTORS, PRECISION, LENGTHS, AGAIN,
    )  # fmt: skip
    again = False
    stored = row_inside
    if (CAUSAL or MASK == BOOLEAN) and not AGAIN:
        again = any_nan(grad_q, row_inside)
        stored = row < tl.where(again, first, queries)
    column = chunk * D + tl.arange(0, D)
    at = grad_query + wide_row[:, None] * dq_row + column[None, :]
    if MASK == ADDITIVE:  # each weight of a row was too large by the same factor
        grad_q *= tl.exp2(-tl.load(lse_rest + statistic, row_inside, other=0.0))[:, None]
    grad_q = (grad_q * plain_scale).to(grad_query.dtype.element_ty)
    tl.store(at, grad_q, stored[:, None] & (column < head_dim)[None, :])
    return again


@triton.jit
def queries_kernel(
    query,  # descriptor, or pointer to (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    grad,  # descriptor, or pointer to (B, H, queries, value_dim)
    plain_query,  # pointer in either case
    plain_key,  # likewise
    plain_value,  # likewise
    plain_grad,  # likewise
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    causal_offset,  # (B), or None: with CAUSAL, query i sees keys 0 ... causal_offset + i
    rng,  # (2), or None
    lse,  # (B, H, queries)
    lse_rest,  # (B, H, queries), or None
    delta,  # (B, H, queries)
    grad_query,  # like query, columns next to each other
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
    g_batch,
    g_head,
    g_row,
    g_column,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    dq_batch,
    dq_head,
    dq_row,
    heads,
    group,
    queries,
    keys,
    head_dim,
    value_dim,
    scale,  # times log2(e)
    plain_scale,
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
        grad += wide_batch * g_batch + wide_head * g_head
    LENGTHS: tl.constexpr = key_lengths is not None
    visible = of_sequence(key_lengths, batch, keys, keys)
    offset = of_sequence(causal_offset, batch, keys, 0)
    if MASK != NO_MASK:
        mask += wide_batch * mask_batch + wide_head * mask_head
    grad_query += wide_batch * dq_batch + wide_head * dq_head
    statistic = (wide_batch * heads + head) * queries
    first = block * ROWS
    again = queries_rows(
        query, key, value, grad, mask, rng, lse, lse_rest, delta, grad_query, batch, head, kv_head, first, chunk, q_row,
        q_column, k_row, k_column, v_row, v_column, g_row, g_column, mask_row, mask_column, dq_row, statistic, queries,
        visible, offset, keys, head_dim, value_dim, scale, plain_scale, threshold, kept_scale, ROWS, COLUMNS, D, DV,
        CHUNKS, CHECK_D, CHECK_DV, CAUSAL, MASK, DROPOUT, DESCRIPTORS, PRECISION, LENGTHS, False,
    )  # fmt: skip
    if CAUSAL or MASK == BOOLEAN:  # noqa: SIM102 - known when it is compiled
        if again:  # in tiles so small that the registers are those of the first time
            plain_query += wide_batch * q_batch + wide_head * q_head
            plain_key += wide_batch * k_batch + wide_kv_head * k_head
            plain_value += wide_batch * v_batch + wide_kv_head * v_head
            plain_grad += wide_batch * g_batch + wide_head * g_head
            for few in range(first, tl.minimum(first + ROWS, queries), ROWS_AGAIN):
                queries_rows(
                    plain_query, plain_key, plain_value, plain_grad, mask, rng, lse, lse_rest, delta, grad_query, batch,
                    head, kv_head, few, chunk, q_row, q_column, k_row, k_column, v_row, v_column, g_row, g_column,
                    mask_row, mask_column, dq_row, statistic, queries, visible, offset, keys, head_dim, value_dim,
                    scale, plain_scale, threshold, kept_scale, ROWS_AGAIN, COLUMNS_AGAIN, D, DV, CHUNKS, CHECK_D,
                    CHECK_DV, CAUSAL, MASK, DROPOUT, False, PRECISION, LENGTHS, True,
                )  # fmt: skip
