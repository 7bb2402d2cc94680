"""Trainings that take turns of some steps, so that a machine that slows down for a while slows all of them."""

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
from tinyllm.training.optim import learning_rate

from . import machine
from .measure import MIN_ROUNDS
from .peers import clip_and_step
from .row import OURS

LOG_INTERVAL = 10  # the default of `tinyllm train`

LossOf = Callable[[Tensor, Tensor], Tensor]
NextBatch = Callable[[], tuple[Tensor, Tensor]]
Run = Callable[[int], None]  # does so many steps


@dataclass
class HandWritten:
    """A loop as one writes it: `run(n)` does the next n steps. The schedule and the clipping are those of `config`."""

    loss_of: LossOf
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    next_batch: NextBatch
    step: int = 0

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
            clip_and_step(self.optimizer, self._parameters, self.config.grad_clip)
            self.optimizer.zero_grad(set_to_none=True)
            if self.step % LOG_INTERVAL == 0:
                loss.item()  # as for a log


@dataclass
class Rounds:
    """Rounds in which everyone had a turn: name -> seconds a step, and how many cores other programs used meanwhile,
    None where the system does not tell."""

    times: list[dict[str, float]] = field(default_factory=list)
    loads: list[float | None] = field(default_factory=list)

    def undisturbed(self) -> Rounds:
        """Return those that others left alone, whatever their times; all of them if these are too few."""
        quiet = [i for i, load in enumerate(self.loads) if (load or 0.0) < machine.DISTURBED]
        if len(quiet) < MIN_ROUNDS:
            return self
        return Rounds([self.times[i] for i in quiet], [self.loads[i] for i in quiet])

    def load(self) -> float | None:
        """Return the mean of the loads that are known."""
        known = [load for load in self.loads if load is not None]
        return fmean(known) if known else None

    def of(self, name: str) -> list[float]:
        """Return one side's times."""
        return [times[name] for times in self.times]


class Turns:
    """Rounds in which sides take turns of some steps, in an order drawn anew for each round. As a callback of `fit` it
    lets the others do as many steps as `fit` has done."""

    def __init__(self, sides: Mapping[str, Run], steps: int) -> None:
        self.rounds = Rounds()
        self._sides, self._steps = sides, steps
        self._order, self._shuffle = list(sides), random.Random(0).shuffle
        self._begun = 0.0

    def begin(self) -> None:
        """Let all sides have their turn, in a round that is not over yet."""
        self._others, self._times = machine.OtherLoad(), {}
        self._shuffle(self._order)
        for name in self._order:
            start = time.perf_counter()
            self._sides[name](self._steps)
            self._times[name] = (time.perf_counter() - start) / self._steps

    def end(self) -> None:
        """Note the round."""
        self.rounds.times.append(self._times)
        self.rounds.loads.append(self._others.cores())

    def on_step(self, step: int) -> None:
        """Take part in a training that begins a step. Not noted are the first round, in which all warm up, and the last
        one, at whose end `fit` validates and saves."""
        done = step - 1
        if done % self._steps == 0:
            if done > self._steps:
                self._times[OURS] = (time.perf_counter() - self._begun) / self._steps
                self.end()
            self.begin()
            self._begun = time.perf_counter()


def in_turns(sides: Mapping[str, Run], rounds: int, steps: int = 1) -> Rounds:
    """Return rounds of `steps` steps each; one before the first warms all up."""
    turns = Turns(sides, steps)
    turns.begin()
    for _ in range(rounds):
        turns.begin()
        turns.end()
    return turns.rounds


class Terminal(io.StringIO):
    """Terminal on which the progress bar is drawn as often as for a person."""

    def isatty(self) -> bool:
        return True
