"""What a row on a GPU is, beside what every row is, and where its numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import harness
from .harness import COMPILED, EAGER, OURS, Row

DEVICE, WALL = "device", "wall"  # which clock

# Our providers: each one's kernels forced, or (OURS) what the package chooses by itself.
CUDA, TRITON = "CUDA C++", "Triton"
BACKENDS = {CUDA: "cuda", TRITON: "triton"}
OURS_ALL = (CUDA, OURS, TRITON)

# Goals that a row's first provider is measured by: at most, or at least.
OF_TRITON, OF_CEILING, OF_PEER = "of_triton", "of_ceiling", "of_peer"

Function = Callable[..., Any]
Cut = Callable[[int, int], int]  # (size, the most for a trial on a processor) -> size


def by_backends(function: Function) -> dict[str, Function]:
    """One function of ours as two providers."""
    return dict.fromkeys(BACKENDS, function)


def part(provider: str, what: str) -> str:
    """The name of a provider that is a part of one of ours: nobody's peer."""
    return f"{provider}, {what}"


def is_part(provider: str) -> bool:
    return provider.startswith(tuple(part(ours, "") for ours in OURS_ALL))


@dataclass(frozen=True)
class GpuRow(Row):
    """A row on a GPU.

    Attributes:
        operators: those that CUDA and TRITON must serve themselves, or they fail.
        clock: DEVICE or WALL.
        shows_memory: whether the memory that a call takes is of interest.
        shows_gpu_time: whether the time on the GPU is of interest beside WALL's.
        goals: what is to be reached. OF_TRITON: this fraction of its time at most; OF_CEILING: this fraction of the
            ceiling at least; OF_PEER: the fastest peer's time as a multiple of ours at least.
    """

    providers: tuple[str, ...] = (CUDA, TRITON, EAGER, COMPILED)
    operators: tuple[str, ...] = ()
    clock: str = DEVICE
    shows_memory: bool = False
    shows_gpu_time: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(name for name in self.providers if name in OURS_ALL)

    def facts(self) -> dict[str, Any]:
        facts = {**super().facts(), "clock": self.clock, "shows_memory": self.shows_memory}
        facts |= {"operators": list(self.operators)} if self.operators else {}
        return facts | ({"goals": dict(self.goals)} if self.goals else {})


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
