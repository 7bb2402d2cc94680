"""rotary_embedding on NVIDIA GPUs (Su et al. 2021). A program rotates some heads of a token, in registers: each element
is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch_options, next_power_of_2

TILE = 2048  # elements of a program, of half a head's columns


@triton.jit
def rotary_kernel(
    x,  # (B, H, T, D)
    out,  # (B, H, T, D), in the order (B, T, H, D)
    cos,  # (B or 1, T, 2 * half)
    sin,
    heads,
    tokens,
    half,
    head_dim,
    x_batch,
    x_head,
    x_token,
    x_column,
    angle_batch,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)
    from_head = x + b * x_batch + t * x_token + head * x_head
    to_head = out + (token * heads + head) * head_dim
    column = tl.arange(0, HALF)[None, :]
    inside, both = column < half, (head < heads) & (column < half)
    angle = b * angle_batch + t * 2 * half + column
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:  # the transposed matrix
        sin_first, sin_second = -sin_second, -sin_first
    first = tl.load(from_head + column * x_column, mask=both, other=0.0).to(tl.float32)
    second = tl.load(from_head + (column + half) * x_column, mask=both, other=0.0).to(tl.float32)
    element = out.dtype.element_ty
    tl.store(to_head + column, (first * cos_first - second * sin_first).to(element), mask=both)
    tl.store(to_head + column + half, (second * cos_second + first * sin_second).to(element), mask=both)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        there = (head < heads) & (rest < head_dim)
        tl.store(to_head + rest, tl.load(from_head + rest * x_column, mask=there, other=0.0), mask=there)


def rotary_embedding_fwd(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(query, cos, sin, False), _rotate(key, cos, sin, False)


def rotary_embedding_bwd(grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(grad_query, cos, sin, True), _rotate(grad_key, cos, sin, True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        cos, sin, rotated = cos.contiguous(), sin.contiguous(), cos.size(2)
        half = max(1, next_power_of_2(rotated // 2))
        programs_heads = max(1, min(next_power_of_2(heads), TILE // half))
        rotary_kernel[(batch * tokens, cdiv(heads, programs_heads))](
            x, out, cos, sin, heads, tokens, rotated // 2, head_dim, *x.stride(),
            0 if cos.size(0) == 1 else tokens * rotated,
            HEADS=programs_heads, HALF=half, REST=next_power_of_2(head_dim - rotated) if head_dim > rotated else 0,
            INVERSE=inverse, **launch_options(4),
        )  # fmt: skip
    return out.transpose(1, 2)
