"""rms_norm: checks, choice of backend, autograd, shapes for the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops._autograd import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad
from tinyllm.ops._fake import register_fake
from tinyllm.ops._norm import as_parameter, check, fake_parameter_grad, fake_statistics, limits
from tinyllm.ops.dispatch import choose, kernels


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
    shape = check(input, normalized_shape, weight)
    if input.device.type != "cpu" and autocast_dtype(input.device.type) is not None:
        input = input.float()  # what PyTorch's autocast does with rms_norm on accelerators
    name = choose("rms_norm", input, limits(input, shape, weight))
    if name == "reference":
        return reference.rms_norm(input, shape, weight, eps)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    if needs_grad(input, weight):
        return _RMSNorm.apply(input, shape, weight, eps, name)
    return kernels(name).rms_norm_fwd(input, shape, weight, eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float, name: str
    ) -> Tensor:
        normed, rstd = kernels(name).rms_norm_fwd(input, shape, weight, eps)
        ctx.save_for_backward(input, weight, rstd)
        ctx.shape, ctx.eps, ctx.name = shape, eps, name
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
        grad_input, grad_weight = kernels(ctx.name).rms_norm_bwd(grad, input, ctx.shape, weight, rstd, need_weight)
        return grad_input, None, as_parameter(grad_weight, weight, need_weight), None, None


@register_fake("rms_norm_fwd")
def _(input, shape, weight, eps):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), fake_statistics(input, shape)


@register_fake("rms_norm_bwd")
def _(grad, input, shape, weight, rstd, parameter_grads):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape), fake_parameter_grad(rstd, shape, parameter_grads)
