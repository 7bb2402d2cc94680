"""Time on a GPU, and what one can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from .timing import Clock, time_calls

# Longer queues than the driver's would let the processor wait for the GPU in the middle of a round.
MOST_CALLS = 50
_CYCLES_PER_S = 2e9  # of the GPU's clock at its fastest: it may be kept busy for longer than asked
_LONGEST_WAIT_S = 0.2


class DeviceClock:
    """Times calls as the GPU runs them, one after the other, without the time that Python takes to start them: the GPU
    is kept busy until all of them are in its queue. Events in that queue are what is read."""

    def __init__(self) -> None:
        self._queueing_s = 1e-3  # of a call; as the latest one took

    def __call__(self, call: Callable[[], object], calls: int) -> float:
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


def wall_clock(call: Callable[[], object], calls: int) -> float:
    """Times calls as a program sees them, until the last one is done."""
    _synchronize()
    began = time.perf_counter()
    time_calls(call, calls)
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inside(clock: Clock, contexts: Mapping[Callable[[], object], Callable[[], AbstractContextManager[None]]]) -> Clock:
    """A clock that times each function inside a context of its own, entered before the clock starts: to enter one takes
    about as long as a launch."""

    def timed(call: Callable[[], object], calls: int) -> float:
        with contexts[call]():
            return clock(call, calls)

    return timed


class Rotation:
    """A call that works on the next set of inputs each time, and keeps each set's outputs until its next turn: what
    is read and written has left the cache by then."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._calls = calls
        self._outputs: list[object] = [None] * len(calls)
        self._next = 0

    def __call__(self) -> None:
        index = self._next
        self._next = (index + 1) % len(self._calls)
        self._outputs[index] = self._calls[index]()


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that a call takes at its peak, beside what is there before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def statistics_of(times: Sequence[float]) -> dict[str, float]:
    """As pytest-benchmark names them."""
    quarter, median, three_quarters = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "iqr": three_quarters - quarter, "rounds": len(times)}


def ceilings() -> dict[str, Any]:
    """As `machine.ceilings` does for the CPU: products of 8192^3, and a copy of 4 GiB, read and written; random data,
    because zeros are faster. float32 without TF32, PyTorch's default."""
    clock = DeviceClock()

    def median_s(call: Callable[[], object]) -> float:
        clock(call, 3)
        return statistics.median(clock(call, 3) / 3 for _ in range(9))

    size, gemm = 8192, {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        gemm[str(dtype).removeprefix("torch.")] = 2 * size**3 / median_s(partial(torch.mm, a, b, out=out)) / 1e9
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    return {"gemm_gflops": gemm, "copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9}


def describe() -> dict[str, Any] | None:
    """The GPU and what belongs to it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }
