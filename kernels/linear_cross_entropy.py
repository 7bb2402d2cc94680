"""linear_cross_entropy on NVIDIA GPUs: the cross-entropy of logits = input linear_weight^T + linear_bias that never
exist all together (as in Liger Kernel, Hsu et al. 2024).

Block of rows by block of rows: cuBLAS makes the logits, cross_entropy's kernel writes the losses and, over the logits,
their gradient, and cuBLAS multiplies it: three products in all, none computed twice.

Each block reads and writes the whole float32 gradient of linear_weight, 8 C D bytes, which takes as long as multiplying
about 650 rows. So blocks have 2,048 rows or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cross_entropy import write_losses
from .launch import compute_dtype
from .losses import MEAN, NONE, reduced, totals_of

LEAST_ROWS, MOST_BLOCKS = 2048, 16
ROWS_MULTIPLE = 256  # whole tiles of cuBLAS
# Elements between rows of logits, a multiple: cuBLAS and the kernel both want rows that begin at 16 bytes.
LOGITS_MULTIPLE = 64


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(
        None, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
        (need_input, need_weight, need_bias),
    )  # fmt: skip


def linear_cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, *grads = _run(
        grad.contiguous() if reduction == NONE else None, input, linear_weight, target, linear_bias, weight, reduction,
        ignore_index, label_smoothing, (need_input, need_weight, need_bias),
    )  # fmt: skip
    grad_input, grad_weight, grad_bias = grads if reduction == NONE else [g.mul_(grad) for g in grads]
    return grad_input, grad_weight, grad_bias


def block_rows(rows: int) -> int:
    """Return the number of rows whose logits are in memory at once; blocks are as equal as whole tiles allow."""
    most = max(LEAST_ROWS, _round_up(-(-rows // MOST_BLOCKS), ROWS_MULTIPLE))
    blocks = max(1, -(-rows // most))
    return _round_up(-(-rows // blocks), ROWS_MULTIPLE)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@torch.no_grad()
def _run(
    upstream: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, and the gradients for the given upstream gradients of the rows' losses, or for 1."""
    compute, dtype, device = compute_dtype(input.dtype), input.dtype, input.device
    rows, classes = input.size(0), linear_weight.size(0)
    need_input, need_weight, need_bias = wanted
    losses = torch.empty(rows, dtype=compute, device=device)
    grad_input = torch.empty(input.shape if need_input else 0, dtype=compute, device=device)
    grad_weight = torch.empty(linear_weight.shape if need_weight else 0, dtype=compute, device=device)
    grad_bias = torch.zeros(classes if need_bias else 0, dtype=compute, device=device)
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    bias = None if linear_bias is None else linear_bias.to(dtype)
    totals = totals_of(input, classes, target, weight, reduction, ignore_index, label_smoothing)
    # float16 would lose gradients that have been divided by the number of rows. At most gain they are: no target weighs
    # more than all together.
    gain = min(2**15, 1 << (rows - 1).bit_length()) if dtype == torch.float16 and reduction == MEAN else 1
    if gain != 1:
        upstream = torch.full((rows,), float(gain), dtype=compute, device=device)

    block = block_rows(rows)
    buffer = torch.empty((min(rows, block), _round_up(classes, LOGITS_MULTIPLE)), dtype=dtype, device=device)
    for begin in range(0, rows, block):
        part = slice(begin, min(rows, begin + block))
        x = input[part]
        logits = buffer[: x.size(0), :classes]
        if bias is None:
            torch.mm(x, linear_weight.t(), out=logits)
        else:
            torch.addmm(bias, x, linear_weight.t(), out=logits)
        write_losses(
            logits, target[part], weight, totals, None if upstream is None else upstream[part], losses[part], None,
            logits if any(wanted) else None, ignore_index, label_smoothing, averaged=reduction == MEAN,
        )  # fmt: skip
        if need_input:
            _multiply(logits, linear_weight, grad_input[part], add=False)
        if need_weight:
            _multiply(logits.t(), x, grad_weight, add=begin > 0)
        if need_bias:
            grad_bias += logits.sum(0, dtype=compute)
    if gain != 1:
        for grad in (grad_input, grad_weight, grad_bias):
            grad *= 1 / gain
    return reduced(losses, totals, reduction), grad_input, grad_weight, grad_bias


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Compute out (+)= a b in out's dtype."""
    if a.dtype == out.dtype or not a.is_cuda:  # on the CPU, products of 16 bits with sums of 32 are not there
        a, b = a.to(out.dtype), b.to(out.dtype)
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
