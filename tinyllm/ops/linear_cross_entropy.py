"""linear_cross_entropy: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops import _chunked_loss
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.cross_entropy import REDUCTIONS, refuses_options, refuses_target
from tinyllm.ops.dispatch import FLOATS, Kernels, Operator, choose, kernels, register_fake
from tinyllm.ops.linear import products_refuse


def _refuses(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> str | None:
    if input.dim() not in (1, 2) or linear_weight.dim() != 2 or input.size(-1) != linear_weight.size(-1):
        return (
            f"input has shape {list(input.shape)}, linear_weight {list(linear_weight.shape)}; the kernel takes "
            "(N, D) or (D,), and (C, D)"
        )
    if input.numel() == 0 or linear_weight.numel() == 0:
        return "there is nothing to multiply"
    classes = linear_weight.size(0)
    tensors: list[tuple[str, Tensor, tuple[torch.dtype, ...]]] = [("linear_weight", linear_weight, (input.dtype,))]
    if linear_bias is not None:
        if list(linear_bias.shape) != [classes]:
            return f"linear_bias has shape {list(linear_bias.shape)}; the kernel takes [{classes}]"
        tensors.append(("linear_bias", linear_bias, (input.dtype, torch.float32)))
    for name, tensor, dtypes in tensors:
        if tensor.dtype not in dtypes:
            return f"{name} is {tensor.dtype}; the kernel takes input's dtype, {input.dtype}"
        if tensor.device != input.device:
            return f"{name} is on {tensor.device}; the kernel needs it on input's device, {input.device}"
    return refuses_target(target, input.shape[:-1], input) or refuses_options(
        weight, classes, input, reduction, label_smoothing
    )


LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy",
    cpp=Kernels(FLOATS),
    cuda="Triton's kernel serves it",
    triton=Kernels(FLOATS),
    refuses=_refuses,
)
# The backend whose products are PyTorch's and whose losses are the compiled kernels'.
_PRODUCTS = "products"
_products_namespaces = _chunked_loss.register()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Compute `cross_entropy(linear(input, linear_weight, linear_bias), target)` whose logits never exist all together.

    As `torch.nn.functional.linear_cross_entropy` of torch 2.13, on every torch. Where gradients will be wanted, forward
    computes them, a block of rows at a time (as in Liger Kernel, Hsu et al. 2024): three matrix products in all.
    Besides the gradients, which are float32 until backward, that takes less than a tenth of the logits' memory (or 48
    rows of it; 2,048 on a GPU) and twice the input's. Without a reduction the gradients wait for backward, which
    computes the logits again. Where PyTorch multiplies (see `tinyllm info`), the last bits may depend on the number of
    threads.

    Args:
        input: (N, D) or (D,), any floating dtype and strides.
        linear_weight: (C, D), of input's dtype; or (C, d1, ..., D), for logits (N, C, d1, ...).
        target: class indices, (N,) or (), int64 or uint8; or probabilities of the logits' shape.
        linear_bias: linear_weight.shape[:-1], or None.
        weight, reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: default -100; None where target holds probabilities.
        options: PyTorch's choice of its chunks; taken, and of no effect.

    Returns:
        A scalar, or target's shape for "none", of input's dtype (float32 under autocast, which projects in its own
        dtype). Sums are float32 (float64 for float64).

    Raises:
        IndexError: a target that is neither a class nor ignore_index. On a GPU, where that would need to wait for it,
            the row's loss is NaN instead, and so are the gradients to which it adds.
        RuntimeError, ValueError: PyTorch's own, for shapes, dtypes and options that do not fit.
    """
    low = autocast_dtype(input)
    dtype = input.dtype if low is None else torch.promote_types(input.dtype, torch.float32)
    if low is not None and input.dtype != torch.float64:  # which autocast leaves alone
        input, linear_weight = input.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
    backend = choose(
        LINEAR_CROSS_ENTROPY, input, linear_weight, target, linear_bias, weight, reduction, label_smoothing
    )
    if backend == "reference":
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        ).to(dtype)
    arguments = (input.reshape(-1, input.size(-1)), linear_weight, target.long().reshape(-1), linear_bias, weight)
    numbers = (REDUCTIONS.index(reduction), -100 if ignore_index is None else ignore_index, label_smoothing)
    if backend == "cpp" and _serves_products(input, linear_bias):
        backend = _PRODUCTS
    if needs_grad(input, linear_weight, linear_bias):
        loss = record(_LinearCrossEntropy, *arguments, numbers, dtype, backend)
    else:
        loss = _raw(backend).linear_cross_entropy_fwd(*arguments, *numbers, False, False, False)[0].to(dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _serves_products(input: Tensor, linear_bias: Tensor | None) -> bool:
    # Undivided gradients leave float16's range, and a float32 bias would be rounded with the logits.
    fits = input.dtype != torch.float16 and (linear_bias is None or linear_bias.dtype == input.dtype)
    return fits and products_refuse("linear_cross_entropy", input) is not None


def _raw(backend: str) -> Any:
    return getattr(torch.ops, _chunked_loss.NAMESPACE) if backend == _PRODUCTS else kernels(backend)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        weight: Tensor | None,
        numbers: tuple[int, int, float],
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        arguments = (input, linear_weight, target, linear_bias, weight)
        # Without a reduction each row has its own upstream gradient, which only backward knows.
        early = numbers[0] != 0
        wanted = [
            early and x is not None and needed
            for x, needed in zip((input, linear_weight, linear_bias), _needs(ctx), strict=True)
        ]
        loss, *grads = _raw(backend).linear_cross_entropy_fwd(*arguments, *numbers, *wanted)
        # A compiled graph saves the gradients: it cannot hand something out once.
        compiling = torch.compiler.is_compiling()
        ctx.save_for_backward(*arguments, *(grads if early and compiling else ()))
        ctx.grads = grads if early and not compiling else None
        ctx.numbers, ctx.backend = numbers, backend
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, linear_weight, target, linear_bias, weight, *saved = ctx.saved_tensors
        inputs = (input, linear_weight, linear_bias)
        reduction, ignore_index, label_smoothing = ctx.numbers
        needed = _needs(ctx)
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda x, w, b: reference.linear_cross_entropy(
                    x,
                    w,
                    target,
                    linear_bias=b,
                    weight=weight,
                    reduction=REDUCTIONS[reduction],
                    ignore_index=ignore_index,
                    label_smoothing=label_smoothing,
                ).to(grad.dtype),
                inputs,
                needed,
                (grad,),
            )
            return found[0], found[1], None, found[2], None, None, None, None
        # Handed out once, because whoever gets them may write to them; a second backward computes them again.
        early, ctx.grads = ctx.grads, None
        if saved:
            early = [x * grad for x in saved]
        elif early is None:
            upstream = grad.to(torch.promote_types(input.dtype, torch.float32))
            wanted = [x is not None and need for x, need in zip(inputs, needed, strict=True)]
            early = _raw(ctx.backend).linear_cross_entropy_bwd(
                upstream, input, linear_weight, target, linear_bias, weight, *ctx.numbers, *wanted
            )
        elif ctx.backend == "triton":  # which does not wait for the device to say what grad is
            from tinyllm.kernels.losses import scale_unless_one_

            early = [scale_unless_one_(x, grad) for x in early]
        elif grad.item() != 1.0:
            early = [x.mul_(grad) for x in early]
        found = [
            g.to(x.dtype) if need and x is not None else None for g, x, need in zip(early, inputs, needed, strict=True)
        ]
        return found[0], found[1], None, found[2], None, None, None, None


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Return whether input, linear_weight and linear_bias need a gradient."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]


def _grads(input, linear_weight, need_input, need_weight, need_bias):  # type: ignore[no-untyped-def]
    compute = torch.promote_types(input.dtype, torch.float32)
    shapes = (input.shape, need_input), (linear_weight.shape, need_weight), (linear_weight.shape[:1], need_bias)
    return tuple(input.new_empty(shape if needed else (0,), dtype=compute) for shape, needed in shapes)


@register_fake("linear_cross_entropy_fwd", *_products_namespaces)
def _(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, *needs):  # type: ignore[no-untyped-def]
    compute = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(input.shape[:1] if reduction == 0 else (), dtype=compute)
    return loss, *_grads(input, linear_weight, *needs)


@register_fake("linear_cross_entropy_bwd", *_products_namespaces)
def _(grad, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, *needs):  # type: ignore[no-untyped-def]
    return _grads(input, linear_weight, *needs)
