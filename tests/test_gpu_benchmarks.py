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

from benchmarks import gpu, gpu_report, gpu_sanitize, gpu_timing, report
from benchmarks.gpu_launch import LAUNCH
from benchmarks.gpu_operators import CUDNN, EFFICIENT, FLASH, FLEX
from benchmarks.gpu_row import CUDA, OF_CEILING, OF_PEER, OF_TRITON, TRITON, WALL, GpuRow, Source
from benchmarks.harness import BACKWARD, BYTES, COMPILED, EAGER, FORWARD, OURS, Case, Provider, check
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cuda, triton

ONLY_ON_GPU = {CUDNN, EFFICIENT, FLASH}
NAMES = [row.name for row in gpu.rows(Source("cpu", 0), small=True) if "CUDA graph" not in row.name]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_row_computes_what_it_says(name: str) -> None:
    row = next(row for row in gpu.rows(Source("cpu", 0), small=True) if row.name == name)
    if LAUNCH in row.providers and triton.why_not is not None:
        pytest.skip(f"there is nothing to launch: {triton.why_not}")
    only_on_gpu = ONLY_ON_GPU | ({FLEX} if row.direction == BACKWARD else set())
    case = row.build()
    case = Case({name: provider for name, provider in case.providers.items() if name not in only_on_gpu}, case.exact)
    errors, failures = check(row, case)
    assert not failures
    assert {*row.ours, EAGER} <= errors.keys()
    assert row.ours in ((CUDA, TRITON), (OURS, TRITON))
    assert set(row.providers) <= errors.keys() | only_on_gpu


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in gpu.rows(Source("cuda", 0))]
    assert len(set(names)) == len(names)
    assert {row.section for row in gpu.rows(Source("cuda", 0))} == set(gpu_report.SECTIONS)


def test_what_there_is_a_goal_for_is_measured_first() -> None:
    """Of each section something before all of any: a short run shows them all."""
    rows = gpu.rows(Source("cuda", 0))
    with_goals = [row for row in rows if row.goals]
    assert rows[: len(with_goals)] == with_goals
    sections = {row.section for row in with_goals}
    assert {row.section for row in with_goals[: len(sections)]} == sections
    assert {goal for row in with_goals for goal in row.goals} == {OF_TRITON, OF_CEILING, OF_PEER}


def test_every_draw_is_new() -> None:
    source = Source("cpu", 3)
    assert not torch.equal(source.randn(8), source.randn(8))
    assert torch.equal(source.randn(8), Source("cpu", 5).randn(8))


# ---- Failures


Call = Callable[[], tuple[torch.Tensor, ...]]


def a_row(providers: dict[str, Call] | None = None, **options: Any) -> GpuRow:
    calls = providers or {CUDA: right, TRITON: right, EAGER: right}

    def build() -> Case:
        return Case(
            {name: Provider(call) for name, call in calls.items()}, lambda: (torch.ones(4, dtype=torch.float64),)
        )

    return GpuRow("embedding", "ones", FORWARD, "4", 16.0, BYTES, build, providers=tuple(calls), **options)


def right() -> tuple[torch.Tensor, ...]:
    return (torch.ones(4),)


def wrong() -> tuple[torch.Tensor, ...]:
    return (torch.zeros(4),)


def broken() -> tuple[torch.Tensor, ...]:
    raise RuntimeError("a reason\nand its long explanation")


def texts(entries: gpu.Entries) -> dict[str, str]:
    return {e["extra_info"]["provider"]: e["extra_info"].get("failed", "") for e in entries}


@pytest.mark.parametrize("ours", [right, wrong, broken])
def test_one_provider_fails_alone(ours: Call) -> None:
    row = a_row({CUDA: ours, TRITON: right, EAGER: right, "peer": broken})
    entries = gpu.measure(row, "cpu", 3, {"another": "left out"})
    found = texts(entries)
    assert found["torch"] == ""
    assert found["peer"] == "RuntimeError: a reason"
    assert found["another"] == "left out"
    assert ("error" in found[CUDA]) == (ours is wrong)
    measured = {e["extra_info"]["provider"] for e in entries if "stats" in e}
    assert measured == {TRITON, EAGER} | ({CUDA} if ours is right else set())

    results = gpu_report.make_results({}, None, entries)
    by_name = {row["provider"]: row for row in results["rows"]}
    for name in measured - {EAGER}:
        assert by_name[name]["ratios"].keys() == {EAGER}
    assert (OF_TRITON in by_name[CUDA]) == (ours is right)
    assert all("median_s" not in row for row in results["rows"] if "failed" in row)
    table = "\n".join(gpu_report._section_table(results["rows"]))
    assert "RuntimeError: a reason" in table


# ---- Backends


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if "cuda" were there: the clocks and the memory are a processor's."""
    monkeypatch.setattr(gpu_timing, "DeviceClock", lambda: gpu_timing.wall_clock)
    monkeypatch.setattr(gpu, "_sets", lambda row_bytes: 1)
    monkeypatch.setattr(cuda, "why_not", None)
    monkeypatch.setattr(triton, "why_not", None)
    monkeypatch.setattr(dispatch, "_CUDA_LACKS", frozenset())


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
    entries = gpu.measure(row, "cuda", 3, {})
    assert set(texts(entries).values()) == {""}
    assert seen == {CUDA: {"cuda"}, TRITON: {"triton"}, EAGER: {None}}


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_backend_that_does_not_serve_says_so_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("the forced backend 'cuda' cannot serve this call of layer_norm. cuda: too wide")

    def found(operator: str, ours: Call = right) -> dict[str, str]:
        row = a_row({CUDA: ours, TRITON: right, EAGER: right, f"{CUDA}, its operator": right}, operators=(operator,))
        return texts(gpu.measure(row, "cuda", 3, {}))

    part = f"{CUDA}, its operator"
    assert found("layer_norm") == {CUDA: "", TRITON: "", EAGER: "", part: ""}
    assert found("layer_norm", refuses) == {CUDA: "not served", TRITON: "", EAGER: "", part: ""}
    assert found("linear_cross_entropy") == {CUDA: "not served", TRITON: "", EAGER: "", part: "not served"}
    monkeypatch.setattr(cuda, "why_not", "TINYLLM_CUDA=0")
    assert found("layer_norm") == {CUDA: "not built", TRITON: "", EAGER: "", part: "not built"}
    monkeypatch.setattr(triton, "why_not", "triton is not installed")
    assert found("layer_norm")[TRITON] == "not installed"


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_launches_show_what_the_gpu_does_of_them() -> None:
    entries = gpu.measure(a_row(clock=WALL, shows_gpu_time=True), "cuda", 3, {})
    rows = gpu_report.make_results({}, None, entries)["rows"]
    assert all(row["gpu_s"] > 0 for row in rows)
    assert all(", GPU " in line for line in gpu_report._section_table(rows)[2:])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_the_sanitizer_watches_runs(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    if dispatch.unavailable(backend, "attention", "cpu") is not None:
        pytest.skip("the C++ extension is not built")
    assert gpu_sanitize.run("cpu", backend) == []
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names)
    served = {name for name in dispatch.OPERATORS if isinstance(dispatch._CUDA[name], tuple)}
    assert all(any(name.startswith(operator) for name in names) for operator in served)


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


def test_a_row_that_ruins_its_process_is_asked_for_again_without_the_culprit() -> None:
    row = a_row()
    fatal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    first = gpu.measure(row, "cpu", 3, {CUDA: fatal})
    second = gpu.measure(row, "cpu", 3, {CUDA: fatal})
    worker: Any = Scripted(first, second, "it was not done in 3 s")
    found = list(gpu.measure_all([row, row], worker, time.monotonic() + 60))
    assert worker.requests == [(row.name, {}), (row.name, {CUDA: fatal}), (row.name, {})]
    assert worker.stops == 1
    assert texts(found[0][1])[CUDA] == fatal
    assert texts(found[1][1]) == dict.fromkeys((CUDA, TRITON), "not measured: it was not done in 3 s")


def test_who_does_not_come_to_an_end_is_left_out_from_then_on() -> None:
    row, other = a_row(operators=("layer_norm",)), a_row(operators=("rms_norm",))
    without = gpu.measure(row, "cpu", 3, {CUDA: "not done in 45 s"})
    worker: Any = Scripted(gpu.Silent(CUDA, "not done in 45 s"), without, without, without)
    found = list(gpu.measure_all([row, row, other], worker, time.monotonic() + 60, {FLEX: "left out"}))
    late = {CUDA: f"left out, not done in {row.name}"}
    assert [skip for _, skip in worker.requests] == [{}, {CUDA: "not done in 45 s"}, late, {}]
    assert len(found) == 3
    assert texts(found[0][1]) == {CUDA: "not done in 45 s", TRITON: "", EAGER: ""}


def test_a_quick_run_leaves_out_what_compiles_for_long() -> None:
    row = a_row({CUDA: right, TRITON: right, EAGER: right, FLEX: right})
    worker: Any = Scripted([])
    assert list(gpu.measure_all([row], worker, time.monotonic() + 60, gpu.LEFT_OUT_OF_QUICK))
    assert worker.requests == [(row.name, gpu.LEFT_OUT_OF_QUICK)]


def speaks_and_falls_silent(connection: Any, seed: int, rounds: int) -> None:
    connection.send(gpu.Turn(EAGER))
    connection.send(gpu.Turn(CUDA))
    time.sleep(60)


def test_a_silent_worker_says_whose_turn_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_work", speaks_and_falls_silent)
    monkeypatch.setattr(gpu, "SILENCE_LIMIT_S", 0.5)
    worker = gpu.Worker(0, 3)
    assert worker.ask(("a row", {}), 30) == gpu.Silent(CUDA, "not done in 0 s")
    assert worker._process is None


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("RuntimeError: CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: layer_norm_fwd: misaligned address", True),
        ("RuntimeError: CUDA error: out of memory", False),
        ("RuntimeError: layer_norm_fwd: invalid argument", False),
    ],
)
def test_which_errors_leave_a_gpu_unusable(text: str, fatal: bool) -> None:
    assert gpu._is_fatal(text) == fatal


def test_rows_beyond_the_time_say_so() -> None:
    worker: Any = Scripted()
    ((_, entries),) = gpu.measure_all([a_row()], worker, time.monotonic())
    assert texts(entries) == dict.fromkeys((CUDA, TRITON), "not measured: out of time")


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
    assert results["schema"] == gpu_report.SCHEMA
    if results["gpu"] is None:
        assert {row["failed"] for row in results["rows"]} == {"not measured: no GPU"}
        assert results["ceilings"] is None


FACTS = {
    "machine": {"processor": "Abacus", "cores": 2, "threads": 2, "isa": None, "memory_gib": 1.0, "cache_mib": None},
    "gpu": {"name": "Loom", "multiprocessors": 4, "memory_gib": 8.0, "cuda": "13", "triton": "3"},
    "versions": {"torch": "2", "python": "3"},
    "commit": None,
    "date": "2000-01-01",
    "quick": False,
}
CEILINGS = {"gemm_gflops": {"bfloat16": 1e6, "float32": 1e4}, "copy_gb_per_s": 4000.0}


def an_entry(row: GpuRow, provider: str, seconds: float | None, why: str = "not built") -> dict[str, Any]:
    facts = {**row.facts(), "provider": provider, "other_load_cores": None, "error": 0.0, "peak_bytes": 3 << 30}
    if seconds is None:
        return {"extra_info": {**facts, "failed": why}}
    return {"extra_info": facts, "stats": {"median": seconds, "iqr": seconds / 100, "rounds": 3}}


def results_of(*entries: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(gpu_report.make_results(FACTS, CEILINGS, entries)))


def cells(results: dict[str, Any]) -> dict[str, str]:
    """The one row of the one table."""
    header, _, line = gpu_report._section_table(results["rows"])
    names = [cell.strip() for cell in header.split("|")[1:-1]]
    return dict(zip(reversed(names), reversed([cell.strip() for cell in line.split("|")[1:-1]]), strict=True))


def test_tables_and_pictures_of_measured_rows(tmp_path: Path) -> None:
    entries = [
        an_entry(row, provider, 1e-3 * (i + 1))
        for i, row in enumerate(gpu.rows(Source("cuda", 0)))
        for provider in (*row.ours, EAGER, FLASH, LAUNCH)
    ]
    results = results_of(*entries)
    assert all(row["ratios"].keys() == {EAGER, FLASH} for row in results["rows"] if "ratios" in row)
    table = gpu_report.render_table(results)
    assert "Loom (4 multiprocessors, 8 GiB)" in table
    assert "1000 TFLOP/s in bfloat16" in table
    assert "1.00x" in table
    assert "3.00 GiB" in table
    assert "commit unknown" in table
    paths = gpu_report.draw_pictures(results, tmp_path)
    assert [path.name for path in paths] == ["gpu.png", "gpu_attention.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_both_of_ours_stand_beside_each_other_and_peers_are_compared_with_the_faster() -> None:
    row = a_row(goals={OF_TRITON: 0.5, OF_PEER: 0.85})
    found = cells(results_of(*(an_entry(row, *x) for x in ((CUDA, 2e-5), (TRITON, 3e-5), (EAGER, 1e-5)))))
    assert found[CUDA].startswith("20.0 µs")
    assert found[TRITON].startswith("30.0 µs")
    assert found[f"{CUDA} / {TRITON}"] == "0.67x"
    assert found[EAGER].endswith(", **0.50x**")
    assert found["goal"] == "≤ 0.50x Triton: **missed**, ≥ 0.85x best peer: **missed**"
    found = cells(results_of(*(an_entry(row, *x) for x in ((CUDA, 4e-5), (TRITON, 2e-5), (EAGER, 4e-5)))))
    assert found[f"{CUDA} / {TRITON}"] == "2.00x"
    assert found[EAGER].endswith(", **2.00x**")
    assert found["goal"] == "≤ 0.50x Triton: **missed**, ≥ 0.85x best peer: met"


@pytest.mark.parametrize(("seconds", "verdict"), [(4e-12, ": met"), (4e-11, ": **missed**"), (None, "")])
def test_a_goal_is_judged_by_a_measured_figure_alone(seconds: float | None, verdict: str) -> None:
    row = a_row(goals={OF_CEILING: 0.8})
    results = results_of(an_entry(row, CUDA, seconds), an_entry(row, TRITON, 4e-12), an_entry(row, EAGER, 8e-12))
    found = cells(results)
    assert found["goal"] == f"≥ 80% of copy{verdict}"
    if seconds is None:
        assert found[CUDA] == "not built"
        assert found[f"{CUDA} / {TRITON}"] == ""
        assert found[EAGER].endswith(", **2.00x**")


def test_models_show_what_the_package_chooses_beside_triton() -> None:
    row = next(row for row in gpu.rows(Source("cuda", 0)) if row.section == "model")
    found = cells(results_of(*(an_entry(row, *x) for x in ((OURS, 1.0), (TRITON, 2.0), (COMPILED, 3.0)))))
    assert found[f"{OURS} / {TRITON}"] == "0.50x"
    assert found[COMPILED].endswith(", **3.00x**")


# ---- What was measured elsewhere


def test_measured_results_are_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "STORED", tmp_path / "results" / "gpu.json")
    monkeypatch.setattr(gpu_report, "draw_pictures", lambda results, directory: [])
    entries = [an_entry(row, name, 1.0) for row in gpu.rows(Source("cuda", 0)) for name in row.ours]
    measured = results_of(*entries)
    (tmp_path / "results").mkdir()
    gpu_report.save(measured, tmp_path / "bench.json")
    gpu.adopt(tmp_path)
    assert gpu_report.load(gpu_report.STORED) == measured

    gpu_report.save({**measured, "rows": measured["rows"][2:]}, tmp_path / "bench.json")
    with pytest.raises(SystemExit, match="other rows"):
        gpu.adopt(tmp_path)
    del measured["schema"]
    gpu_report.save(measured, tmp_path / "bench.json")
    with pytest.raises(SystemExit, match="has schema 1, not 2"):
        gpu.adopt(tmp_path)
    assert gpu_report.load(gpu_report.STORED)["schema"] == gpu_report.SCHEMA
