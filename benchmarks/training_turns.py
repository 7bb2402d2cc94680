"""Loops that take turns with `tinyllm train`'s own, in one process."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from tinyllm.config.training import TrainConfig
from tinyllm.training import loop
from tinyllm.training.optim import learning_rate

from .harness import OURS
from .machine import DISTURBED, OtherLoad
from .timing import MIN_ROUNDS

LOG_INTERVAL = 10  # the default of `tinyllm train`

LossOf = Callable[[Tensor, Tensor], Tensor]
NextBatch = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class HandWritten:
    """A loop as one writes it: `run(n)` does the next n steps. Fused AdamW, the schedule and clipping of `config`."""

    loss_of: LossOf
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    next_batch: NextBatch
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            lr = learning_rate(self.step, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = self.loss_of(*self.next_batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.step % LOG_INTERVAL == 0:
                self.losses.append(loss.item())


@dataclass
class Rounds:
    """Rounds in which everyone had a turn: name -> seconds a step, and how many cores other programs used meanwhile,
    None where the system does not tell."""

    times: list[dict[str, float]] = field(default_factory=list)
    loads: list[float | None] = field(default_factory=list)

    def undisturbed(self) -> Rounds:
        """Those that others left alone, whatever their times; all of them if these are too few."""
        quiet = [i for i, load in enumerate(self.loads) if (load or 0.0) < DISTURBED]
        if len(quiet) < MIN_ROUNDS:
            return self
        return Rounds([self.times[i] for i in quiet], [self.loads[i] for i in quiet])

    def load(self) -> float | None:
        """The mean of what is known."""
        known = [load for load in self.loads if load is not None]
        return fmean(known) if known else None

    def of(self, name: str) -> list[float]:
        """One side's times."""
        return [times[name] for times in self.times]


def in_turns(sides: Mapping[str, Callable[[int], None]], rounds: int, steps: int = 1) -> Rounds:
    """`sides` do `steps` steps in each round, in an order drawn anew; a round before the first warms them up."""
    found = Rounds()
    order, shuffle = list(sides), random.Random(0).shuffle
    for done in range(rounds + 1):
        others, times = OtherLoad(), {}
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            sides[name](steps)
            times[name] = (time.perf_counter() - start) / steps
        if done:
            found.times.append(times)
            found.loads.append(others.cores())
    return found


class Turns:
    """Stands in for `loop.seed_step`, the first thing that `fit` does in a step: every `steps` steps it lets
    the others do as many.

    Attributes:
        rounds: everyone's times, but for the first round, in which all warm up, and the last one, at whose end `fit`
            validates and saves.
    """

    def __init__(self, others: Mapping[str, Callable[[int], None]], seed: int, steps: int = LOG_INTERVAL) -> None:
        self.rounds = Rounds()
        self._others, self._steps = others, steps
        self._order = list(others)
        self._shuffle = random.Random(seed).shuffle
        self._seed_step = loop.seed_step
        self._load = OtherLoad()
        self._times: dict[str, float] = {}
        self._begun = 0.0

    def __call__(self, seed: int, step: int, rank: int, device: torch.device) -> None:
        done = step - 1
        if done % self._steps == 0:
            if done > self._steps:
                self._times[OURS] = (time.perf_counter() - self._begun) / self._steps
                self.rounds.times.append(self._times)
                self.rounds.loads.append(self._load.cores())
            self._load, self._times = OtherLoad(), {}
            self._shuffle(self._order)
            for name in self._order:
                start = time.perf_counter()
                self._others[name](self._steps)
                self._times[name] = (time.perf_counter() - start) / self._steps
            self._begun = time.perf_counter()
        self._seed_step(seed, step, rank, device)


class Terminal(io.StringIO):
    """Where the progress bar is drawn as often as for a person."""

    def isatty(self) -> bool:
        return True
