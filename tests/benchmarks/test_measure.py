"""A result is verified before it is timed, and providers take turns. How fast anything is, no test says."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.measure import relative_error, verify
from benchmarks.row import BACKWARD, COMPILED, EAGER, FORWARD, OURS, STEP, Target, passes, randn

from .made_up import a_row


def square(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * x, x * y


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, STEP])
def test_providers_compute_the_direction(direction: str) -> None:
    inputs = [randn((4, 3), seed) for seed in range(2)]
    case = passes({OURS: square, EAGER: square}, direction, inputs)
    exact = case.exact()
    assert [x.dtype for x in exact] == [torch.float64] * 2
    assert verify(a_row(), case).keys() == {OURS, EAGER, COMPILED}
    assert case.without({EAGER: "a reason"}).providers.keys() == {OURS, COMPILED}
    if direction == FORWARD:
        assert torch.equal(exact[0], inputs[0].double() ** 2)
    else:
        grads = [randn((4, 3), seed=7 + i).double() for i in range(2)]
        assert torch.allclose(exact[1], inputs[0].double() * grads[1])
        assert torch.allclose(exact[0], 2 * inputs[0].double() * grads[0] + inputs[1].double() * grads[1])


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, STEP])
@pytest.mark.parametrize("error", [1e-5, 1.0, math.nan])
def test_a_wrong_provider_is_not_timed(direction: str, error: float) -> None:
    def wrong(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * x, x * y * (1 + error)

    inputs = [randn((4, 3), seed) for seed in range(2)]
    case = passes({OURS: wrong, EAGER: square}, direction, inputs, compiled=False)
    with pytest.raises(AssertionError, match="tinyllm has error"):
        verify(a_row(), case)


def test_relative_error() -> None:
    exact = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    assert relative_error([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], exact) == 0
    assert relative_error([torch.tensor([3.0, 1.0]), torch.tensor([4.0])], exact) == pytest.approx(0.2)
    assert relative_error([torch.tensor([3.0, math.nan]), torch.tensor([4.0])], exact) == math.inf
    with pytest.raises(AssertionError, match="shape"):
        relative_error([torch.tensor([3.0]), torch.tensor([4.0])], exact)
    with pytest.raises(AssertionError, match="tensors"):
        relative_error([torch.tensor([3.0, 0.0])], exact)


def test_functions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BLOCK_S", 0.0)  # one call a turn
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    calls, times = measure.take_turns(functions, seconds=0.0)
    assert calls == 1
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", measure.MIN_ROUNDS)
    turns = order[3 * measure.WARM_UP_CALLS :]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == measure.MIN_ROUNDS
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert len(measure.take_turns(functions, seconds=0.0, rounds=2)[1]["a"]) == 2


def test_every_draw_is_new() -> None:
    target = Target(gpu=True, device="cpu", seed=3)
    assert not torch.equal(target.randn(8), target.randn(8))
    assert torch.equal(target.randn(8), Target(gpu=True, device="cpu", seed=5).randn(8))


# ---- The machine


def test_other_load_is_a_number_of_cores() -> None:
    load = machine.OtherLoad().cores()
    assert load is None or load >= 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_child_is_not_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    times = os.times()
    readings = machine.OtherLoad(os.getpid())._readings()
    assert readings is not None
    # Once as itself, with its children that have ended, once as the child, without.
    assert readings[1] == pytest.approx(sum(times[:4]) + sum(times[:2]), rel=0.01, abs=0.2)


@pytest.mark.parametrize(
    ("loads", "counted"), [([0.0], 0), ([0.5, 0.01], 1), ([0.5, 0.3, 0.4, 0.6, 0.7], 1), ([None], 0)]
)
def test_disturbed_ceilings_are_measured_again(
    loads: list[float | None], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, taken = iter(loads), iter(range(9))
    monkeypatch.setattr(machine, "_gemm_gflops", lambda dtype, seconds: 1.0)
    monkeypatch.setattr(machine, "_copy_gb_per_s", lambda seconds: next(taken))
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: next(left))
    assert machine.ceilings()["copy_gb_per_s"] == counted
    assert next(taken) == len(loads)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ({"vendor_id": "AuthenticAMD", "flags": "fpu avx2", "model name": "AMD EPYC"}, "amd-avx2"),
        ({"vendor_id": "AuthenticAMD", "flags": "fpu avx2 avx512f", "model name": "AMD EPYC"}, "amd-avx512"),
        ({"vendor_id": "GenuineIntel", "flags": "avx2 avx512f"}, "intel-avx512"),
        ({"vendor_id": "GenuineIntel", "flags": "sse2"}, "intel-scalar"),
        ({"model name": "Neoverse-N1 (r3p1)"}, "neoverse-n1-r3p1"),
        ({}, "aarch64"),
    ],
)
def test_families_of_processors(cpuinfo: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.family(cpuinfo) == name


# ---- On a GPU


class Queue:
    """A GPU that takes what it is told to wait for, and then a millisecond a call."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0
        self.waits: list[float] = []

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles / 2e9)
        self.busy_until = self.now + self.waits[-1]

    def call(self) -> None:
        self.now += 10e-3  # what Python takes
        self.busy_until = max(self.busy_until, self.now) + 1e-3

    def event(self, **_: Any) -> Any:
        queue = self

        class Event:
            def record(self) -> None:
                self.at = queue.busy_until

            def query(self) -> bool:
                return self.at <= queue.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        return Event()


def test_the_gpu_waits_until_all_calls_are_in_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", queue.sleep)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: queue.now)
    clock = measure.DeviceClock()
    assert clock(queue.call, 5) == pytest.approx(5e-3)  # 50e-3 if the GPU were found waiting
    assert len(queue.waits) > 1
    queue.waits.clear()
    assert clock(queue.call, 5) == pytest.approx(5e-3)
    assert queue.waits == [pytest.approx(1.5 * 50e-3)]  # what the calls took, and a half more


def test_rotation_keeps_a_sets_outputs_until_its_next_turn() -> None:
    made: list[int] = []
    rotation = measure.Rotation([lambda i=i: made.append(i) or [i] for i in range(3)])  # type: ignore[misc]
    for _ in range(4):
        rotation()
    assert made == [0, 1, 2, 0]
    assert rotation._outputs == [[0], [1], [2]]
