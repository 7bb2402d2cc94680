"""linear_cross_entropy on CPUs whose products PyTorch's library multiplies faster than our kernels do (`_products`).

Block of rows by block of rows: PyTorch makes the logits, our cross_entropy writes the losses and the logits' gradient,
and PyTorch multiplies it: three products in all, none computed twice. As operators of a namespace of their own, with
the names and arguments of the compiled ones, so that the compiler sees one operator instead of all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.ops.backends import cpp
from tinyllm.ops.cross_entropy import REDUCTIONS

NAMESPACE = "tinyllm_products"

# What is held besides the gradients: logits of two 36ths of the rows, and the gradient of one 36th until it is written
# over them, together less than a tenth of all.
_STEPS, _LEAST_ROWS = 36, 16
# Ranges of classes, whose part of the weight's gradient stays in the caches.
_CLASSES = 512

_MEAN = REDUCTIONS.index("mean")
_NONE = REDUCTIONS.index("none")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(None, arguments[:8], arguments[8:])


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, *grads = _run(grad, arguments[:8], arguments[8:])
    grad_input, grad_weight, grad_bias = grads if grad.dim() > 0 else [g.mul_(grad) for g in grads]
    return grad_input, grad_weight, grad_bias


_library = torch.library.Library(NAMESPACE, "DEF")


def register() -> tuple[str, ...]:
    """Define the operators, with the schemas of the compiled ones, where these are there. Return their namespaces."""
    if not cpp.loaded:
        return ()
    for name, function in (("linear_cross_entropy_fwd", _forward), ("linear_cross_entropy_bwd", _backward)):
        schema = getattr(torch.ops.tinyllm, name).default._schema
        _library.define(str(schema).removeprefix("tinyllm::"), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CPU")
    return (NAMESPACE,)


def _run(
    grad: Tensor | None, arguments: tuple[Any, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(grad, *arguments)
    upstream = None if grad is None or grad.dim() == 0 else grad.contiguous()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # whose choice of dtypes has been made
        return _run_blocks(upstream, wanted, *arguments)


def _check(
    grad: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    *_: Any,
) -> None:
    """Refuse raw calls that slices and broadcasting would let pass."""
    if input.dim() != 2 or linear_weight.dim() != 2 or linear_weight.size(1) != input.size(1):
        raise ValueError(
            f"linear_cross_entropy: linear_weight has shape {list(linear_weight.shape)}, input {list(input.shape)}; "
            "(classes, features) and (rows, features) are needed"
        )
    rows, classes = input.size(0), linear_weight.size(0)
    for name, tensor, shape in (
        ("target", target, [rows]),
        ("linear_bias", linear_bias, [classes]),
        ("grad", grad, [rows] if reduction == _NONE else []),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"linear_cross_entropy: {name} has shape {list(tensor.shape)}; {shape} is needed")
    if not 0 <= reduction < len(REDUCTIONS):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction}; 0 to {len(REDUCTIONS) - 1} is needed")


def _run_blocks(
    upstream: Tensor | None,
    wanted: tuple[bool, ...],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, and the gradients for these upstream gradients of the rows' losses, or for 1."""
    rows, classes = input.size(0), linear_weight.size(0)
    dtype, compute = input.dtype, torch.promote_types(input.dtype, torch.float32)
    need_input, need_weight, need_bias = wanted
    losses = input.new_empty(rows, dtype=compute)
    grad_input = input.new_empty(input.shape if need_input else (0,), dtype=compute)
    grad_weight = input.new_empty(linear_weight.shape if need_weight else (0,), dtype=compute)
    grad_bias = input.new_zeros((classes,) if need_bias else (0,), dtype=compute)
    divisor = _weight_of_targets(target, weight, ignore_index) if reduction == _MEAN else 1.0
    # The products' results are divided, not the logits' gradient. By 0 that is divided, so that ignored rows keep a 0.
    scale = 1.0 if divisor == 0 else 1 / divisor
    if divisor == 0:
        upstream = losses.new_full((rows,), math.inf)

    # The first rows' logits need no memory of their own: a class' logits lie where its row of the weight's gradient
    # will be.
    in_place = grad_weight.view(dtype).t()[:rows] if need_weight else None
    step = max(_LEAST_ROWS, -(-rows // _STEPS))
    begin = 0
    while begin < rows:
        first = begin == 0
        end = min(rows, begin + (in_place.size(0) if first and in_place is not None else 2 * step))
        x = input[begin:end]
        logits = _logits(x, linear_weight, linear_bias, in_place if first else None)
        for some in _ranges(begin, end, step):
            losses[some] = _losses_and_gradient_(
                logits[some.start - begin : some.stop - begin],
                target[some],
                weight,
                None if upstream is None else upstream[some],
                (_NONE, ignore_index, label_smoothing),
                any(wanted),
            )
        if need_input:
            grad_input[begin:end] = torch.mm(logits, linear_weight)
        if need_bias:
            grad_bias.add_(logits.sum(0, dtype=compute), alpha=scale)
        if need_weight:
            _add_to_weights_gradient_(grad_weight, logits, x, scale, first)
        del logits  # before the next are made
        begin = end
    grad_input *= scale
    return losses if reduction == _NONE else losses.sum() / divisor, grad_input, grad_weight, grad_bias


def _ranges(begin: int, end: int, step: int) -> Iterator[slice]:
    return (slice(first, min(end, first + step)) for first in range(begin, end, step))


def _logits(x: Tensor, linear_weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Return x linear_weight^T + bias, (rows, classes), in `out` if that is given, whose columns are contiguous."""
    if out is None:
        return F.linear(x, linear_weight, bias)
    for part in _ranges(0, linear_weight.size(0), _CLASSES):
        columns = out.t()[part]
        if bias is None:
            torch.mm(linear_weight[part], x.t(), out=columns)
        else:
            torch.addmm(bias[part].unsqueeze(1), linear_weight[part], x.t(), out=columns)
    return out


def _losses_and_gradient_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    options: tuple[int, int, float],
    with_grad: bool,
) -> Tensor:
    """Return the rows' losses, and write the logits' gradient over them, for these upstream gradients or for 1."""
    raw = torch.ops.tinyllm
    # Columns that are contiguous become rows that are: in one step, PyTorch would go through them against their order.
    held = logits if logits.is_contiguous() else logits.t().contiguous().t().contiguous()
    losses, max_and_sum, grad = raw.cross_entropy_fwd(held, target, weight, *options, with_grad and upstream is None)
    if with_grad:
        if upstream is not None:
            grad = raw.cross_entropy_bwd(upstream, held, target, weight, max_and_sum, *options)
        logits.copy_(grad)
    return losses


def _add_to_weights_gradient_(grad_weight: Tensor, logits: Tensor, x: Tensor, scale: float, first: bool) -> None:
    """Add scale logits^T x to grad_weight, which holds nothing before the first rows, or their logits themselves."""
    for part in _ranges(0, grad_weight.size(0), _CLASSES):
        product = torch.mm(logits[:, part].t(), x)
        if first:
            grad_weight[part] = product.to(grad_weight.dtype).mul_(scale)
        else:
            grad_weight[part].add_(product, alpha=scale)


def _weight_of_targets(target: Tensor, weight: Tensor | None, ignore_index: int) -> float:
    """Return what a mean divides by: the weights of all targets that are not ignored."""
    counted = target != ignore_index
    if weight is None:
        return float(counted.sum())
    # What is not a class is left to the kernel to refuse.
    return float(weight[target[counted].clamp(0, weight.numel() - 1)].sum(dtype=torch.float64))
