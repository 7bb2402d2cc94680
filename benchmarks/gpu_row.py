"""What a row on a GPU is, beside what every row is, and where its numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import harness
from .harness import Row

DEVICE, WALL = "device", "wall"  # which clock

Function = Callable[..., Any]
Cut = Callable[[int, int], int]  # (size, the most for a trial on a processor) -> size


@dataclass(frozen=True)
class GpuRow(Row):
    """A row on a GPU.

    Attributes:
        operators: those that our Triton kernels must serve, or the row fails.
        clock: DEVICE or WALL.
        shows_memory: whether the memory that a call takes is of interest.
    """

    operators: tuple[str, ...] = ()
    clock: str = DEVICE
    shows_memory: bool = False

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "clock": self.clock, "shows_memory": self.shows_memory}


class Source:
    """New random numbers at every call, on a device."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self._seeds = itertools.count(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return harness.randn(shape, next(self._seeds), self.device).to(dtype)

    def randint(self, most: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed())
        return torch.randint(most, shape, generator=generator, device=self.device)

    def seed(self) -> int:
        return next(self._seeds)
