"""What layer_norm, add_layer_norm and rms_norm share: checks, limits of the kernels, shapes for the compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllm.ops.backends import cuda
from tinyllm.ops.dispatch import no_kernel


def check(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[int, ...]:
    """normalized_shape as a tuple; TypeError or ValueError where the arguments do not fit each other."""
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


def limits(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None = None
) -> dict[str, str] | None:
    """Why a backend cannot serve these arguments."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype and tensor.dtype != torch.float32:
            return no_kernel(f"{name} is {tensor.dtype}; the kernel takes input's dtype, {input.dtype}, or float32")
    if cuda.may_serve(input):
        columns, most = math.prod(shape), cuda.most_columns(input)
        if columns > most:
            return {"cuda": f"normalized_shape has {columns} elements; the kernel takes at most {most} on this GPU"}
    return None


def as_parameter(grad: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """The kernels sum parameter gradients in float32 or float64; autograd wants the parameter's dtype."""
    if not needed or parameter is None:
        return None
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def fake_statistics(input: Tensor, shape: Sequence[int]) -> Tensor:
    """One number for each row, in the dtype of the accumulation."""
    compute = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(input.shape[: input.dim() - len(shape)], dtype=compute)


def fake_parameter_grad(statistic: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    """Of weight or bias, as the kernel returns it."""
    return statistic.new_empty(list(shape) if needed else [0])
