"""linear and feed_forward with their activation in one pass, against PyTorch's products and torch.compile of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .harness import (
    BYTES,
    EAGER,
    FLOPS,
    FORWARD,
    OURS,
    STEP,
    Case,
    Row,
    each_provider,
    passes,
    randn,
)
from .work import linear_bytes, linear_flops


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


def _row(
    operation: str,
    direction: str,
    rows: int,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    headline: bool = False,
) -> Row:
    """Layers between these widths, each weight scaled as a layer's is."""
    layers = list(itertools.pairwise(widths))

    def build() -> Case:
        inputs = [randn((rows, widths[0]), 0)]
        for seed, (before, after) in enumerate(layers):
            inputs += [randn((after, before), 2 * seed + 1) / before**0.5, randn((after,), 2 * seed + 2)]
        ours, torchs = OPERATIONS[operation]
        return passes({OURS: ours, EAGER: torchs}, direction, [x.to(dtype) for x in inputs])

    # One row does nothing but read the weight.
    count, unit = (linear_bytes, BYTES) if rows == 1 else (linear_flops, FLOPS)
    work = sum(count(direction, rows, *layer) for layer in layers)
    shape = f"{rows}x{'->'.join(map(str, widths))}"
    return Row("linear", operation, direction, shape, work, unit, build, dtype, headline=headline)


ROWS = [
    _row("linear + GELU", FORWARD, 1024, (768, 3072), headline=True),
    _row("linear", FORWARD, 1024, (768, 3072), torch.bfloat16),
    _row("linear", FORWARD, 768, (128, 512)),
    _row("linear", STEP, 768, (128, 512)),
    _row("linear", FORWARD, 1, (768, 3072)),
    _row("feed_forward (GELU)", FORWARD, 1024, (768, 3072, 768)),
    _row("feed_forward (GELU)", STEP, 1024, (768, 3072, 768)),
]


@pytest.fixture(autouse=True)
def _on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, even where the operator would leave the product to PyTorch on this machine."""
    monkeypatch.setenv("TINYLLM_LINEAR", "cpp")


@pytest.mark.parametrize(("row", "provider"), each_provider(ROWS))
def test_linear(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
