"""The state of counter-based dropout: where every operator that drops draws it, and the factors that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllm.ops._fake import register_fake
from tinyllm.ops.dispatch import kernels


def draw_rng(device: torch.device) -> Tensor:
    """A new state, (seed, offset), int64 of shape (2,), from the device's default generator, so that
    `torch.manual_seed` makes a run repeat its dropout. Kernels make the bits from it as often as they need them."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def dropout_factors(name: str, rng: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """What a kernel of backend `name` with this state multiplies a (rows, columns) matrix by: 0 with probability
    dropout_p, else 1 / (1 - dropout_p). float32."""
    padded = (columns + 63) // 64 * 64
    factors: Tensor = kernels(name).dropout_factors(rng, rows, padded, dropout_p)
    return factors[:, :columns]


@register_fake("dropout_factors")
def _(rng, rows, columns, p):  # type: ignore[no-untyped-def]
    return rng.new_empty(rows, columns, dtype=torch.float32)
