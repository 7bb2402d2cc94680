"""Weights of linear layers in 16, 8 or 4 bits: what they mean, in plain PyTorch.

A weight (out_features, in_features) of kind

    bf16    is rounded to bfloat16;
    int8    consists of groups along in_features with a scale each: w = scale * q, q in -128 .. 127;
    int4    likewise with q in -8 .. 7.

Quantised rows are padded with zeros to blocks of 64 columns. int8 stores q + 128 in a byte, (out_features, padded).
int4 stores q + 8 in half a byte, (out_features, padded / 2): byte j of the 32 of a block has q of column j in its lower
half and that of column j + 32 in its upper half. Scales are bfloat16, (out_features, padded / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
BITS = {"int8": 8, "int4": 4}


def padded_columns(in_features: int) -> int:
    """Return the number of columns of a quantised weight, the padding included."""
    return -(-in_features // BLOCK) * BLOCK


def quantize_weight(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return a weight in 8 or 4 bits and its scales, as described above.

    Each scale is the best of some for the squared error of its group: scales that spread the largest weight over the
    range or clip it, each also improved once by least squares for the numbers that it rounds to.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    groups = F.pad(weight.float(), (0, padded_columns(columns) - columns)).view(rows, -1, group_size)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for end in (low, high):
        for step in range(3 if bits == 8 else 12):
            scale = largest / end * (1 - 0.03 * step)
            for _ in range(2):
                stored = scale.bfloat16().float()
                q = _rounded(groups, stored, low, high)
                error = (groups - q * stored).square().sum(-1, keepdim=True)
                better = ((error < least) | (best == 0)) & (stored != 0)  # also where all errors overflow
                best, least = torch.where(better, stored, best), torch.where(better, error, least)
                scale = ((groups * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)).nan_to_num(
                    0.0, 0.0, 0.0
                )
    q = (_rounded(groups, best, low, high) - low).view(rows, -1).to(torch.uint8)
    if bits == 4:
        half = q.view(rows, -1, 2, BLOCK // 2)
        q = (half[:, :, 0] | half[:, :, 1] << 4).reshape(rows, -1)
    return q, best.squeeze(-1).bfloat16()


def _rounded(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (groups * inverse).round().clamp(low, high)


def dequantize_weight(data: Tensor, scales: Tensor | None, in_features: int) -> Tensor:
    """Return the weight that is meant: float32 (out_features, in_features)."""
    if scales is None:
        return data.float()
    rows, q = data.size(0), data
    if data.size(1) != padded_columns(in_features):  # int4
        half = q.view(rows, -1, BLOCK // 2)
        q = torch.stack([half & 15, half >> 4], dim=2).view(rows, -1)
        zero = 8
    else:
        zero = 128
    groups = q.view(rows, scales.size(1), -1).float() - zero
    return (groups * scales.float().unsqueeze(-1)).view(rows, -1)[:, :in_features]
