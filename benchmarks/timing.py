"""Timing functions against each other: they take turns.

    round 1   torch  tinyllm  torch.compile
    round 2   tinyllm  torch.compile  torch         the order is drawn anew for each round, by a fixed seed
    ...

A machine that slows down for a while thus slows all of them, and their ratio stays. Timing all rounds of one and then
all of the next would leave that drift in the ratio.
"""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping

# Times are taken of blocks of calls at least this long, so that neither the clock nor the change of turn shows in them.
BLOCK_S = 5e-3
WARM_UP_CALLS = 3  # the allocator reuses what the first ones returned to it
MIN_ROUNDS, MAX_ROUNDS = 5, 200


Clock = Callable[[Callable[[], object], int], float]  # the seconds that so many calls of a function take


def time_calls(call: Callable[[], object], calls: int) -> float:
    """By the processor's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int | None = None,
    seed: int = 0,
    clock: Clock = time_calls,
    most_calls: int | None = None,
) -> tuple[int, dict[str, list[float]]]:
    """Times of functions that take turns.

    Args:
        functions: name -> what to time.
        seconds: about how long each function runs in all. There are at least MIN_ROUNDS rounds nevertheless.
        rounds: so many rounds, whatever their time.
        seed: of the order in each round.
        clock: what times them.
        most_calls: in a round.

    Returns:
        Calls per round, the same for every function, and for each name a list: seconds per call, one for each round.
    """
    estimates = {name: min(clock(call, 1) for _ in range(WARM_UP_CALLS)) for name, call in functions.items()}
    calls = max(1, min(math.ceil(BLOCK_S / min(estimates.values())), most_calls or sys.maxsize))
    round_s = calls * sum(estimates.values())
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds * len(functions) / round_s)))
    order = list(functions)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()  # no collection in the middle of somebody's turn
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                times[name].append(clock(functions[name], calls) / calls)
    finally:
        gc.enable()
    return calls, times


def format_time(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{format_digits(seconds * factor)} {unit}"
    return f"{format_digits(seconds)} s"


def format_digits(value: float) -> str:
    """Three digits, or all before the point; two for what is very small."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
