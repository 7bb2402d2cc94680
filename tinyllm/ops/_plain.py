"""What serves a call where no kernel does: PyTorch's own operator where it has one of this meaning, else the reference.

A forced reference stays the reference, and so does a call under a transform, which it can follow further.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tinyllm import reference
from tinyllm.ops._transforms import active_transform
from tinyllm.ops.dispatch import forced_backend


def _left_to_pytorch(operator: str, input: Tensor, *others: Tensor | None) -> bool:
    """Whether PyTorch's operator takes these tensors and may serve."""
    return (
        forced_backend(operator) is None
        and active_transform() is None
        and all(x is None or x.dtype == input.dtype for x in others)
    )


def layer_norm(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.layer_norm`."""
    function: Any = F.layer_norm if _left_to_pytorch("layer_norm", input, weight, bias) else reference.layer_norm
    return function(input, shape, weight, bias, eps)


def add_layer_norm(
    input: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm`."""
    if _left_to_pytorch("add_layer_norm", input, weight, bias):
        total = input + residual
        return F.layer_norm(total, shape, weight, bias, eps), total
    return reference.add_layer_norm(input, residual, shape, weight, bias, eps)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """`reference.scaled_dot_product_attention`. With a mask it is that: what a mask hides may hold NaN."""
    whole = query.numel() > 0 and key.numel() > 0 and query.dim() == 4
    flash = scale > 0.0 or not is_causal  # else PyTorch's kernel on CPUs gives NaN
    if attn_mask is None and whole and flash and _left_to_pytorch("attention", query):
        out: Tensor = F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    return reference.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
