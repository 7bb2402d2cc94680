"""layer_norm and add_layer_norm: checks, choice of backend, autograd, shapes for the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops import _plain
from tinyllm.ops._autograd import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad
from tinyllm.ops._fake import register_fake
from tinyllm.ops._norm import as_parameter, check, fake_parameter_grad, fake_statistics, limits
from tinyllm.ops.dispatch import choose, kernels


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation (Ba et al. 2016), as `torch.nn.functional.layer_norm`.

    Args:
        input: (*, *normalized_shape), any floating dtype and strides.
        normalized_shape: sizes of the trailing dimensions to normalise over; an int for one.
        weight, bias: normalized_shape, or None; input's dtype or float32.
        eps: added to the variance.

    Returns:
        (*, *normalized_shape), input's dtype. Statistics are float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    shape = check(input, normalized_shape, weight, bias)
    if input.device.type != "cpu" and autocast_dtype(input.device.type) is not None:
        input = input.float()  # what PyTorch's autocast does with layer_norm on accelerators
    name = choose("layer_norm", input, limits(input, shape, weight, bias))
    if name == "reference":
        return _plain.layer_norm(input, shape, weight, bias, eps)
    if needs_grad(input, weight, bias):
        return _LayerNorm.apply(input, shape, weight, bias, eps, name)
    return kernels(name).layer_norm_fwd(input, shape, weight, bias, eps)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The residual addition and the layer normalisation behind it, in one pass over memory.

    Args:
        input, residual: (*, *normalized_shape), equal shapes and dtypes, any strides.
        normalized_shape, weight, bias, eps: as in `layer_norm`.

    Returns:
        (normed, sum): `layer_norm(sum)` and `sum = input + residual`, each of input's shape and dtype.

    Raises:
        TypeError: a dtype that is not floating, or input's and residual's differ.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    shape = check(input, normalized_shape, weight, bias, residual)
    if input.device.type != "cpu" and autocast_dtype(input.device.type) is not None:
        input, residual = input.float(), residual.float()
    name = choose("add_layer_norm", input, limits(input, shape, weight, bias))
    if name == "reference":
        return _plain.add_layer_norm(input, residual, shape, weight, bias, eps)
    if needs_grad(input, residual, weight, bias):
        return _AddLayerNorm.apply(input, residual, shape, weight, bias, eps, name)
    normed, total, _, _ = kernels(name).add_layer_norm_fwd(input, residual, shape, weight, bias, eps)
    return normed, total


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        name: str,
    ) -> Tensor:
        normed, mean, rstd = kernels(name).layer_norm_fwd(input, shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.shape, ctx.eps, ctx.name = shape, eps, name
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, weight, bias, mean, rstd = ctx.saved_tensors
        need_input, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda x, w, b: reference.layer_norm(x, ctx.shape, w, b, ctx.eps),
                (input, weight, bias),
                (need_input, need_weight, need_bias),
                (grad,),
            )
            return found[0], None, found[1], found[2], None, None
        grad_input, grad_weight, grad_bias = kernels(ctx.name).layer_norm_bwd(
            grad, input, ctx.shape, weight, mean, rstd, need_weight or need_bias
        )
        return (
            grad_input,
            None,
            as_parameter(grad_weight, weight, need_weight),
            as_parameter(grad_bias, bias, need_bias),
            None,
            None,
        )


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        normed, total, mean, rstd = kernels(name).add_layer_norm_fwd(input, residual, shape, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.shape, ctx.eps, ctx.name = shape, eps, name
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_normed, grad_sum = grads
        total, weight, bias, mean, rstd = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[3:5]
        if grad_normed is None:  # only the sum was used further
            return grad_sum, grad_sum, None, None, None, None, None
        if differs_from_kernels(grad_normed):
            found = grads_by_reference(
                lambda x, w, b: reference.layer_norm(x, ctx.shape, w, b, ctx.eps),
                (total, weight, bias),
                (True, need_weight, need_bias),
                (grad_normed,),
            )
            grad = found[0] if grad_sum is None or found[0] is None else found[0] + grad_sum
            return grad, grad, None, found[1], found[2], None, None
        grad, grad_weight, grad_bias = kernels(ctx.name).add_layer_norm_bwd(
            grad_normed, grad_sum, total, ctx.shape, weight, mean, rstd, need_weight or need_bias
        )
        return (
            grad,
            grad,
            None,
            as_parameter(grad_weight, weight, need_weight),
            as_parameter(grad_bias, bias, need_bias),
            None,
            None,
        )


@register_fake("layer_norm_fwd")
def _(input, shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), fake_statistics(input, shape), fake_statistics(input, shape)


@register_fake("add_layer_norm_fwd")
def _(input, residual, shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    outputs = input.new_empty(input.shape), input.new_empty(input.shape)
    return *outputs, fake_statistics(input, shape), fake_statistics(input, shape)


@register_fake("layer_norm_bwd")
def _(grad, input, shape, weight, mean, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), *(fake_parameter_grad(mean, shape, parameter_grads) for _ in range(2))


@register_fake("add_layer_norm_bwd")
def _(grad_normed, grad_sum, total, shape, weight, mean, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape), *(fake_parameter_grad(mean, shape, parameter_grads) for _ in range(2))
