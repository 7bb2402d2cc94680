"""cross_entropy, and the projection and loss at the end of a language model in one, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm import ops

from .harness import (
    BYTES,
    COMPILED,
    EAGER,
    FLOPS,
    FORWARD,
    OURS,
    STEP,
    Case,
    Provider,
    Row,
    each_provider,
    randn,
)
from .work import cross_entropy_bytes, linear_cross_entropy_flops

CHUNKED = "torch, chunked"  # F.linear_cross_entropy of torch 2.13


def torch_linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def torch_chunked(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # A quarter of the rows at a time: smaller blocks save it more memory and cost it more time.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=input.size(0) // 4, chunking_method=None)
    return F.linear_cross_entropy(input, weight, target, options=options)


def build(
    functions: Mapping[str, Callable[..., Tensor]],
    direction: str,
    shapes: list[tuple[int, int]],
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """`function(*inputs, target)` of each provider: a mean, whose upstream gradient is 1, as in training.

    The last of `shapes` is scaled as a layer's weight is, if there are two."""
    functions = {**functions, COMPILED: torch.compile(functions[EAGER], dynamic=False)}
    inputs = [randn(shape, seed + i, device) for i, shape in enumerate(shapes)]
    if len(inputs) > 1:
        inputs[1] /= shapes[1][1] ** 0.5
    inputs = [x.to(dtype) for x in inputs]
    generator = torch.Generator(device).manual_seed(seed + 2)
    target = torch.randint(classes, shapes[0][:1], generator=generator, device=device)

    def bind(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().to(dtype).requires_grad_(direction == STEP) for x in inputs]
        if direction == FORWARD:
            return lambda: (function(*leaves, target),)
        return lambda: torch.autograd.grad(function(*leaves, target), leaves)

    providers = {name: Provider(bind(function, dtype)) for name, function in functions.items()}
    return Case(providers, lambda: bind(functions[EAGER], torch.float64)())


def _rows() -> list[Row]:
    rows = []
    for n, c in [(1024, 50257), (4096, 8192)]:
        for direction in (FORWARD, STEP):
            rows.append(
                Row(
                    "losses",
                    "cross_entropy",
                    direction,
                    f"{n}x{c}",
                    cross_entropy_bytes(direction, n, c),
                    BYTES,
                    lambda n=n, c=c, direction=direction: build(  # type: ignore[misc]
                        {OURS: ops.cross_entropy, EAGER: F.cross_entropy}, direction, [(n, c)], c
                    ),
                    headline=direction == STEP and n == 1024,
                )
            )
    functions: dict[str, Callable[..., Tensor]] = {OURS: ops.linear_cross_entropy, EAGER: torch_linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        functions[CHUNKED] = torch_chunked
    n, d, c = 1024, 768, 50257
    rows.append(
        Row(
            "losses",
            "linear_cross_entropy",
            STEP,
            f"{n}x{d}x{c}",
            linear_cross_entropy_flops(STEP, n, d, c),
            FLOPS,
            lambda: build(functions, STEP, [(n, d), (c, d)], c),
            providers=(*functions, COMPILED),
            headline=True,
        )
    )
    return rows


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_losses(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
