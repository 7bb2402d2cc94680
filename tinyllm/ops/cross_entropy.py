"""cross_entropy: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.backends import triton
from tinyllm.ops.dispatch import FLOATS, NOT_DOUBLE, Kernels, Operator, choose, kernels, register_fake

REDUCTIONS = ("none", "mean", "sum")  # in the order of PyTorch's numbers for them


def _classes(input: Tensor) -> int:
    return input.size(min(1, input.dim() - 1))


def _refuses(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> str | None:
    if input.dim() == 0:
        return "input is a scalar; the kernel takes (N, C), (C,) or (N, C, d1, ...)"
    index_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    return refuses_target(target, index_shape, input) or refuses_options(
        weight, _classes(input), input, reduction, label_smoothing
    )


def refuses_target(target: Tensor, index_shape: torch.Size, input: Tensor) -> str | None:
    """Return why the losses' kernels cannot serve a target."""
    if target.dtype not in (torch.int64, torch.uint8) or target.shape != index_shape:
        return (
            f"target is {target.dtype} of shape {list(target.shape)}; the kernel takes class indices of shape "
            f"{list(index_shape)}"
        )
    if target.device != input.device:
        return f"target is on {target.device}; the kernel needs it on input's device, {input.device}"
    return None


def refuses_options(
    weight: Tensor | None, classes: int, input: Tensor, reduction: str, label_smoothing: float
) -> str | None:
    """Return why the losses' kernels cannot serve class weights and options."""
    if reduction not in REDUCTIONS:
        return f"reduction is {reduction!r}; the kernel knows {', '.join(REDUCTIONS)}"
    if not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing is {label_smoothing}; the kernel takes [0, 1]"
    if weight is None:
        return None
    if list(weight.shape) != [classes] or weight.device != input.device:
        return f"weight has shape {list(weight.shape)} on {weight.device}; the kernel takes [{classes}]"
    if weight.dtype not in (input.dtype, torch.float32):
        return f"weight is {weight.dtype}; the kernel takes input's dtype, {input.dtype}, or float32"
    if needs_grad(weight):
        return "weight requires a gradient; the kernel gives none"
    return None


CROSS_ENTROPY = Operator(
    "cross_entropy", cpp=Kernels(FLOATS), cuda=Kernels(NOT_DOUBLE), triton=Kernels(FLOATS), refuses=_refuses
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy between logits and targets, as `torch.nn.functional.cross_entropy`.

    A row of logits is read from memory once (after Milakov & Gimelshein 2018, "Online normalizer calculation for
    softmax"). Where a gradient will be wanted, forward writes it right then: loss and gradient together cost one read
    and one write of the logits.

    Args:
        input: (N, C), (C,) or (N, C, d1, ...) logits, any floating dtype and strides.
        target: class indices, (N,), () or (N, d1, ...), int64 or uint8; or probabilities of input's shape.
        weight: (C,), of the classes, or None; input's dtype or float32.
        ignore_index: rows with this target give 0, and a gradient of 0 even where their logits are NaN.
        reduction: "mean" (over the weights of the rows that are not ignored; NaN if all are), "sum" or "none".
        label_smoothing: in [0, 1]: the share of the target that is spread over all classes (Szegedy et al. 2016).

    Returns:
        A scalar, or target's shape for "none", of input's dtype (float32 for 16-bit input under autocast). Sums are
        float32 (float64 for float64).

    Raises:
        IndexError: a target that is neither a class nor ignore_index. On a GPU, where that would need to wait for it,
            the row's loss and gradient are NaN instead.
        RuntimeError, ValueError: PyTorch's own, for shapes, dtypes and options that do not fit.
    """
    dtype = input.dtype
    if autocast_dtype(input) is not None:
        dtype = torch.promote_types(dtype, torch.float32)  # what PyTorch's autocast does with its cross_entropy
    backend = choose(CROSS_ENTROPY, input, target, weight, reduction, label_smoothing)
    if backend == "reference":
        return reference.cross_entropy(
            input.to(dtype),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    # (N, C, d1, ...) -> (N, d1, ..., C) -> rows.
    rows = input if input.dim() == 2 else input.movedim(min(1, input.dim() - 1), -1).reshape(-1, _classes(input))
    arguments = (target.long().reshape(-1), weight, REDUCTIONS.index(reduction), ignore_index, label_smoothing)
    if needs_grad(input):
        loss = record(_CrossEntropy, rows, *arguments, dtype, backend)
    else:
        loss = kernels(backend).cross_entropy_fwd(rows, *arguments, False)[0].to(dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        options = (reduction, ignore_index, label_smoothing)
        # Without a reduction each row has its own upstream gradient. float16 could lose a gradient that has not been
        # scaled yet. And a compiled graph cannot ask whether the upstream gradient is 1.
        early = reduction != 0 and input.dtype != torch.float16 and not torch.compiler.is_compiling()
        if backend == "cuda":
            early = early and _corrects_on_the_gpu(input)
        loss, max_and_sum, grad_input = kernels(backend).cross_entropy_fwd(input, target, weight, *options, early)
        ctx.save_for_backward(input, target, weight, max_and_sum)
        ctx.options, ctx.grad_input, ctx.backend = options, grad_input if early else None, backend
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, target, weight, max_and_sum = ctx.saved_tensors
        nothing = (None,) * 7
        if differs_from_kernels(grad):
            reduction, ignore_index, label_smoothing = ctx.options
            found = grads_by_reference(
                lambda x: reference.cross_entropy(
                    x,
                    target,
                    weight,
                    ignore_index=ignore_index,
                    reduction=REDUCTIONS[reduction],
                    label_smoothing=label_smoothing,
                ).to(grad.dtype),
                (input,),
                (True,),
                (grad,),
            )
            return found[0], *nothing
        # Handed out once, because whoever gets it may write to it; a second backward computes it again.
        early, ctx.grad_input = ctx.grad_input, None
        if early is not None and ctx.backend != "cpp":  # which does not wait for the device to say what grad is
            from tinyllm.kernels.cross_entropy import correct_unless_one_

            return correct_unless_one_(early, grad, input, target, weight, max_and_sum, *ctx.options), *nothing
        if early is not None and grad.item() == 1.0:
            return early, *nothing
        if early is not None and early.dtype == max_and_sum.dtype:  # in 16 bits it would be rounded twice
            return early.mul_(grad), *nothing
        return kernels(ctx.backend).cross_entropy_bwd(
            grad.to(max_and_sum.dtype), input, target, weight, max_and_sum, *ctx.options
        ), *nothing


# Logits of fewer bytes are read again from the second-level cache, which costs less than one more launch of Triton's.
_CACHED = 1 << 25


def _corrects_on_the_gpu(input: Tensor) -> bool:
    """Return whether the CUDA C++ kernel should write the gradient early: Triton's kernel, which knows the same
    statistics of the rows, then corrects it, if need be, without the host's knowing."""
    return input.is_cuda and triton.why_not is None and input.numel() * input.element_size() >= _CACHED


@register_fake("cross_entropy_fwd")
def _(input, target, weight, reduction, ignore_index, label_smoothing, with_grad):  # type: ignore[no-untyped-def]
    compute = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(input.shape[:1] if reduction == 0 else (), dtype=compute)
    max_and_sum = input.new_empty((input.size(0), 2), dtype=compute)
    return loss, max_and_sum, input.new_empty(input.shape if with_grad else (0,))


@register_fake("cross_entropy_bwd")
def _(grad, input, target, weight, max_and_sum, reduction, ignore_index, label_smoothing):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape)
