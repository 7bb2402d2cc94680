"""add_rms_norm on NVIDIA GPUs, by the kernels of layer_norm.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .layer_norm import backward, forward


def add_rms_norm_fwd(
    input: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, _, rstd = forward(input, residual, normalized_shape, weight, None, eps, centered=False)
    assert total is not None
    return normed, total, rstd


def add_rms_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    rstd: Tensor,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = backward(
        grad_normed, grad_sum, sum, normalized_shape, weight, None, rstd, parameter_grads
    )
    return grad_input, grad_weight
