"""The benchmarks for a GPU, as far as a processor allows: every row computes what it says, failures stay where they
are, and no figure is shown that was not measured."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_report, gpu_timing, report
from benchmarks.gpu_models import LAUNCH
from benchmarks.gpu_operators import CUDNN, EFFICIENT, FLASH, FLEX
from benchmarks.gpu_row import GpuRow, Source
from benchmarks.harness import BACKWARD, BYTES, EAGER, FORWARD, OURS, Case, Provider, check
from tinyllm.ops import _triton

ONLY_ON_GPU = {CUDNN, EFFICIENT, FLASH}
NAMES = [row.name for row in gpu.rows(Source("cpu", 0), small=True) if "CUDA graph" not in row.name]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_row_computes_what_it_says(name: str) -> None:
    row = next(row for row in gpu.rows(Source("cpu", 0), small=True) if row.name == name)
    if row.section == "launch" and _triton.why_not is not None:
        pytest.skip(f"there is nothing to launch: {_triton.why_not}")
    only_on_gpu = ONLY_ON_GPU | ({FLEX} if row.direction == BACKWARD else set())
    case = row.build()
    case = Case({name: provider for name, provider in case.providers.items() if name not in only_on_gpu}, case.exact)
    errors, failures = check(row, case)
    assert not failures
    assert {OURS, EAGER} <= errors.keys()
    assert set(row.providers) <= errors.keys() | only_on_gpu


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in gpu.rows(Source("cuda", 0))]
    assert len(set(names)) == len(names)
    assert {row.section for row in gpu.rows(Source("cuda", 0))} == set(gpu_report.SECTIONS)


def test_every_draw_is_new() -> None:
    source = Source("cpu", 3)
    assert not torch.equal(source.randn(8), source.randn(8))
    assert torch.equal(source.randn(8), Source("cpu", 5).randn(8))


# ---- Failures


def a_row(**providers: Callable[[], tuple[torch.Tensor, ...]]) -> GpuRow:
    def build() -> Case:
        return Case(
            {name: Provider(call) for name, call in providers.items()}, lambda: (torch.ones(4, dtype=torch.float64),)
        )

    return GpuRow("embedding", "ones", FORWARD, "4", 16.0, BYTES, build)


def right() -> tuple[torch.Tensor, ...]:
    return (torch.ones(4),)


def wrong() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(4),)


def broken() -> tuple[torch.Tensor, ...]:
    raise RuntimeError("a reason\nand its long explanation")


def texts(entries: gpu.Entries) -> dict[str, str]:
    return {e["extra_info"]["provider"]: e["extra_info"].get("failed", "") for e in entries}


@pytest.mark.parametrize("ours", [right, wrong, broken])
def test_one_provider_fails_alone(ours: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    row = a_row(tinyllm=ours, torch=right, peer=broken)
    entries = gpu.measure(row, "cpu", 3, {"another": "left out"})
    found = texts(entries)
    assert found["torch"] == ""
    assert found["peer"] == "RuntimeError: a reason"
    assert found["another"] == "left out"
    assert ("error" in found[OURS]) == (ours is wrong)
    measured = {e["extra_info"]["provider"] for e in entries if "stats" in e}
    assert measured == {EAGER} | ({OURS} if ours is right else set())

    rows = report.make_results({}, None, entries)["rows"]
    by_name = {row["provider"]: row for row in rows}
    assert by_name[EAGER]["ratios"].keys() == measured - {EAGER}
    assert all("median_s" not in row for row in rows if "failed" in row)
    table = "\n".join(report.section_table(rows, short=False))
    assert "RuntimeError: a reason" in table


class Scripted:
    """A worker that answers as it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.requests, self.stops = list(answers), [], 0

    def ask(self, request: Any, limit_s: float) -> Any:
        self.requests.append(copy.deepcopy(request))
        return self.answers.pop(0)

    def stop(self) -> None:
        self.stops += 1


def test_a_row_that_ruins_its_process_is_asked_for_again_without_the_culprit() -> None:
    row = a_row(tinyllm=right, torch=right)
    fatal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    first = gpu.measure(row, "cpu", 3, {OURS: fatal})
    second = gpu.measure(row, "cpu", 3, {OURS: fatal})
    worker: Any = Scripted(first, second, "it was not done in 3 s")
    found = list(gpu.measure_all([row, row], worker, time.monotonic() + 60))
    assert worker.requests == [(row.name, {}), (row.name, {OURS: fatal}), (row.name, {})]
    assert worker.stops == 1
    assert texts(found[0][1])[OURS] == fatal
    assert texts(found[1][1]) == {OURS: "not measured: it was not done in 3 s"}


def test_rows_beyond_the_time_say_so() -> None:
    worker: Any = Scripted()
    ((_, entries),) = gpu.measure_all([a_row()], worker, time.monotonic())
    assert texts(entries) == {OURS: "not measured: out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_answers_and_is_replaced() -> None:
    worker = gpu.Worker(0, 3)
    try:
        assert "CUDA" in worker.ask(None, 60)
        worker._process.kill()
        worker._process.join()
        assert "ended with status -9" in worker.ask(None, 60)
        assert "CUDA" in worker.ask(None, 60)
    finally:
        worker.stop()


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

    def time_calls(call: Callable[[], object], calls: int) -> float:
        start = queue.now
        for _ in range(calls):
            call()
        return queue.now - start

    monkeypatch.setattr(gpu_timing, "time_calls", time_calls)
    clock = gpu_timing.DeviceClock()
    assert clock(queue.call, 5) == pytest.approx(5e-3)  # 50e-3 if the GPU were found waiting
    assert len(queue.waits) > 1
    queue.waits.clear()
    assert clock(queue.call, 5) == pytest.approx(5e-3)
    assert queue.waits == [pytest.approx(1.5 * 50e-3)]  # what the calls took, and a half more


def test_rotation_keeps_a_sets_outputs_until_its_next_turn() -> None:
    made: list[int] = []
    rotation = gpu_timing.Rotation([lambda i=i: made.append(i) or [i] for i in range(3)])  # type: ignore[misc]
    for _ in range(4):
        rotation()
    assert made == [0, 1, 2, 0]
    assert rotation._outputs == [[0], [1], [2]]


# ---- What is shown


def test_readme_shows_the_stored_results() -> None:
    readme = report.README.read_text(encoding="utf-8")
    assert "<!-- benchmarks:gpu -->" in readme
    table = gpu_report.render_table(gpu_report.load(), headline=True)
    assert report.replace_block(readme, "gpu", table) == readme, "README.md is out of date: python -m benchmarks.gpu"


def test_no_stored_figure_without_a_gpu() -> None:
    results = gpu_report.load()
    names = {row["benchmark"] for row in results["rows"]}
    assert names == {row.name for row in gpu.rows(Source("cuda", 0))}
    if results["gpu"] is None:
        assert {row["failed"] for row in results["rows"]} == {"not measured: no GPU"}
        assert results["ceilings"] is None


def test_tables_and_pictures_of_measured_rows(tmp_path: Path) -> None:
    entries: gpu.Entries = []
    for i, row in enumerate(gpu.rows(Source("cuda", 0))):
        for provider in (OURS, EAGER, FLASH, LAUNCH):
            facts = {**row.facts(), "provider": provider, "other_load_cores": None, "error": 0.0, "peak_bytes": 3 << 30}
            stats = {"median": 1e-3 * (i + 1), "iqr": 1e-5, "rounds": 3}
            entries.append({"extra_info": facts, "stats": stats})
    machine = {"processor": "Abacus", "cores": 2, "threads": 2, "isa": None, "memory_gib": 1.0, "cache_mib": None}
    facts = {
        "machine": machine,
        "gpu": {"name": "Loom", "multiprocessors": 4, "memory_gib": 8.0, "cuda": "13", "triton": "3"},
        "versions": {"torch": "2", "python": "3"},
        "commit": None,
        "date": "2000-01-01",
        "quick": False,
    }
    ceilings = {"gemm_gflops": {"bfloat16": 1e6, "float32": 1e4}, "copy_gb_per_s": 4000.0}
    results = json.loads(json.dumps(report.make_results(facts, ceilings, entries)))
    assert all(LAUNCH not in row["ratios"] for row in results["rows"])
    table = gpu_report.render_table(results)
    assert "Loom (4 multiprocessors, 8 GiB)" in table
    assert "1000 TFLOP/s in bfloat16" in table
    assert "1.00x" in table
    assert "3.00 GiB" in table
    assert "commit unknown" in table
    paths = gpu_report.draw_pictures(results, tmp_path)
    assert [path.name for path in paths] == ["gpu.png", "gpu_attention.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
