"""What each operator means, in plain PyTorch: the specification that kernels are tested against, and the path taken
where
no kernel serves. Signatures are those of `tinyllm.ops`; every function is differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last `len(normalized_shape)` dimensions."""
    # Statistics in float32 at least: a 16-bit sum over a row would lose most of its digits.
    compute = torch.promote_types(input.dtype, torch.float32)
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(compute)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normed = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        normed = normed * weight.to(compute)
    if bias is not None:
        normed = normed + bias.to(compute)
    return normed.to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`sum = input + residual`; returns (layer_norm(sum), sum)."""
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps), total


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T * scale + mask) value, with the whole (queries x keys) matrix in memory."""
    if enable_gqa:
        group = query.size(-3) // key.size(-3)
        key = key.repeat_interleave(group, -3)
        value = value.repeat_interleave(group, -3)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(compute) @ key.to(compute).transpose(-2, -1) * scale
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(compute)
        # A query that sees no key gets 0, where a softmax over nothing but -inf is NaN.
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    weights = torch.dropout(weights, dropout_p, dropout_p > 0.0)
    return (weights @ value.to(compute)).to(query.dtype)
