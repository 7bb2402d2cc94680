"""The benchmarks for a GPU, as far as a processor allows: every row computes what it says, failures stay where they
are, and no figure is shown that was not measured."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_sanitize, measure, report
from benchmarks.row import BACKWARD, CUDA, EAGER, OURS, TRITON, Case, Provider, Row, Target
from benchmarks.rows import rows
from benchmarks.rows.attention import CUDNN, EFFICIENT, FLASH, FLEX
from benchmarks.rows.launch import LAUNCH
from tests.helpers.needs import needs_extension
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cuda, triton

from .made_up import a_norm, results_of

ONLY_ON_GPU = {CUDNN, EFFICIENT, FLASH}


def small_rows() -> list[Row]:
    """Return the rows of a GPU, in sizes for a processor."""
    return [row for row in rows(Target(gpu=True, device="cpu", small=True)) if "CUDA graph" not in row.name]


NAMES = [row.name for row in small_rows()]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_row_computes_what_it_says(name: str) -> None:
    row = next(row for row in small_rows() if row.name == name)
    case = row.build()
    if LAUNCH in case.providers and triton.why_not is not None:
        pytest.skip(f"there is nothing to launch: {triton.why_not}")
    case = case.without(dict.fromkeys(ONLY_ON_GPU | ({FLEX} if row.direction == BACKWARD else set())))
    errors, failures = measure.check(row, case)
    assert not failures
    assert {*row.ours, EAGER} <= errors.keys()
    assert row.ours in ((CUDA, TRITON), (OURS, TRITON))


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in rows(Target(gpu=True))]
    assert len(set(names)) == len(names)
    assert {row.section for row in rows(Target(gpu=True))} <= set(report.SECTIONS)


def test_the_headline_is_measured_first() -> None:
    """Check that a short run shows something of each section before all of any."""
    found = rows(Target(gpu=True))
    first = [row for row in found if row.headline]
    assert found[: len(first)] == first
    sections = {row.section for row in found}
    assert {row.section for row in first[: len(sections)]} == sections


# ---- Failures


Call = Callable[[], tuple[torch.Tensor, ...]]


def a_row(providers: dict[str, Call] | None = None, **options: Any) -> Row:
    calls = providers or {CUDA: right, TRITON: right, EAGER: right}
    exact = torch.ones(4, dtype=torch.float64)

    def build() -> Case:
        return Case({name: Provider(call) for name, call in calls.items()}, lambda: (exact,))

    return a_norm(build=build, ours=(CUDA, TRITON), **options)


def right() -> tuple[torch.Tensor, ...]:
    return (torch.ones(4),)


def wrong() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(4),)


def broken() -> tuple[torch.Tensor, ...]:
    raise RuntimeError("a reason\nand its long explanation")


def texts(entries: gpu.Entries) -> dict[str, str]:
    return {entry["provider"]: entry.get("failed", "") for entry in entries}


@pytest.mark.parametrize("ours", [right, wrong, broken])
def test_one_provider_fails_alone(ours: Call) -> None:
    row = a_row({CUDA: ours, TRITON: right, EAGER: right, "peer": broken, "another": right})
    entries = gpu.measure_row(row, "cpu", 3, {"another": "left out", FLEX: "not a provider of this row"})
    found = texts(entries)
    assert found.keys() == {CUDA, TRITON, EAGER, "peer", "another"}
    assert found["torch"] == ""
    assert found["peer"] == "RuntimeError: a reason"
    assert found["another"] == "left out"
    measured = {entry["provider"] for entry in entries if "median_s" in entry}
    assert ("error" in found[CUDA]) == (ours is wrong)
    assert measured == {TRITON, EAGER} | ({CUDA} if ours is right else set())
    table = "\n".join(report.section_table(results_of(*entries)["rows"]))
    assert "RuntimeError: a reason" in table


# ---- Backends


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU, with the clocks and the memory of the processor."""
    monkeypatch.setattr(measure, "DeviceClock", lambda: measure.wall_clock)
    monkeypatch.setattr(gpu, "_sets", lambda row_bytes: 1)
    monkeypatch.setattr(cuda, "why_not", None)
    monkeypatch.setattr(triton, "why_not", None)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_each_of_ours_is_forced_whenever_it_is_called() -> None:
    seen: dict[str, set[str | None]] = {}

    def call(name: str) -> Call:
        def noting() -> tuple[torch.Tensor, ...]:
            seen.setdefault(name, set()).add(dispatch.forced_backend("layer_norm"))
            assert dispatch.forced_backend("linear") is None
            return (torch.ones(4),)

        return noting

    row = a_row({name: call(name) for name in (CUDA, TRITON, EAGER)}, operators=("layer_norm",))
    entries = gpu.measure_row(row, "cuda", 3, {})
    assert set(texts(entries).values()) == {""}
    assert seen == {CUDA: {"cuda"}, TRITON: {"triton"}, EAGER: {None}}


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_backend_that_does_not_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(operator: str) -> dict[str, str]:
        row = a_row({CUDA: right, TRITON: right, EAGER: right, part: right}, operators=(operator,))
        return texts(gpu.measure_row(row, "cuda", 3, {}))

    part = f"{CUDA}, its operator"
    assert found("layer_norm") == {CUDA: "", TRITON: "", EAGER: "", part: ""}
    why = dispatch.unavailable("cuda", "linear_cross_entropy", "cuda", torch.float32)
    assert why
    assert found("linear_cross_entropy") == {CUDA: why, TRITON: "", EAGER: "", part: why}
    monkeypatch.setattr(cuda, "why_not", "TINYLLM_CUDA=0")
    monkeypatch.setattr(triton, "why_not", "triton is not installed")
    assert "TINYLLM_CUDA=0" in found("layer_norm")[CUDA]
    assert "triton is not installed" in found("layer_norm")[TRITON]


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_launches_are_timed_by_both_clocks() -> None:
    entries = gpu.measure_row(a_row(on_wall=True, shows_gpu_time=True), "cuda", 3, {})
    assert all(entry["gpu_s"] > 0 for entry in entries)


@needs_extension
def test_what_the_sanitizer_watches_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_sanitize.run("cpu", "cpp") == []
    names = capsys.readouterr().out.splitlines()
    served = {name for name, found in dispatch.OPERATORS.items() if not isinstance(found.kernels["cuda"], str)}
    assert all(any(name.startswith(f"{operator}, ") for name in names) for operator in served)
    assert any("50257" in name for name in names)


# ---- The process that measures


class Scripted:
    """A worker that answers as it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.requests, self.stops = list(answers), [], 0

    def ask(self, request: Any, limit_s: float) -> Any:
        self.requests.append(copy.deepcopy(request))
        return self.answers.pop(0)

    def stop(self) -> None:
        self.stops += 1


def test_who_loses_the_worker_is_left_out_from_then_on() -> None:
    row, other = a_row(operators=("layer_norm",)), a_row(operators=("rms_norm",))
    without = gpu.measure_row(row, "cpu", 3, {CUDA: "not done in 45 s"})
    worker: Any = Scripted(gpu.Lost(CUDA, "not done in 45 s"), without, without, without)
    found = list(gpu.measure_all([row, row, other], worker, time.monotonic() + 60))
    late = {CUDA: f"left out, not done in 45 s in {row.name}"}
    assert [skip for _, skip in worker.requests] == [{}, {CUDA: "not done in 45 s"}, late, {}]
    assert len(found) == 3
    assert texts(found[0][1]) == {CUDA: "not done in 45 s", TRITON: "", EAGER: ""}


@pytest.mark.parametrize("lost", [[gpu.Lost("", "a reason")], [gpu.Lost(EAGER, "first"), gpu.Lost(EAGER, "a reason")]])
def test_a_row_is_given_up_where_nobody_is_to_blame(lost: list[gpu.Lost]) -> None:
    worker: Any = Scripted(*lost)
    ((_, entries),) = gpu.measure_all([a_row()], worker, time.monotonic() + 60)
    assert texts(entries) == dict.fromkeys((CUDA, TRITON), "not measured: a reason")


def test_a_quick_run_leaves_out_what_compiles_for_long() -> None:
    row = a_row({CUDA: right, TRITON: right, EAGER: right, FLEX: right})
    worker: Any = Scripted([])
    assert list(gpu.measure_all([row], worker, time.monotonic() + 60, gpu.LEFT_OUT_OF_QUICK))
    assert worker.requests == [(row.name, gpu.LEFT_OUT_OF_QUICK)]


def speaks_and_falls_silent(connection: Any, seed: int, rounds: int) -> None:
    connection.send(EAGER)
    connection.send(CUDA)
    time.sleep(60)


def speaks_and_loses_its_gpu(connection: Any, seed: int, rounds: int) -> None:
    connection.send(CUDA)
    connection.send(gpu.Lost("", "an illegal memory access"))
    time.sleep(60)


def speaks_and_dies(connection: Any, seed: int, rounds: int) -> None:
    connection.send(CUDA)
    os._exit(7)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (speaks_and_falls_silent, "not done in 0 s"),
        (speaks_and_loses_its_gpu, "an illegal memory access"),
        (speaks_and_dies, "the process ended with status 7"),
    ],
)
def test_whose_turn_it_was_when_a_worker_was_lost(work: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_work", work)
    monkeypatch.setattr(gpu, "SILENCE_LIMIT_S", 0.5)
    worker = gpu.Worker(0, 3)
    assert worker.ask(("a row", {}), time.monotonic() + 100) == gpu.Lost(CUDA, why)
    assert worker._process is None


def test_rows_beyond_the_time_say_so() -> None:
    worker: Any = Scripted()
    ((_, entries),) = gpu.measure_all([a_row()], worker, time.monotonic())
    assert texts(entries) == dict.fromkeys((CUDA, TRITON), "not measured: out of time")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_answers_and_is_replaced() -> None:
    worker = gpu.Worker(0, 3)
    for _ in range(2):
        answer = worker.ask(None, time.monotonic() + 100)
        assert answer.provider == ""
        assert "CUDA" in answer.why
        assert worker._process is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_stored_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--quick", "--only", "full attention"]) == 2
    said = capsys.readouterr()
    assert "not measured: no GPU" in said.out
    assert "nothing was written" in said.err
