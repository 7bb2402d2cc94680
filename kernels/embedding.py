"""embedding on NVIDIA GPUs: weight[ids] + positions, with dropout, in one pass over what is read and written.

Backward sums, for each row of the table, the gradients of the tokens that read it, in a fixed order without atomics, so
that the bits are always the same. The tokens are sorted by id (stably). A program takes RUN_TOKENS of them and a
block of columns, and adds up each run of equal ids. A run that lies in the block is a finished row. Of others, the sum
goes to a workspace: as the block's tail where the run begins in it, else as its head. A second kernel adds up each tail
and the heads that follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, compute_dtype, launch_options, next_power_of_2, triton_compute_dtype, warps_for
from .random import drop_threshold, kept_elements, kept_scale

RUN_TOKENS = tl.constexpr(32)
# Of these, how many gradients are on their way at once.
AT_ONCE = tl.constexpr(4)
# Elements of a program's tile of forward.
FORWARD_TILE = 4096
# Sequences at a time that the gradient of positions sums.
BATCH_ROWS = 8


@triton.jit
def factors(
    rng,  # (2)
    row,  # (M), int64
    first,
    columns,
    threshold,
    scale,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return the factors by which dropout multiplies the elements (row, first ... first + N), (M, N)."""
    return tl.where(kept_elements(rng, row, first, columns, threshold, N), scale, 0.0).to(COMPUTE)


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    ids,  # (tokens)
    weight,  # (table, columns), weight_row elements from row to row
    positions,  # (seq_len, columns), position_row elements from row to row, or None
    rng,  # (2) or None
    out,  # (tokens, columns)
    weight_row,
    position_row,
    tokens,
    table,
    seq_len,
    columns,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    column = (first + tl.arange(0, BLOCK))[None, :]
    row = tl.load(ids + token, token < tokens, other=0).to(tl.int64)
    known = ((row >= 0) & (row < table))[:, None]
    inside = (token < tokens)[:, None] & (column < columns)
    # What is no id has no row to read.
    value = tl.load(weight + row[:, None] * weight_row + column, inside & known, other=0.0)
    value = tl.where(known, value, float("nan")).to(value.dtype)
    if positions is not None:
        value = value.to(COMPUTE)
        value += tl.load(positions + (token % seq_len)[:, None] * position_row + column, inside, other=0.0)
    if rng is not None:
        value = value.to(COMPUTE) * factors(rng, token, first, columns, threshold, scale, BLOCK, COMPUTE)
    tl.store(out + token[:, None] * columns + column, value.to(out.dtype.element_ty), inside)


@triton.jit
def gradient_of_token(
    grad, rng, token, grad_row, first, columns, threshold, scale, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    """Return a token's contribution to the gradient of its row, (BLOCK)."""
    column = first + tl.arange(0, BLOCK)
    value = tl.load(grad + token * grad_row + column, column < columns, other=0.0).to(COMPUTE)
    if rng is not None:
        kept = factors(rng, tl.zeros([1], tl.int64) + token, first, columns, threshold, scale, BLOCK, COMPUTE)
        value *= tl.reshape(kept, [BLOCK])
    return value


@triton.jit
def store_if(condition, to, value, column, columns):
    """Store part of a row, or nothing."""
    tl.store(to, value.to(to.dtype.element_ty), column < tl.where(condition, columns, 0))


@triton.jit(do_not_specialize=["threshold", "padding_idx"])
def sum_runs_kernel(
    grad,  # (tokens, columns), grad_row elements from row to row
    ids,  # (tokens), sorted
    order,  # (tokens): the tokens in the order of ids
    rng,  # (2) or None
    grad_weight,  # (table, columns)
    heads,  # (blocks, columns): of runs that come from the block before
    tails,  # (blocks, columns): of runs that begin here and go on in the next block
    grad_row,
    tokens,
    table,
    padding_idx,
    columns,
    threshold,
    scale,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    slot = block * columns + column
    begin = block * RUN_TOKENS
    is_head = (begin > 0) & (tl.load(ids + begin - 1, begin > 0, other=-1) == tl.load(ids + begin))
    sums = tl.zeros([BLOCK], COMPUTE)
    for group in range(0, RUN_TOKENS, AT_ONCE):
        # All are loaded before anything is stored: the compiler must leave loads behind stores there.
        values = ()
        for i in tl.static_range(AT_ONCE):
            token = tl.load(order + begin + group + i, begin + group + i < tokens, other=0)
            value = gradient_of_token(grad, rng, token, grad_row, first, columns, threshold, scale, BLOCK, COMPUTE)
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            place = begin + group + i
            row = tl.load(ids + place, place < tokens, other=-1)
            goes_on = (tl.load(ids + place + 1, place + 1 < tokens, other=-1) == row) & (row >= 0)
            ends = (goes_on == 0) | ((place + 1) % RUN_TOKENS == 0)
            wanted = ends & (row >= 0) & (row < table) & (row != padding_idx)
            sums += values[i]
            store_if(wanted & is_head, heads + slot, sums, column, columns)
            store_if(wanted & (is_head == 0) & goes_on, tails + slot, sums, column, columns)
            out = grad_weight + row.to(tl.int64) * columns + column
            store_if(wanted & (is_head == 0) & (goes_on == 0), out, sums, column, columns)
            is_head = is_head & goes_on
            sums = tl.where(ends, 0.0, sums).to(COMPUTE)


@triton.jit(do_not_specialize=["padding_idx"])
def join_runs_kernel(
    ids,  # (tokens), sorted
    heads,  # (blocks, columns)
    tails,  # (blocks, columns)
    grad_weight,  # (table, columns)
    tokens,
    table,
    padding_idx,
    columns,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)  # not the last: no run goes on from there
    begin, end = block * RUN_TOKENS, (block + 1) * RUN_TOKENS
    row = tl.load(ids + end - 1)
    begins_here = (begin == 0) | (tl.load(ids + begin - 1, begin > 0, other=-1) != row)
    more = begins_here & (tl.load(ids + end) == row) & (row >= 0) & (row < table) & (row != padding_idx)
    if more:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.load(tails + block * columns + column, column < columns, other=0.0)
        begin_following = block + 1
        while more:
            following = begin_following + tl.arange(0, RUN_TOKENS)
            there = following * RUN_TOKENS < tokens
            same = there & (tl.load(ids + following * RUN_TOKENS, there, other=-1) == row)
            inside = same[:, None] & (column < columns)[None, :]
            sums += tl.sum(tl.load(heads + following[:, None] * columns + column[None, :], inside, other=0.0), 0)
            begin_following += RUN_TOKENS
            more = tl.sum(same.to(tl.int32), 0) == RUN_TOKENS
        tl.store(
            grad_weight + row.to(tl.int64) * columns + column, sums.to(grad_weight.dtype.element_ty), column < columns
        )


@triton.jit(do_not_specialize=["threshold"])
def positions_kernel(
    grad,  # (batch, seq_len, columns), grad_row elements from token to token
    rng,  # (2) or None
    grad_positions,  # (seq_len, columns)
    grad_row,
    batch,
    seq_len,
    columns,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], COMPUTE)
    for begin in range(0, batch, ROWS):
        sequence = begin + tl.arange(0, ROWS)
        token = sequence.to(tl.int64) * seq_len + position
        inside = (sequence < batch)[:, None] & (column < columns)[None, :]
        value = tl.load(grad + token[:, None] * grad_row + column[None, :], inside, other=0.0).to(COMPUTE)
        if rng is not None:
            value *= factors(rng, token, first, columns, threshold, scale, BLOCK, COMPUTE)
        sums += value
    tl.store(
        grad_positions + position * columns + column,
        tl.sum(sums, 0).to(grad_positions.dtype.element_ty),
        column < columns,
    )


def embedding_fwd(
    input: Tensor, weight: Tensor, positions: Tensor | None, dropout_p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    columns, tokens = weight.size(1), input.numel()
    out = torch.empty((*input.shape, columns), dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    table, p = _as_rows(weight), None if positions is None else _as_rows(positions)
    block = _block(columns, 256)
    rows = FORWARD_TILE // block
    forward_kernel[(cdiv(tokens, rows), cdiv(columns, block))](
        input.contiguous(), table, p, _state(dropout_p, rng), out, table.stride(0), 0 if p is None else p.stride(0),
        tokens, table.size(0), 1 if p is None else p.size(0), columns, drop_threshold(dropout_p), kept_scale(dropout_p),
        ROWS=rows, BLOCK=block, COMPUTE=triton_compute_dtype(weight.dtype),
        **launch_options(warps_for(FORWARD_TILE, 16)),
    )  # fmt: skip
    return out


def embedding_bwd(
    grad: Tensor,
    input: Tensor,
    num_embeddings: int,
    padding_idx: int | None,
    weight_grad: bool,
    positions_grad: bool,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    columns, tokens = grad.size(-1), input.numel()
    seq_len = input.size(-1) if positions_grad else 0
    grad_weight = grad.new_zeros((num_embeddings, columns) if weight_grad else (0,))
    grad_positions = grad.new_zeros((seq_len, columns) if positions_grad else (0,))
    if grad.numel() == 0:
        return grad_weight, grad_positions
    g = _as_rows(grad.reshape(tokens, columns))
    dropout = (drop_threshold(dropout_p), kept_scale(dropout_p))
    state, compute = _state(dropout_p, rng), triton_compute_dtype(grad.dtype)
    # One warp, of which each thread has 16 bytes of a row.
    block = _block(columns, 32 * 16 // grad.element_size())
    column_blocks = cdiv(columns, block)
    if weight_grad:
        ids, order = torch.sort(_sortable(input.reshape(-1), num_embeddings), stable=True)
        blocks = cdiv(tokens, RUN_TOKENS.value)
        heads = torch.empty((blocks, columns), dtype=compute_dtype(grad.dtype), device=grad.device)
        tails = torch.empty_like(heads)
        ignored = -1 if padding_idx is None else padding_idx
        sum_runs_kernel[(blocks, column_blocks)](
            g, ids, order, state, grad_weight, heads, tails, g.stride(0), tokens, num_embeddings, ignored, columns,
            *dropout, BLOCK=block, COMPUTE=compute, **launch_options(1),
        )  # fmt: skip
        if blocks > 1:
            join_runs_kernel[(blocks - 1, column_blocks)](
                ids,
                heads,
                tails,
                grad_weight,
                tokens,
                num_embeddings,
                ignored,
                columns,
                BLOCK=block,
                **launch_options(4),
            )
    if positions_grad:
        positions_kernel[(seq_len, column_blocks)](
            g, state, grad_positions, g.stride(0), tokens // seq_len, seq_len, columns, *dropout, ROWS=BATCH_ROWS,
            BLOCK=block, COMPUTE=compute, **launch_options(1),
        )  # fmt: skip
    return grad_weight, grad_positions


def _as_rows(x: Tensor) -> Tensor:
    """Return `x` with contiguous rows, copied only if its strides require it."""
    return x if x.size(1) < 2 or x.stride(1) == 1 else x.contiguous()


def _block(columns: int, most: int) -> int:
    """Return the columns of a program, at least those that share a counter of random bits."""
    return max(4, min(most, next_power_of_2(columns)))


def _state(dropout_p: float, rng: Tensor | None) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if rng is None:
        raise ValueError("embedding: dropout needs rng, its seed and offset")
    return rng


def _sortable(ids: Tensor, table: int) -> Tensor:
    """Half the digits to sort by, where they suffice. Those out of range stay so."""
    if ids.dtype == torch.int64 and table < 2**31 - 1:
        return ids.clamp(-1, table).to(torch.int32)
    return ids
