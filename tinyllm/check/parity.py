"""The rule by which a kernel counts as right: its error against float64 is at most twice that of PyTorch's own operator
in the same precision, plus a rounding step of its result and of its saved statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def error_and_allowed(ours: Tensor, torchs: Tensor, exact: Tensor, steps: int = 2) -> tuple[float, float]:
    """Return the largest error of `ours`, and the largest that the rule allows; the first is NaN where `ours` is.

    Args:
        ours: what a kernel computed.
        torchs: the same, computed by PyTorch in the same dtype.
        exact: the same, computed by PyTorch in float64.
        steps: rounding steps at the largest magnitude, because every element is a sum of terms of that size. Two: one
            for the result and one for what is saved between forward and backward (log-sum-exp, mean, rstd).
    """
    if exact.numel() == 0:
        return 0.0, 0.0
    # float64 has no reference one precision up: there the reference's own roundings count too, and those of terms about
    # 1 that cancel in a gradient of 0.
    steps, least = (4 * steps, 1.0) if ours.dtype == torch.float64 else (steps, 1e-3)
    floor = steps * torch.finfo(ours.dtype).eps * max(exact.abs().max().item(), least)
    error = (ours.double() - exact).abs().max().item()
    return error, 2 * (torchs.double() - exact).abs().max().item() + floor
