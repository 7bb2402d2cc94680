"""layer_norm, rms_norm and both after a sum: declarations, checks, autograd, shapes for the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import reference
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.backends import cuda
from tinyllm.ops.dispatch import (
    FLOATS,
    NOT_DOUBLE,
    Kernels,
    Limit,
    Operator,
    choose,
    kernels,
    left_to_pytorch,
    register_fake,
)


def _refuses(
    input: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; the kernel takes input's dtype, {input.dtype}, or float32"
    return None


def _too_wide(input: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> str | None:
    columns = math.prod(shape)
    return f"normalized_shape has {columns} elements" if columns > cuda.most_columns(input) else None


def _declare(name: str) -> Operator:
    return Operator(
        name,
        cpp=Kernels(FLOATS),
        cuda=Kernels(NOT_DOUBLE, (Limit("rows up to 16,384 wide (131,072 on 9.0 and later)", _too_wide),)),
        triton=Kernels(FLOATS, source="layer_norm"),
        refuses=_refuses,
    )


LAYER_NORM, ADD_LAYER_NORM, RMS_NORM = map(_declare, ("layer_norm", "add_layer_norm", "rms_norm"))
ADD_RMS_NORM = Operator(
    "add_rms_norm",
    cpp=Kernels(FLOATS),
    cuda="Triton's kernel serves it",
    triton=Kernels(FLOATS),
    refuses=_refuses,
)


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
    shape = _check(input, normalized_shape, weight, bias)
    if not input.is_cpu and autocast_dtype(input) is not None:
        input = input.float()  # what PyTorch's autocast does with layer_norm on accelerators
    backend = choose(LAYER_NORM, input, shape, weight, bias)
    if backend == "reference":
        plain: Any = F.layer_norm if left_to_pytorch(LAYER_NORM, input, weight, bias) else reference.layer_norm
        return plain(input, shape, weight, bias, eps)
    if needs_grad(input, weight, bias):
        return record(_LayerNorm, input, shape, weight, bias, eps, backend)
    return kernels(backend).layer_norm_fwd(input, shape, weight, bias, eps)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute a residual addition and the layer normalisation after it, in one pass over memory.

    Args:
        input, residual: (*, *normalized_shape), equal shapes and dtypes, any strides.
        normalized_shape, weight, bias, eps: as in `layer_norm`.

    Returns:
        (normed, sum): `layer_norm(sum)` and `sum = input + residual`, each of input's shape and dtype.

    Raises:
        TypeError: a dtype that is not floating, or input's and residual's differ.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    shape = _check(input, normalized_shape, weight, bias, residual)
    if not input.is_cpu and autocast_dtype(input) is not None:
        input, residual = input.float(), residual.float()
    backend = choose(ADD_LAYER_NORM, input, shape, weight, bias)
    if backend == "reference":
        if not left_to_pytorch(ADD_LAYER_NORM, input, weight, bias):
            return reference.add_layer_norm(input, residual, shape, weight, bias, eps)
        total = input + residual
        return F.layer_norm(total, shape, weight, bias, eps), total
    if needs_grad(input, residual, weight, bias):
        return record(_AddLayerNorm, input, residual, shape, weight, bias, eps, backend)
    normed, total, _, _ = kernels(backend).add_layer_norm_fwd(input, residual, shape, weight, bias, eps)
    return normed, total


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019), as `torch.nn.functional.rms_norm`.

        input / sqrt(mean(input^2) + eps) * weight

    Args:
        input: (*, *normalized_shape), any floating dtype and strides.
        normalized_shape: sizes of the trailing dimensions to normalise over; an int for one.
        weight: normalized_shape, or None; input's dtype or float32.
        eps: added to the mean of the squares. None: that of the dtype computed in, torch.finfo(torch.float32).eps, or
            float64's for float64, as PyTorch does.

    Returns:
        (*, *normalized_shape), input's dtype. The mean is float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    shape = _check(input, normalized_shape, weight)
    if not input.is_cpu and autocast_dtype(input) is not None:
        input = input.float()  # what PyTorch's autocast does with rms_norm on accelerators
    backend = choose(RMS_NORM, input, shape, weight)
    if backend == "reference":
        return reference.rms_norm(input, shape, weight, eps)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if needs_grad(input, weight):
        return record(_RMSNorm, input, shape, weight, eps, backend)
    return kernels(backend).rms_norm_fwd(input, shape, weight, eps)[0]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a residual addition and the root mean square normalisation after it, in one pass over memory.

    Args:
        input, residual: (*, *normalized_shape), equal shapes and dtypes, any strides.
        normalized_shape, weight, eps: as in `rms_norm`.

    Returns:
        (normed, sum): `rms_norm(sum)` and `sum = input + residual`, each of input's shape and dtype.

    Raises:
        TypeError: a dtype that is not floating, or input's and residual's differ.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    shape = _check(input, normalized_shape, weight, residual=residual)
    if not input.is_cpu and autocast_dtype(input) is not None:
        input, residual = input.float(), residual.float()
    backend = choose(ADD_RMS_NORM, input, shape, weight)
    if backend == "reference":
        return reference.add_rms_norm(input, residual, shape, weight, eps)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if needs_grad(input, residual, weight):
        both: tuple[Tensor, Tensor] = record(_AddRMSNorm, input, residual, shape, weight, eps, backend)
        return both
    normed, total, _ = kernels(backend).add_rms_norm_fwd(input, residual, shape, weight, eps)
    return normed, total


def _check(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[int, ...]:
    """Return normalized_shape as a tuple; raise TypeError or ValueError where the arguments do not fit each other."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not input.dtype.is_floating_point:
        raise TypeError(f"input has dtype {input.dtype}; a floating dtype is needed")
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape is {list(shape)}; the last dimensions of input, {list(input.shape)}, must equal it"
        )
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(f"residual has shape {list(residual.shape)}; it must have input's, {list(input.shape)}")
        if residual.dtype != input.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}; it must have input's, {input.dtype}")
        if residual.device != input.device:
            raise ValueError(f"residual is on {residual.device}; it must be on input's device, {input.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be normalized_shape, {list(shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; a floating dtype is needed")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on input's device, {input.device}")
    return shape


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> Tensor:
        normed, mean, rstd = kernels(backend).layer_norm_fwd(input, shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.shape, ctx.eps, ctx.backend = shape, eps, backend
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
        grad_input, grad_weight, grad_bias = kernels(ctx.backend).layer_norm_bwd(
            grad, input, ctx.shape, weight, mean, rstd, need_weight or need_bias
        )
        return (
            grad_input,
            None,
            _as_parameter(grad_weight, weight, need_weight),
            _as_parameter(grad_bias, bias, need_bias),
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
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        normed, total, mean, rstd = kernels(backend).add_layer_norm_fwd(input, residual, shape, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.shape, ctx.eps, ctx.backend = shape, eps, backend
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
            grad, *parameters = _through_sum(
                lambda x, w, b: reference.layer_norm(x, ctx.shape, w, b, ctx.eps),
                (total, weight, bias),
                (True, need_weight, need_bias),
                grads,
            )
            return grad, grad, None, *parameters, None, None
        grad, grad_weight, grad_bias = kernels(ctx.backend).add_layer_norm_bwd(
            grad_normed, grad_sum, total, ctx.shape, weight, mean, rstd, need_weight or need_bias
        )
        return (
            grad,
            grad,
            None,
            _as_parameter(grad_weight, weight, need_weight),
            _as_parameter(grad_bias, bias, need_bias),
            None,
            None,
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float, backend: str
    ) -> Tensor:
        normed, rstd = kernels(backend).rms_norm_fwd(input, shape, weight, eps)
        ctx.save_for_backward(input, weight, rstd)
        ctx.shape, ctx.eps, ctx.backend = shape, eps, backend
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, weight, rstd = ctx.saved_tensors
        need_input, _, need_weight = ctx.needs_input_grad[:3]
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda x, w: reference.rms_norm(x, ctx.shape, w, ctx.eps),
                (input, weight),
                (need_input, need_weight),
                (grad,),
            )
            return found[0], None, found[1], None, None
        grad_input, grad_weight = kernels(ctx.backend).rms_norm_bwd(grad, input, ctx.shape, weight, rstd, need_weight)
        return grad_input, None, _as_parameter(grad_weight, weight, need_weight), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        normed, total, rstd = kernels(backend).add_rms_norm_fwd(input, residual, shape, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.shape, ctx.eps, ctx.backend = shape, eps, backend
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_normed, grad_sum = grads
        total, weight, rstd = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[3]
        if grad_normed is None:  # only the sum was used further
            return grad_sum, grad_sum, None, None, None, None
        if differs_from_kernels(grad_normed):
            grad, grad_weight = _through_sum(
                lambda x, w: reference.rms_norm(x, ctx.shape, w, ctx.eps), (total, weight), (True, need_weight), grads
            )
            return grad, grad, None, grad_weight, None, None
        grad, grad_weight = kernels(ctx.backend).add_rms_norm_bwd(
            grad_normed, grad_sum, total, ctx.shape, weight, rstd, need_weight
        )
        return grad, grad, None, _as_parameter(grad_weight, weight, need_weight), None, None


def _through_sum(
    norm: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of a norm's inputs by the reference; `grads` are those of its output and of the sum before
    it, which is the first input."""
    grad_normed, grad_sum = grads
    first, *parameters = grads_by_reference(norm, inputs, wanted, (grad_normed,))
    return [first if grad_sum is None or first is None else first + grad_sum, *parameters]


def _as_parameter(grad: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """Return a gradient, which kernels sum in float32 or float64, in its parameter's dtype, as autograd wants it."""
    if not needed or parameter is None:
        return None
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def _fake_statistics(input: Tensor, shape: Sequence[int]) -> Tensor:
    """Return one number for each row, in the dtype of the accumulation."""
    compute = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(input.shape[: input.dim() - len(shape)], dtype=compute)


def _fake_parameter_grad(statistic: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    """Return the gradient of weight or bias, as the kernel does."""
    return statistic.new_empty(list(shape) if needed else [0])


@register_fake("layer_norm_fwd")
def _(input, shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), _fake_statistics(input, shape), _fake_statistics(input, shape)


@register_fake("add_layer_norm_fwd")
def _(input, residual, shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    outputs = input.new_empty(input.shape), input.new_empty(input.shape)
    return *outputs, _fake_statistics(input, shape), _fake_statistics(input, shape)


@register_fake("layer_norm_bwd")
def _(grad, input, shape, weight, mean, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), *(_fake_parameter_grad(mean, shape, parameter_grads) for _ in range(2))


@register_fake("add_layer_norm_bwd")
def _(grad_normed, grad_sum, total, shape, weight, mean, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape), *(_fake_parameter_grad(mean, shape, parameter_grads) for _ in range(2))


@register_fake("rms_norm_fwd")
def _(input, shape, weight, eps):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), _fake_statistics(input, shape)


@register_fake("rms_norm_bwd")
def _(grad, input, shape, weight, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), _fake_parameter_grad(rstd, shape, parameter_grads)


@register_fake("add_rms_norm_fwd")
def _(input, residual, shape, weight, eps):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), input.new_empty(input.shape), _fake_statistics(input, shape)


@register_fake("add_rms_norm_bwd")
def _(grad_normed, grad_sum, total, shape, weight, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape), _fake_parameter_grad(rstd, shape, parameter_grads)
