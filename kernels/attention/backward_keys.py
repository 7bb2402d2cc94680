"""Attention, backward: the gradients of keys and values. See backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..random import kept_elements
from .tiles import ADDITIVE, BOOLEAN, NO_MASK, hide, load_rows, of_sequence, product


@triton.jit
def keys_pass(
    grad_k,  # (COLUMNS, D)
    grad_v,  # (COLUMNS, DV)
    k,  # (COLUMNS, D) if CHUNKS is 1
    v,  # (COLUMNS, DV) if CHUNKS is 1
    query,
    key,
    value,
    grad,
    rng,
    lse,
    lse_rest,
    delta,
    batch,
    head,
    kv_head,
    first_key,
    chunk,
    begin,
    end,
    mask_head_rows,
    mask_row,
    mask_column,
    statistic,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    g_row,
    g_column,
    queries,
    offset,
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
):
    """Accumulate over the queries [begin, end) of one head."""
    column = first_key + tl.arange(0, COLUMNS)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        row_inside, last_key = row < queries, offset + row
        q = load_rows(
            query, batch, head, first, chunk * D, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D, DESCRIPTORS
        )
        g = load_rows(
            grad, batch, head, first, chunk * DV, queries, value_dim, g_row, g_column, ROWS, DV, CHECK_DV, DESCRIPTORS
        )
        if CHUNKS == 1:
            scores = product(k, tl.trans(q), None, PRECISION)
        else:
            scores = tl.zeros([COLUMNS, ROWS], tl.float32)
            for c in range(0, CHUNKS):
                kc = load_rows(
                    key, batch, kv_head, first_key, c * D, all_keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D,
                    DESCRIPTORS,
                )  # fmt: skip
                qc = load_rows(
                    query, batch, head, first, c * D, queries, head_dim, q_row, q_column, ROWS, D, CHECK_D, DESCRIPTORS
                )
                scores = product(kc, tl.trans(qc), scores, PRECISION)
        scores *= scale
        mask_rows = row
        if MASK != NO_MASK:
            mask_rows = mask_head_rows + row.to(tl.int64) * mask_row
        if MASK == ADDITIVE:
            scores = tl.trans(
                hide(
                    tl.trans(scores), mask_rows, mask_column, last_key, row_inside, column, keys, False, False, ADDITIVE
                )
            )
        # Where there is no query, or one that sees no key, nothing may come of it: exp2(... - inf) is 0.
        row_lse = tl.load(lse + statistic + row, row_inside, other=float("inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
        scores -= row_lse[None, :]
        if MASK == ADDITIVE:
            scores -= tl.load(lse_rest + statistic + row, row_inside, other=0.0)[None, :]
        # Only now, since a query that sees a NaN has a log-sum-exp of NaN, which must not reach the keys that it does
        # not see.
        if EDGE or MASK == BOOLEAN:
            scores = tl.trans(
                hide(
                    tl.trans(scores), mask_rows, mask_column, last_key, row_inside, column, keys,
                    CAUSAL, EDGE, NO_MASK if MASK == ADDITIVE else MASK,
                )
            )  # fmt: skip
        weights = tl.exp2(scores)
        if CHUNKS == 1:
            grad_weights = product(v, tl.trans(g), None, PRECISION)
        else:
            grad_weights = tl.zeros([COLUMNS, ROWS], tl.float32)
            for c in range(0, CHUNKS):
                vc = load_rows(
                    value, batch, kv_head, first_key, c * DV, all_keys, value_dim, v_row, v_column, COLUMNS, DV,
                    CHECK_DV, DESCRIPTORS,
                )  # fmt: skip
                gc = load_rows(
                    grad, batch, head, first, c * DV, queries, value_dim, g_row, g_column, ROWS, DV, CHECK_DV,
                    DESCRIPTORS,
                )  # fmt: skip
                grad_weights = product(vc, tl.trans(gc), grad_weights, PRECISION)
        dropped = weights
        if DROPOUT:
            kept = tl.trans(kept_elements(rng, statistic + row, first_key, all_keys, threshold, COLUMNS))
            dropped = tl.where(kept, weights * kept_scale, 0.0)
            grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
        grad_v = product(dropped.to(g.dtype), g, grad_v, PRECISION)
        row_delta = tl.load(delta + statistic + row, row_inside, other=0.0)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        if EDGE or MASK != NO_MASK:  # nor may the scores of a hidden key get what its value is
            grad_scores = tl.where(weights == 0.0, 0.0, grad_scores)
        grad_k = product(grad_scores.to(q.dtype), q, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit
def keys_kernel(
    query,  # descriptor, or pointer to (B, H, queries, head_dim)
    key,  # descriptor, or pointer to (B, H / group, keys, head_dim)
    value,  # descriptor, or pointer to (B, H / group, keys, value_dim)
    grad,  # descriptor, or pointer to (B, H, queries, value_dim)
    mask,  # (B, H, queries, keys), bool or floating, or None
    key_lengths,  # (B), or None
    causal_offset,  # (B), or None: with CAUSAL, query i sees keys 0 ... causal_offset + i
    rng,  # (2), or None
    lse,  # (B, H, queries)
    lse_rest,  # (B, H, queries), or None
    delta,  # (B, H, queries)
    grad_key,  # like key, columns next to each other
    grad_value,  # like value, columns next to each other
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
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
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
    blocks = tl.cdiv(keys, COLUMNS)
    program = tl.program_id(0)
    # The first keys of a causal head have the most queries: they come first.
    block, rest = program % blocks, program // blocks
    chunk, rest = rest % CHUNKS, rest // CHUNKS
    kv_heads = heads // group
    kv_head, batch = rest % kv_heads, rest // kv_heads
    wide_batch, wide_kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    first_key = block * COLUMNS
    if not DESCRIPTORS:
        key += wide_batch * k_batch + wide_kv_head * k_head
        value += wide_batch * v_batch + wide_kv_head * v_head
    visible = of_sequence(key_lengths, batch, keys, keys)
    offset = of_sequence(causal_offset, batch, keys, 0)
    if CAUSAL:
        visible = tl.minimum(visible, offset + queries)
    k = load_rows(key, batch, kv_head, first_key, 0, keys, head_dim, k_row, k_column, COLUMNS, D, CHECK_D, DESCRIPTORS)
    v = load_rows(
        value, batch, kv_head, first_key, 0, keys, value_dim, v_row, v_column, COLUMNS, DV, CHECK_DV, DESCRIPTORS
    )
    grad_k = tl.zeros([COLUMNS, D], tl.float32)
    grad_v = tl.zeros([COLUMNS, DV], tl.float32)
    end = queries
    if first_key >= visible:
        end = 0
    # Of the tiles [begin, edge) some scores are hidden by the diagonal.
    begin = 0
    edge = 0
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first_key - offset, 0) // ROWS * ROWS, end)
        edge = tl.minimum(tl.cdiv(tl.maximum(first_key + COLUMNS - offset, 0), ROWS) * ROWS, end)
    for member in range(0, group):
        head = kv_head * group + member
        wide_head = wide_kv_head * group + member
        statistic = (wide_batch * heads + wide_head) * queries
        head_query, head_grad = query, grad
        if not DESCRIPTORS:
            head_query += wide_batch * q_batch + wide_head * q_head
            head_grad += wide_batch * g_batch + wide_head * g_head
        mask_head_rows = mask
        if MASK != NO_MASK:
            mask_head_rows += wide_batch * mask_batch + wide_head * mask_head
        if CAUSAL:
            grad_k, grad_v = keys_pass(
                grad_k, grad_v, k, v, head_query, key, value, head_grad, rng, lse, lse_rest, delta, batch, head,
                kv_head, first_key, chunk, begin, edge, mask_head_rows, mask_row, mask_column, statistic, q_row,
                q_column, k_row, k_column, v_row, v_column, g_row, g_column, queries, offset, visible, keys, head_dim,
                value_dim, scale, threshold, kept_scale, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, True,
                MASK, DROPOUT, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        grad_k, grad_v = keys_pass(
            grad_k, grad_v, k, v, head_query, key, value, head_grad, rng, lse, lse_rest, delta, batch, head, kv_head,
            first_key, chunk, edge, end, mask_head_rows, mask_row, mask_column, statistic, q_row, q_column, k_row,
            k_column, v_row, v_column, g_row, g_column, queries, offset, visible, keys, head_dim, value_dim, scale,
            threshold, kept_scale, ROWS, COLUMNS, D, DV, CHUNKS, CHECK_D, CHECK_DV, CAUSAL, False, MASK, DROPOUT,
            DESCRIPTORS, PRECISION,
        )  # fmt: skip
    row = first_key + tl.arange(0, COLUMNS)
    # A key that no query sees took part in no score, but in this tile's sums.
    seen = (row < visible)[:, None]
    wide_row = row.to(tl.int64)[:, None]
    column = chunk * D + tl.arange(0, D)
    at = wide_batch * dk_batch + wide_kv_head * dk_head + wide_row * dk_row + column[None, :]
    grad_k = tl.where(seen, grad_k * plain_scale, 0.0).to(grad_key.dtype.element_ty)
    tl.store(grad_key + at, grad_k, (row < keys)[:, None] & (column < head_dim)[None, :])
    column = chunk * DV + tl.arange(0, DV)
    at = wide_batch * dv_batch + wide_kv_head * dv_head + wide_row * dv_row + column[None, :]
    grad_v = tl.where(seen, grad_v, 0.0).to(grad_value.dtype.element_ty)
    tl.store(grad_value + at, grad_v, (row < keys)[:, None] & (column < value_dim)[None, :])
