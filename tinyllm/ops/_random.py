"""Counter-based dropout: the state, which every operator that drops draws here, and the factors that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyllm.ops.backends import triton
from tinyllm.ops.dispatch import kernels, register_fake

triton.define("random", "dropout_factors")


def draw_rng(device: torch.device) -> Tensor:
    """Return a new state, (seed, offset), int64 of shape (2,), from the device's default generator, so that
    `torch.manual_seed` makes a run repeat its dropout. Kernels make the bits from it as often as they need them."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def dropout_factors(backend: str, rng: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """Return what a backend's kernel with this state multiplies a (rows, columns) matrix by: 0 with probability
    dropout_p, else 1 / (1 - dropout_p). float32."""
    padded = (columns + 63) // 64 * 64
    factors: Tensor = kernels(backend).dropout_factors(rng, rows, padded, dropout_p)
    return factors[:, :columns]


@register_fake("dropout_factors")
def _(rng, rows, columns, p):  # type: ignore[no-untyped-def]
    return rng.new_empty(rows, columns, dtype=torch.float32)
