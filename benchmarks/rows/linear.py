"""linear and feed_forward with their activation in one pass, against PyTorch's products and torch.compile of them.

There are no such rows on a GPU, where the products are PyTorch's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from ..row import BYTES, FLOPS, FORWARD, STEP, Case, Row, Target, passes
from ..work import linear_bytes, linear_flops


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, activation="gelu")


def torch_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def feed_forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return ops.feed_forward(x, weight1, bias1, weight2, bias2, activation="gelu")


def torch_feed_forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(torch_linear_gelu(x, weight1, bias1), weight2, bias2)


# What is computed, by us and by PyTorch.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (ops.linear, F.linear),
    "linear + GELU": (linear_gelu, torch_linear_gelu),
    "feed_forward (GELU)": (feed_forward, torch_feed_forward),
}


def _build(
    target: Target, operation: str, direction: str, rows: int, widths: Sequence[int], dtype: torch.dtype
) -> Case:
    """Return layers between these widths, each weight scaled as a layer's is."""
    inputs = [target.randn(rows, widths[0], dtype=dtype)]
    for before, after in itertools.pairwise(widths):
        inputs += [(target.randn(after, before) / before**0.5).to(dtype), target.randn(after, dtype=dtype)]
    return passes(target.sides(*OPERATIONS[operation]), direction, inputs)


def _row(
    target: Target,
    operation: str,
    direction: str,
    rows: int,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    headline: bool = False,
) -> Row:
    # One row does nothing but read the weight.
    count, unit = (linear_bytes, BYTES) if rows == 1 else (linear_flops, FLOPS)
    return target.row(
        section="linear",
        operation=operation,
        direction=direction,
        shape=f"{rows}x{'->'.join(map(str, widths))}",
        work=sum(count(direction, rows, *layer) for layer in itertools.pairwise(widths)),
        unit=unit,
        build=partial(_build, target, operation, direction, rows, widths, dtype),
        dtype=dtype,
        headline=headline,
    )


def rows(target: Target) -> list[Row]:
    if target.gpu:
        return []
    return [
        _row(target, "linear + GELU", FORWARD, 1024, (768, 3072), headline=True),
        _row(target, "linear", FORWARD, 1024, (768, 3072), torch.bfloat16),
        _row(target, "linear", FORWARD, 768, (128, 512)),
        _row(target, "linear", STEP, 768, (128, 512)),
        _row(target, "linear", FORWARD, 1, (768, 3072)),
        _row(target, "feed_forward (GELU)", FORWARD, 1024, (768, 3072, 768)),
        _row(target, "feed_forward (GELU)", STEP, 1024, (768, 3072, 768)),
    ]
