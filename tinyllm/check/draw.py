"""Random sizes, options and tensors of a call, and the call itself beside the same call in plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyllm import ops, reference

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        text: its shapes and options.
        ours, theirs: the call of `tinyllm.ops` and that of `tinyllm.reference`, as functions of `inputs`.
        inputs: floating tensors, of which gradients are taken, or None.
        depth: how many kernels work one after the other, each of which rounds.
        differentiable: whether the outputs have gradients, as all but those of an optimizer's step do.
    """

    text: str
    ours: Function
    theirs: Function
    inputs: Sequence[Tensor | None]
    depth: int = 1
    differentiable: bool = True


class Draw:
    """Draws sizes, options and tensors for a call."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str, backend: str) -> None:
        self.dtype, self.device, self.backend = dtype, device, backend
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.seed = seed

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int) -> int:
        """Draw a size from 1 to `most`: often tiny, often a multiple of 16, which fills whole vectors."""
        sixteens = 16 * self.random.randint(1, max(1, most // 16))
        found: int = self.one_of(
            1, 2, 3, self.random.randint(1, 9), sixteens, *self.random.choices(range(1, most + 1), k=3)
        )
        return min(found, most)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.laid_out(torch.randn(shape, generator=self.numbers, dtype=torch.float64).mul(scale).to(self.dtype))

    def perhaps(self, *shape: int) -> Tensor | None:
        return self.floats(*shape) if self.chance(0.6) else None

    def ints(self, below: int, *shape: int, dtypes: Sequence[torch.dtype] = (torch.int64,)) -> Tensor:
        return self.laid_out(torch.randint(below, shape, generator=self.numbers).to(self.one_of(*dtypes)))

    def laid_out(self, values: Tensor) -> Tensor:
        """Return the values in memory that ends with the last of them."""
        order = list(range(values.dim()))
        if self.chance(0.3):
            self.random.shuffle(order)
        strides, step = [0] * values.dim(), self.one_of(1, 1, 1, 1, 2, 3)
        for i in reversed(order):
            strides[i] = step
            step = step * max(1, values.size(i)) + self.one_of(0, 0, 0, 1, 5)
        offset = self.one_of(0, 0, 1, 2, 3)
        last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
        memory = torch.empty(offset + max(0, last + 1 if values.numel() else 0), dtype=values.dtype, device=self.device)
        memory.fill_(float("nan") if values.is_floating_point() else 1)
        return memory.as_strided(values.shape, strides, offset).copy_(values)


def both(function: str, text: str, inputs: Sequence[Tensor | None], call: Callable[..., Any], **options: Any) -> Case:
    """Return `call(module's function, *inputs)` of both modules."""
    return Case(
        text, partial(call, getattr(ops, function)), partial(call, getattr(reference, function)), inputs, **options
    )
