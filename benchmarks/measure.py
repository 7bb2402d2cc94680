"""Checking providers against the exact result, and timing them against each other: they take turns.

    round 1   torch  tinyllm  torch.compile
    round 2   tinyllm  torch.compile  torch         the order is drawn anew for each round, by a fixed seed
    ...

In `tinyllm bench` pytest-benchmark calls ours: it comes first in each round, and the order of the peers is drawn.
A machine that slows down for a while thus slows all of them, and their ratio stays. Timing all rounds of one and then
all of the next would leave that drift in the ratio.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from .row import EAGER, Case, Outputs, Row

# Times are taken of blocks of calls at least this long, so that neither the clock nor the change of turn shows in them.
BLOCK_S = 5e-3
WARM_UP_CALLS = 3  # the allocator reuses what the first ones returned to it
MIN_ROUNDS, MAX_ROUNDS = 5, 200

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # the seconds that so many calls of a function take


# ---- Checking


def relative_error(got: Outputs, exact: Outputs) -> float:
    """Return ||got - exact|| / ||exact||, all tensors of a result being one long vector; NaN counts as infinite.

    Not tensor by tensor: some gradients are zero by their nature, and what is computed for them is rounding alone.
    (All of a query's scores move with the keys' bias, and softmax does not see what they have in common.)
    """
    assert len(got) == len(exact), f"{len(got)} tensors, not {len(exact)}"
    difference = norm = 0.0
    for x, y in zip(got, exact, strict=True):
        assert x.shape == y.shape, f"shape {list(x.shape)}, not {list(y.shape)}"
        difference = math.hypot(difference, torch.linalg.vector_norm(x.double() - y).item())
        norm = math.hypot(norm, torch.linalg.vector_norm(y.double()).item())
    return math.inf if math.isnan(difference) else difference / norm


def allowed_error(row: Row, provider: str, eager_error: float) -> float:
    """Return what a provider's error may be: twice that of eager PyTorch, plus two rounding steps, which is the tests'
    rule on norms.

    Eager PyTorch, the measure of the others, must have half of the dtype's digits right itself; and a third of them is
    enough in rows that are not smooth.
    """
    eps = torch.finfo(row.dtype).eps
    if not row.smooth:
        return float(eps ** (1 / 3))
    return math.sqrt(eps) if provider == EAGER else 2 * eager_error + 2 * eps


def check(row: Row, case: Case) -> tuple[dict[str, float], dict[str, Exception]]:
    """Return the error of each provider whose result is right, and of each other one why it cannot be trusted."""
    exact = [x.detach().double() for x in case.exact()]
    errors: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for name, provider in case.providers.items():
        try:
            outputs = provider.normal_form(provider.call())
            errors[name] = relative_error([x.detach() for x in outputs], exact)
        except Exception as failure:
            failures[name] = failure
    eager_error = errors.get(EAGER, math.inf)
    if not eager_error <= allowed_error(row, EAGER, eager_error):
        eager_error = 0.0  # no measure for the others
    for name in list(errors):
        limit = allowed_error(row, name, eager_error)
        if not errors[name] <= limit:
            text = f"{row.name}: {name} has error {errors.pop(name):.2e}, allowed {limit:.2e}"
            failures[name] = AssertionError(text)
    return errors, failures


def verify(row: Row, case: Case) -> dict[str, float]:
    """Return each provider's error; raise AssertionError if one is too large, or what a provider raised."""
    errors, failures = check(row, case)
    for failure in failures.values():
        raise failure
    return errors


# ---- Taking turns


class Plan(NamedTuple):
    """Number of rounds, and of calls that each side makes in its turn."""

    rounds: int
    calls: int


def time_calls(call: Call, calls: int) -> float:
    """Return the seconds that so many calls take by the processor's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def plan(
    functions: Mapping[str, Call], seconds: float, clock: Clock = time_calls, most_calls: int = sys.maxsize
) -> Plan:
    """Warm the functions up, and choose rounds in which each runs for about `seconds` in all; there are at least
    MIN_ROUNDS nevertheless."""
    estimates = [min(clock(call, 1) for _ in range(WARM_UP_CALLS)) for call in functions.values()]
    calls = max(1, min(math.ceil(BLOCK_S / min(estimates)), most_calls))
    rounds = round(seconds * len(functions) / (calls * sum(estimates)))
    return Plan(min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)), calls)


class Turns:
    """Functions that take turns, in an order drawn anew for each round.

    Attributes:
        times: name -> seconds a call, one number for each round.
    """

    def __init__(self, functions: Mapping[str, Call], calls: int = 1, clock: Clock = time_calls, seed: int = 0) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in functions}
        self._functions, self._calls, self._clock = functions, calls, clock
        self._order, self._shuffle = list(functions), random.Random(seed).shuffle

    def round(self) -> None:
        self._shuffle(self._order)
        for name in self._order:
            self.times[name].append(self._clock(self._functions[name], self._calls) / self._calls)


@contextmanager
def no_collection() -> Iterator[None]:
    """Let no garbage be collected in the middle of somebody's turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_turns(
    functions: Mapping[str, Call],
    seconds: float,
    rounds: int | None = None,
    clock: Clock = time_calls,
    most_calls: int = sys.maxsize,
) -> tuple[int, dict[str, list[float]]]:
    """Return calls per turn, and for each name the seconds per call, one number for each round: so many rounds as are
    given, or as many as take about `seconds` for each function."""
    planned = plan(functions, seconds, clock, most_calls)
    turns = Turns(functions, planned.calls, clock)
    with no_collection():
        for _ in range(rounds or planned.rounds):
            turns.round()
    return planned.calls, turns.times


def statistics_of(times: Sequence[float]) -> dict[str, Any]:
    """Return what the results hold of some times: their number, their median and their interquartile range."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else list(times) * 3
    return {"rounds": len(times), "median_s": median, "iqr_s": high - low}


# ---- On a GPU

# Longer queues than the driver's would let the processor wait for the GPU in the middle of a turn.
MOST_CALLS = 50
_CYCLES_PER_S = 2e9  # of the GPU's clock at its fastest: it may be kept busy for longer than asked
_LONGEST_WAIT_S = 0.2


class DeviceClock:
    """Times calls as the GPU runs them, one after the other, without the time that Python takes to start them: the GPU
    is kept busy until all of them are in its queue. Events in that queue are what is read."""

    def __init__(self) -> None:
        self._queueing_s = 1e-3  # of a call; as the latest one took

    def __call__(self, call: Call, calls: int) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(1.5 * self._queueing_s * calls * _CYCLES_PER_S))
            start.record()
            queueing_s = time_calls(call, calls) / calls
            late = start.query()  # the GPU was done with waiting before all calls were there
            end.record()
            end.synchronize()
            # Calls that wait for the GPU themselves are always late.
            if not late or self._queueing_s * calls > _LONGEST_WAIT_S:
                self._queueing_s = queueing_s
                return start.elapsed_time(end) / 1e3
            self._queueing_s = 2 * max(self._queueing_s, queueing_s)


def wall_clock(call: Call, calls: int) -> float:
    """Return the seconds that so many calls take as a program sees them, until the GPU has done the last one."""

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    time_calls(call, calls)
    synchronize()
    return time.perf_counter() - start


def inside(clock: Clock, contexts: Mapping[Call, Callable[[], AbstractContextManager[None]]]) -> Clock:
    """Return a clock that times each function inside a context of its own, entered before the clock starts: to enter
    one takes about as long as a launch."""

    def timed(call: Call, calls: int) -> float:
        with contexts[call]():
            return clock(call, calls)

    return timed


class Rotation:
    """A call that works on the next set of inputs each time, and keeps each set's outputs until its next turn: what
    is read and written has left the cache by then."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._outputs: list[object] = [None] * len(calls)
        self._next = 0

    def __call__(self) -> None:
        index = self._next
        self._next = (index + 1) % len(self._calls)
        self._outputs[index] = self._calls[index]()


def peak_bytes(call: Call) -> int | None:
    """Return the memory that a call takes at its peak, beside what is there before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
