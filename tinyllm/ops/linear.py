"""linear and feed_forward: declarations, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm.ops import _products
from tinyllm.ops._context import autocast_dtype, differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.dispatch import FLOATS, Kernels, Operator, choose, forced_backend, register_fake
from tinyllm.reference import ACTIVATIONS


def products_refuse(operator: str, input: Tensor, rows: int | None = None) -> str | None:
    """Return why the compiled products do not serve an input, or so many rows of its dtype: the one place where
    PyTorch's or ours are chosen."""
    setting = _products.setting()
    if setting == "cpp":
        return None
    if setting == "torch":
        return "TINYLLM_LINEAR=torch"
    if forced_backend(operator) == "cpp":
        return None
    rows_class = _products.rows_class(input.numel() // max(1, input.size(-1)) if rows is None else rows)
    if operator == "linear_cross_entropy" and _products.CLASSES[rows_class] != "many":
        return None  # the time goes into writing the weight's gradient, which our kernels do in one pass
    return _products.by_torch(input.dtype, rows_class)


def _declare(name: str) -> Operator:
    cublas = "PyTorch's products (cuBLAS) serve it"
    return Operator(name, cpp=Kernels(FLOATS), cuda=cublas, triton=cublas, refuses=partial(products_refuse, name))


LINEAR, FEED_FORWARD = map(_declare, ("linear", "feed_forward"))


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute activation(input weight^T + bias) + residual in one pass: `torch.nn.functional.linear`, and more.

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), of input's dtype and device, as are all others. The view `w.t()` of a
            contiguous (in_features, out_features) is as fast, and w's gradient is contiguous.
        bias: (out_features), or None.
        activation: "none", "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        residual: of the result's shape, added last; or None.

    Returns:
        (*, out_features) of input's dtype, or autocast's. Sums are accumulated in float32 (float64 for float64). Where
        our kernels serve, a row of the result does not depend on the others, but on whether there are more than 8 (of
        a weight that is not float32 and not such a view: more than 4): so few are multiplied as dot products, which
        sum in another order. PyTorch's libraries promise nothing of the kind.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: shapes that do not fit, tensors on different devices, an unknown activation.
    """
    low = autocast_dtype(input)
    input, residual = _cast(low, input, residual)
    _check_input(input, activation)
    _check_layer(input, input.size(-1), "weight", weight, "bias", bias, low)
    _check_tensor(input, "residual", residual, (*input.shape[:-1], weight.size(0)), low)
    if choose(LINEAR, input) == "reference":
        # With the weights as they are: PyTorch's autocast casts a parameter once for all calls within it.
        return reference.linear(input, weight, bias, activation=activation, residual=residual)
    weight, bias = _cast(low, weight, bias)
    if needs_grad(input, weight, bias, residual):
        return record(_Linear, input, weight, bias, residual, activation)
    return torch.ops.tinyllm.linear_fwd(input, weight, bias, residual, activation, False)[0]


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute activation(input weight1^T + bias1) weight2^T + bias2 + residual: a transformer's two-layer network.

    Args:
        input: (*, D).
        weight1: (hidden_dim, D), of input's dtype and device, as are all others.
        bias1: (hidden_dim), or None.
        weight2: (out_features, hidden_dim).
        bias2: (out_features), or None.
        activation: "none", "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        residual: of the result's shape, added last; or None.

    Returns:
        (*, out_features) of input's dtype, or autocast's.

    Raises:
        TypeError, ValueError: as `linear`.
    """
    low = autocast_dtype(input)
    input, residual = _cast(low, input, residual)
    _check_input(input, activation)
    _check_layer(input, input.size(-1), "weight1", weight1, "bias1", bias1, low)
    _check_layer(input, weight1.size(0), "weight2", weight2, "bias2", bias2, low)
    _check_tensor(input, "residual", residual, (*input.shape[:-1], weight2.size(0)), low)
    if choose(FEED_FORWARD, input) == "reference":  # as in `linear`
        return reference.feed_forward(input, weight1, bias1, weight2, bias2, activation=activation, residual=residual)
    weight1, bias1, weight2, bias2 = _cast(low, weight1, bias1, weight2, bias2)
    if needs_grad(input, weight1, bias1, weight2, bias2, residual):
        return record(_FeedForward, input, weight1, bias1, weight2, bias2, residual, activation)
    return torch.ops.tinyllm.feed_forward_fwd(input, weight1, bias1, weight2, bias2, residual, activation, False)[0]


def _cast(low: torch.dtype | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors as an enclosing torch.autocast to `low` wants them for a product."""
    if low is None:
        return tensors
    return tuple(x if x is None else x.to(_dtype_under(low, x.dtype)) for x in tensors)


def _dtype_under(low: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """Return what an enclosing torch.autocast to `low` makes of a dtype; it leaves float64 alone."""
    return dtype if low is None or not dtype.is_floating_point or dtype == torch.float64 else low


def _check_input(input: Tensor, activation: str) -> None:
    if not input.dtype.is_floating_point:
        raise TypeError(f"input has dtype {input.dtype}; a floating dtype is needed")
    if input.dim() == 0:
        raise ValueError("input has no dimensions; (*, in_features) is needed")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; one of {', '.join(ACTIVATIONS)} is needed")


def _check_layer(
    input: Tensor,
    in_features: int,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    low: torch.dtype | None,
) -> None:
    if weight.dim() != 2 or weight.size(1) != in_features:
        raise ValueError(f"{weight_name} has shape {list(weight.shape)}; (out_features, {in_features}) is needed")
    _check_tensor(input, weight_name, weight, weight.shape, low)
    _check_tensor(input, bias_name, bias, weight.shape[:1], low)


def _check_tensor(
    input: Tensor, name: str, tensor: Tensor | None, shape: tuple[int, ...], low: torch.dtype | None
) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {list(shape)} is needed")
    if _dtype_under(low, tensor.dtype) != input.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must have input's, {input.dtype}")
    if tensor.device != input.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on input's device, {input.device}")


# ---- Autograd


def _gate_from(activation: str, residual: Tensor | None) -> str:
    """Return what backward multiplies the gradient by: "", nothing; "out", what the sign of the result says; "slope",
    the activation's derivative, which forward computes by the way."""
    if activation == "none":
        return ""
    return "out" if activation == "relu" and residual is None else "slope"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
    ) -> Tensor:
        gate = _gate_from(activation, residual)
        out, slope = torch.ops.tinyllm.linear_fwd(input, weight, bias, residual, activation, gate == "slope")
        ctx.save_for_backward(input, weight, bias, residual, {"": None, "out": out, "slope": slope}[gate])
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, weight, bias, residual, gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda x, w, b, r: reference.linear(x, w, b, activation=ctx.activation, residual=r),
                (input, weight, bias, residual),
                wanted[:4],
                (grad,),
            )
            return *found, None
        found = torch.ops.tinyllm.linear_bwd(grad, input, weight, gate, ctx.activation, wanted[0], wanted[1], wanted[2])
        return *_where(wanted[:3], found), grad if wanted[3] else None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        needs_slope = _gate_from(activation, None) == "slope"
        out, hidden, slope = torch.ops.tinyllm.feed_forward_fwd(
            input, weight1, bias1, weight2, bias2, residual, activation, needs_slope
        )
        ctx.save_for_backward(input, weight1, bias1, weight2, bias2, residual, hidden, slope if needs_slope else hidden)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        input, weight1, bias1, weight2, bias2, residual, hidden, gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda x, w1, b1, w2, b2, r: reference.feed_forward(
                    x, w1, b1, w2, b2, activation=ctx.activation, residual=r
                ),
                (input, weight1, bias1, weight2, bias2, residual),
                wanted[:6],
                (grad,),
            )
            return *found, None
        found = torch.ops.tinyllm.feed_forward_bwd(
            grad,
            input,
            weight1,
            weight2,
            hidden,
            gate,
            ctx.activation,
            wanted[0],
            wanted[1] or wanted[3],
            wanted[2],
            wanted[4],
        )
        return *_where(wanted[:5], found), grad if wanted[5] else None, None


def _where(wanted: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [grad if want else None for want, grad in zip(wanted, grads, strict=True)]


def _if(wanted: bool, like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape if wanted else (0,))


def _weight_grad_if(wanted: bool, weight: Tensor) -> Tensor:
    """Return the gradient of a weight, which lies as the weight does where that is contiguous in either order."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return weight.new_empty(weight.size(1), weight.size(0)).t() if wanted else weight.new_empty(0)
    return _if(wanted, weight, *weight.shape)


@register_fake("linear_fwd")
def _(input, weight, bias, residual, activation, slope):  # type: ignore[no-untyped-def]
    shape = (*input.shape[:-1], weight.size(0))
    return input.new_empty(shape), _if(slope, input, *shape)


@register_fake("linear_bwd")
def _(grad, input, weight, gate, activation, input_grad, weight_grad, bias_grad):  # type: ignore[no-untyped-def]
    return (
        _if(input_grad, input, *input.shape),
        _weight_grad_if(weight_grad, weight),
        _if(bias_grad, weight, weight.size(0)),
    )


@register_fake("feed_forward_fwd")
def _(input, weight1, bias1, weight2, bias2, residual, activation, slope):  # type: ignore[no-untyped-def]
    rows, width = input.shape[:-1], weight1.size(0)
    return (
        input.new_empty((*rows, weight2.size(0))),
        input.new_empty((*rows, width)),
        _if(slope, input, *rows, width),
    )


@register_fake("feed_forward_bwd")
def _(  # type: ignore[no-untyped-def]
    grad, input, weight1, weight2, hidden, gate, activation, input_grad, weight_grads, bias1_grad, bias2_grad
):
    return (
        _if(input_grad, input, *input.shape),
        _weight_grad_if(weight_grads, weight1),
        _if(bias1_grad, weight1, weight1.size(0)),
        _weight_grad_if(weight_grads, weight2),
        _if(bias2_grad, weight2, weight2.size(0)),
    )
