"""cross_entropy on NVIDIA GPUs.

A program takes a row of logits. It goes over the row once for the maximum and the sum of exponentials ("online",
Milakov & Gimelshein 2018). Each lane keeps a maximum and a sum of its own, which it raises once for the K elements that
it has of a tile, and which meet the others' only behind the loop: 1 + 1/K exponentials an element, and no step waits
for other threads. Where a gradient is wanted the program then goes over the row again and writes it; backwards, because
what was read last is likeliest to be in the second-level cache still. So loss and gradient together cost about one read
and one write of the logits.

With p = softmax(x), t the target, w the class weights (ones), s the label smoothing and C classes

    loss         = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
    dloss / dx_c = ((1 - s) w_t + s / C sum w) p_c - s / C w_c - (c == t) (1 - s) w_t

Rows of 50,257 16-bit logits begin at any even address. So a row is taken as whole 16-byte vectors, found from its
address, and as the few elements before and behind them, its edges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compute_dtype, launch_options, next_power_of_2, triton_compute_dtype, warps_for
from .losses import MEAN, NONE, reduced, totals_of

LOG2_E = tl.constexpr(1.4426950408889634)
# Bytes of a row that a thread holds, once they are in the compute dtype; label smoothing needs registers of its own.
PER_THREAD, PER_THREAD_SMOOTHING = 128, 64
# Bytes of a row from which it has more threads, so that the rows that are worked on fit the second-level cache.
LONG_ROW = 1 << 17


@triton.jit
def softmax_exp(x):
    """Return e^x for x <= 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def vectors_of(offset, columns, VECTOR: tl.constexpr):
    """Return the part of a row beginning at `offset` that consists of whole vectors: its offset, the number of elements
    before it, and its number of elements."""
    first = (offset + (VECTOR - 1)) // VECTOR * VECTOR
    head = tl.minimum(first - offset, columns).to(tl.int32)
    return first, head, (columns - head) // VECTOR * VECTOR


@triton.jit
def edges_of(head, whole, columns, VECTOR: tl.constexpr):
    """Return the columns before and after the whole vectors, and which of them exist."""
    i = tl.arange(0, 2 * VECTOR)
    column = tl.where(i < VECTOR, i, head + whole + i - VECTOR)
    return column, tl.where(i < VECTOR, i < head, column < columns)


@triton.jit
def zero_row(out, offset, columns, SAME: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    first, whole = offset, columns
    if SAME:
        first, head, whole = vectors_of(offset, columns, VECTOR)
        column, inside = edges_of(head, whole, columns, VECTOR)
        tl.store(out + offset + column, tl.zeros([2 * VECTOR], out.dtype.element_ty), inside)
    for begin in range(0, whole, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(out + first + at, tl.zeros([BLOCK], out.dtype.element_ty), at < whole)


@triton.jit
def gradient_of(logit, column, inside, target, weight, row_max, factor, at_target, everywhere, SMOOTHING: tl.constexpr):
    """Compute the gradient of some of a row's logits."""
    value = softmax_exp(logit - row_max) * factor
    if SMOOTHING > 0:
        if weight is not None:
            value -= tl.load(weight + column, inside, other=0.0).to(value.dtype) * everywhere
        else:
            value -= everywhere
    return tl.where(column == target, value - at_target, value)


@triton.jit
def write_gradient(
    x,  # (rows, columns), this row at `offset`
    grad_x,  # likewise, at `grad_offset`; may be x
    weight,  # (columns) or None
    offset,
    grad_offset,
    columns,
    target,
    row_max,
    row_sum,
    hard,  # (1 - s) w_t
    uniform,  # s / C
    weight_sum,
    upstream,  # gradient of this row's loss
    SMOOTHING: tl.constexpr,
    EDGES: tl.constexpr,
    SAME: tl.constexpr,
    VECTOR: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    first, head, whole = vectors_of(offset, columns, VECTOR)
    # The first says the same, so that the compiler sees it, of rows that begin as x's do.
    grad_first = (grad_offset + (VECTOR - 1)) // VECTOR * VECTOR if SAME else grad_offset + head
    factor = upstream * hard / row_sum
    if SMOOTHING > 0:
        factor = upstream * (hard + uniform * weight_sum) / row_sum
    at_target, everywhere = upstream * hard, upstream * uniform
    target = target.to(tl.int32)  # of what is no class, everything is NaN anyway
    whole_weight = weight
    if weight is not None:
        whole_weight = weight + head
    if EDGES:
        column, there = edges_of(head, whole, columns, VECTOR)
        edge = tl.load(x + offset + column, there, other=0.0).to(COMPUTE)
        edge = gradient_of(edge, column, there, target, weight, row_max, factor, at_target, everywhere, SMOOTHING)
        tl.store(grad_x + grad_offset + column, edge.to(grad_x.dtype.element_ty), there)
    tile = tl.arange(0, K)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    last = (whole - 1) // (K * BLOCK) * (K * BLOCK)
    for done in range(0, whole, K * BLOCK):
        at = last - done + tile
        inside = at < whole
        logit = tl.load(x + first + at, inside, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        value = gradient_of(
            logit, at, inside, target - head, whole_weight, row_max, factor, at_target, everywhere, SMOOTHING
        )
        tl.store(grad_x + grad_first + at, value.to(grad_x.dtype.element_ty), inside, eviction_policy="evict_first")


@triton.jit
def weight_of(weight, target, columns, COMPUTE: tl.constexpr):
    """Load the weight of a target's class; NaN for an invalid target."""
    is_class = (target >= 0) & (target < columns)
    if weight is not None:
        return tl.load(weight + target, is_class, other=float("nan")).to(COMPUTE)
    else:
        return tl.where(is_class, 1.0, float("nan")).to(COMPUTE)


@triton.jit
def weights_and_scale(weight, totals, columns, SMOOTHING: tl.constexpr, AVERAGED: tl.constexpr, COMPUTE: tl.constexpr):
    """Return s / C, the sum of the class weights, and what a row's loss is multiplied by."""
    uniform = tl.full([], SMOOTHING, COMPUTE) / columns
    weight_sum = tl.zeros([], COMPUTE) + columns
    if SMOOTHING > 0 and weight is not None:
        weight_sum = tl.load(totals + 1)
    scale = tl.full([], 1.0, COMPUTE)
    if AVERAGED:
        scale = scale / tl.load(totals)
    return uniform, weight_sum, scale


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    x,  # (rows, columns), x_row elements from row to row
    target,  # (rows)
    weight,  # (columns) or None
    totals,  # (2): what the mean divides by, the sum of the class weights
    upstream,  # (rows), the gradients of the losses, or None: ones
    loss,  # (rows)
    max_and_sum,  # (rows, 2) or None
    grad_x,  # (rows, columns), grad_row elements from row to row, or None; may be x
    x_row,
    grad_row,
    columns,
    ignore_index,
    SMOOTHING: tl.constexpr,
    AVERAGED: tl.constexpr,
    EDGES: tl.constexpr,
    SAME: tl.constexpr,
    VECTOR: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_target = tl.load(target + row)
    offset, grad_offset = row * x_row, row * grad_row
    if row_target == ignore_index:
        tl.store(loss + row, 0.0)
        if max_and_sum is not None:
            tl.store(max_and_sum + row * 2, 0.0)
            tl.store(max_and_sum + row * 2 + 1, 1.0)
        if grad_x is not None:
            zero_row(grad_x, grad_offset, columns, SAME, VECTOR, K * BLOCK)
        return
    is_class = (row_target >= 0) & (row_target < columns)
    target_logit = tl.load(x + offset + row_target, is_class, other=float("nan")).to(COMPUTE)
    hard = weight_of(weight, row_target, columns, COMPUTE) * tl.full([], 1.0 - SMOOTHING, COMPUTE)
    uniform, weight_sum, scale = weights_and_scale(weight, totals, columns, SMOOTHING, AVERAGED, COMPUTE)
    # Distances that label smoothing sums are from a logit that is known before: large logits would cancel.
    near = tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0.0)

    first, head, whole = vectors_of(offset, columns, VECTOR)
    tile = tl.arange(0, K)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # Not -inf: a lane that is -inf throughout must give exponentials of 0, not NaN.
    lane_max = tl.full([BLOCK], LOWEST, COMPUTE)
    lane_sum = tl.zeros([BLOCK], COMPUTE)
    lane_distances = tl.zeros([BLOCK], COMPUTE)
    for begin in range(0, whole, K * BLOCK):
        inside = begin + tile < whole
        logit = tl.load(x + first + begin + tile, inside, other=float("-inf"), eviction_policy="evict_last").to(COMPUTE)
        higher = tl.maximum(lane_max, tl.max(logit, 0))
        exps = tl.sum(softmax_exp(logit - higher[None, :]), 0)
        lane_sum = lane_sum * softmax_exp(lane_max - higher) + exps
        lane_max = higher
        if SMOOTHING > 0:
            distance = logit - near
            if weight is not None:
                distance *= tl.load(weight + head + begin + tile, inside, other=0.0).to(COMPUTE)
            lane_distances += tl.sum(tl.where(inside, distance, 0.0), 0)
    row_max = tl.max(lane_max, 0)
    distances = tl.sum(lane_distances, 0)
    if EDGES:
        column, there = edges_of(head, whole, columns, VECTOR)
        edge = tl.load(x + offset + column, there, other=float("-inf")).to(COMPUTE)
        row_max = tl.maximum(row_max, tl.max(edge, 0))
        row_sum = tl.sum(lane_sum * softmax_exp(lane_max - row_max), 0) + tl.sum(softmax_exp(edge - row_max), 0)
        if SMOOTHING > 0:
            edge -= near
            if weight is not None:
                edge *= tl.load(weight + column, there, other=0.0).to(COMPUTE)
            distances += tl.sum(tl.where(there, edge, 0.0), 0)
    else:
        row_sum = tl.sum(lane_sum * softmax_exp(lane_max - row_max), 0)

    log_sum = tl.log(row_sum)
    row_loss = hard * (log_sum - (target_logit - row_max))
    if SMOOTHING > 0:
        row_loss += uniform * (weight_sum * (log_sum + (row_max - near)) - distances)
    tl.store(loss + row, row_loss)
    if max_and_sum is not None:
        tl.store(max_and_sum + row * 2, row_max)
        tl.store(max_and_sum + row * 2 + 1, row_sum)
    if grad_x is not None:
        if upstream is not None:
            scale *= tl.load(upstream + row)
        write_gradient(
            x, grad_x, weight, offset, grad_offset, columns, row_target, row_max, row_sum, hard, uniform, weight_sum,
            scale, SMOOTHING, EDGES, SAME, VECTOR, K, BLOCK, COMPUTE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def backward_kernel(
    grad,  # (rows) or ()
    x,  # (rows, columns), x_row elements from row to row
    target,  # (rows)
    weight,  # (columns) or None
    totals,  # (2): what the mean divides by, the sum of the class weights
    max_and_sum,  # (rows, 2)
    grad_x,  # (rows, columns), grad_row elements from row to row
    x_row,
    grad_row,
    columns,
    ignore_index,
    BY_ROW: tl.constexpr,
    UNLESS_ONE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    AVERAGED: tl.constexpr,
    EDGES: tl.constexpr,
    SAME: tl.constexpr,
    VECTOR: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad + row if BY_ROW else grad).to(COMPUTE)
    if UNLESS_ONE and upstream == 1.0:
        return
    row_target = tl.load(target + row)
    offset, grad_offset = row * x_row, row * grad_row
    if row_target == ignore_index:
        zero_row(grad_x, grad_offset, columns, SAME, VECTOR, K * BLOCK)
        return
    hard = weight_of(weight, row_target, columns, COMPUTE) * tl.full([], 1.0 - SMOOTHING, COMPUTE)
    uniform, weight_sum, scale = weights_and_scale(weight, totals, columns, SMOOTHING, AVERAGED, COMPUTE)
    row_max, row_sum = tl.load(max_and_sum + row * 2), tl.load(max_and_sum + row * 2 + 1)
    write_gradient(
        x, grad_x, weight, offset, grad_offset, columns, row_target, row_max, row_sum, hard, uniform, weight_sum,
        scale * upstream, SMOOTHING, EDGES, SAME, VECTOR, K, BLOCK, COMPUTE,
    )  # fmt: skip


def cross_entropy_fwd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute, rows = compute_dtype(input.dtype), input.size(0)
    losses = torch.empty(rows, dtype=compute, device=input.device)
    max_and_sum = torch.empty((rows, 2), dtype=compute, device=input.device)
    grad_input = torch.empty(input.shape if with_grad else 0, dtype=input.dtype, device=input.device)
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    options = (ignore_index, label_smoothing)
    totals = totals_of(input, input.size(1), target, weight, reduction, *options)
    write_losses(
        input, target, weight, totals, None, losses, max_and_sum, grad_input if with_grad else None, *options,
        averaged=reduction == MEAN,
    )  # fmt: skip
    return reduced(losses, totals, reduction), max_and_sum, grad_input


def cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    max_and_sum: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _backward(
        grad, input, target, weight, max_and_sum, reduction, ignore_index, label_smoothing, grad_input, unless_one=False
    )
    return grad_input


def correct_unless_one_(
    grad_input: Tensor,
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    max_and_sum: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Correct `grad_input`, which forward wrote for an upstream gradient of 1, for this one, a scalar of any dtype.

    Only the device looks at it. It is computed again, since multiplying would round 16-bit gradients twice, and read as
    much.
    """
    _backward(
        grad, input, target, weight, max_and_sum, reduction, ignore_index, label_smoothing, grad_input, unless_one=True
    )
    return grad_input


def write_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    upstream: Tensor | None,
    losses: Tensor,
    max_and_sum: Tensor | None,
    grad_input: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    averaged: bool,
) -> None:
    """Return the rows' losses and, on request, the gradients of their logits.

    For these upstream gradients of the losses (None: 1), and divided by what the mean divides by if `averaged`.
    `grad_input` may be `input`.
    """
    if input.size(0) == 0:
        return
    x = _as_rows(input)
    compute = compute_dtype(input.dtype)
    forward_kernel[(x.size(0),)](
        x, target, weight, totals, upstream, losses, max_and_sum, grad_input, x.stride(0),
        0 if grad_input is None else grad_input.stride(0), x.size(1), ignore_index, SMOOTHING=label_smoothing,
        AVERAGED=averaged, COMPUTE=triton_compute_dtype(input.dtype), LOWEST=torch.finfo(compute).min,
        **_layout(x, grad_input, label_smoothing),
    )  # fmt: skip


def _backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    max_and_sum: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    grad_input: Tensor,
    *,
    unless_one: bool,
) -> None:
    if input.size(0) == 0:
        return
    x = _as_rows(input)
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    totals = totals_of(input, x.size(1), target, weight, reduction, ignore_index, label_smoothing)
    backward_kernel[(x.size(0),)](
        grad.contiguous(), x, target, weight, totals, max_and_sum, grad_input, x.stride(0), grad_input.stride(0),
        x.size(1), ignore_index, BY_ROW=reduction == NONE, UNLESS_ONE=unless_one, SMOOTHING=label_smoothing,
        AVERAGED=reduction == MEAN, COMPUTE=triton_compute_dtype(input.dtype),
        **_layout(x, grad_input, label_smoothing),
    )  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """Return `x` with contiguous rows, copied only if its strides require it."""
    return x if x.size(1) < 2 or x.stride(1) == 1 else x.contiguous()


def _layout(x: Tensor, grad_x: Tensor | None, label_smoothing: float) -> dict[str, int | bool]:
    """Return the constants by which the kernels divide rows."""
    widest = 16 // x.element_size()
    vector = widest if x.data_ptr() % 16 == 0 else 1
    columns, row = x.size(1), x.stride(0)
    held = PER_THREAD_SMOOTHING if label_smoothing > 0.0 else PER_THREAD
    elements = held // compute_dtype(x.dtype).itemsize
    most = 16 if columns * x.element_size() >= LONG_ROW else 8
    warps = warps_for(next_power_of_2(columns), elements, most)
    k = elements // widest
    return {
        "VECTOR": vector,
        "EDGES": row % vector != 0 or columns % vector != 0,
        "SAME": grad_x is not None and grad_x.data_ptr() % 16 == 0 and (grad_x.stride(0) - row) % vector == 0,
        "K": k,
        "BLOCK": 32 * warps * widest,
        **launch_options(warps),
    }
