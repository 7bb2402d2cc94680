"""Search for what is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def not_finite(tensor: Tensor) -> float | None:
    """Return a value of a floating tensor that is nan or infinite, if there is one."""
    if tensor.numel() == 0:
        return None
    # Of nan, aminmax makes nan; unlike isfinite it needs no memory.
    ends: list[float] = torch.stack(torch.aminmax(tensor)).tolist()
    return next((value for value in ends if not math.isfinite(value)), None)
