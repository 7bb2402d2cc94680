"""gated_activation: declaration, checks, autograd, shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyllm import reference
from tinyllm._internal.checks import check_choice
from tinyllm.ops._context import differs_from_kernels, grads_by_reference, needs_grad, record
from tinyllm.ops.dispatch import FLOATS, NOT_DOUBLE, Kernels, Operator, choose, kernels, register_fake
from tinyllm.ops.linear import linear
from tinyllm.reference import ACTIVATIONS

GATED_ACTIVATION = Operator(
    "gated_activation", cpp=Kernels(FLOATS), cuda="Triton's kernel serves it", triton=Kernels(NOT_DOUBLE)
)


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Compute activation(gate) * up in one pass over memory: SwiGLU's and GeGLU's middle (Shazeer 2020).

    Args:
        gate, up: of one shape, floating dtype and device, any strides.
        activation: "silu", "gelu" (with erf), "gelu_tanh", "relu" or "none".

    Returns:
        Of gate's shape and dtype. Intermediate results are float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating, or gate's and up's differ.
        ValueError: shapes or devices that differ, or an unknown activation.
    """
    if not gate.dtype.is_floating_point:
        raise TypeError(f"gate has dtype {gate.dtype}; a floating dtype is needed")
    if up.dtype != gate.dtype:
        raise TypeError(f"up has dtype {up.dtype}; it must have gate's, {gate.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {list(up.shape)}; it must have gate's, {list(gate.shape)}")
    if up.device != gate.device:
        raise ValueError(f"up is on {up.device}; it must be on gate's device, {gate.device}")
    check_choice("activation", activation, tuple(ACTIVATIONS))
    backend = choose(GATED_ACTIVATION, gate)
    if backend == "reference":
        return reference.gated_activation(gate, up, activation)
    if needs_grad(gate, up):
        out: Tensor = record(_GatedActivation, gate, up, activation, backend)
        return out
    found: Tensor = kernels(backend).gated_activation_fwd(gate, up, activation)
    return found


def gated_feed_forward(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute down(activation(gate(input)) * up(input)) + residual, the feed-forward network of Llama's kind.

    Args:
        input: (*, D).
        gate_weight, up_weight: (hidden_dim, D), of input's dtype and device, as are all others.
        down_weight: (out_features, hidden_dim).
        gate_bias, up_bias, down_bias: of as many elements as their weights have rows, or None.
        activation: see `gated_activation`.
        residual: of the result's shape, added last; or None.

    Returns:
        (*, out_features) of input's dtype, or autocast's.

    Raises:
        TypeError, ValueError: as `linear` and `gated_activation`.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    gate, up = linear(input, gate_weight, gate_bias), linear(input, up_weight, up_bias)
    return linear(gated_activation(gate, up, activation), down_weight, down_bias, residual=residual)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        out: Tensor = kernels(backend).gated_activation_fwd(gate, up, activation)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        if differs_from_kernels(grad):
            found = grads_by_reference(
                lambda g, u: reference.gated_activation(g, u, ctx.activation),
                (gate, up),
                ctx.needs_input_grad[:2],
                (grad,),
            )
            return *found, None, None
        return *kernels(ctx.backend).gated_activation_bwd(grad, gate, up, ctx.activation), None, None


@register_fake("gated_activation_fwd")
def _(gate, up, activation):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@register_fake("gated_activation_bwd")
def _(grad, gate, up, activation):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
