"""The activations of feed-forward networks and their derivatives, of a float32 tensor, inside other kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid_gate(x, ACTIVATION: tl.constexpr):
    """Return sigmoid(2 u), which multiplies x in gelu's approximation, or sigmoid(x), which does in silu."""
    if ACTIVATION == "gelu_tanh":
        x = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Return the activation of that name; "none" changes nothing."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "silu":
        x = x * sigmoid_gate(x, ACTIVATION)
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """Return the activation's derivative."""
    slope = x * 0.0 + 1.0
    if ACTIVATION == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        slope = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate = sigmoid_gate(x, ACTIVATION)
        slope = gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "silu":
        gate = sigmoid_gate(x, ACTIVATION)
        slope = gate + x * gate * (1.0 - gate)
    return slope
