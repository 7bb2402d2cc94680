"""Every operator on an NVIDIA GPU against the best peers there:

    python -m benchmarks.gpu               everything, into benchmarks/results/ and the README
    python -m benchmarks.gpu --out DIR     everything, into DIR
    python -m benchmarks.gpu --adopt DIR   takes what was measured elsewhere into benchmarks/results/ and the README

Rows are measured in a process of their own, which is replaced where it hangs or where an error leaves its GPU unusable.
The results are written after each row, so that what is there stays whatever happens to the next one.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyllm import ops
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cuda, triton

from . import gpu_launch, gpu_models, gpu_operators, gpu_report, gpu_timing, machine, proven, report
from .gpu_row import BACKENDS, CUDA, TRITON, WALL, Function, GpuRow, Source
from .harness import BYTES, Case, Provider, check
from .timing import format_time, take_turns

NO_GPU, OUT_OF_TIME = "no GPU", "out of time"
NOT_BUILT, NOT_INSTALLED, NOT_SERVED = "not built", "not installed", "not served"
LEFT_OUT_OF_QUICK = {gpu_operators.FLEX: "left out of a quick run"}  # it compiles for long
ROW_LIMIT_S = 100.0  # compiling included
SILENCE_LIMIT_S = 45.0  # of one provider
START_LIMIT_S = 90.0
ROUNDS, QUICK_ROUNDS = 20, 7
MOST_SETS = 12

Entries = list[dict[str, Any]]  # as in pytest-benchmark's JSON, or with "failed" instead of statistics


def rows(source: Source, small: bool = False) -> list[GpuRow]:
    """All rows, those of the short table first. `small`: of sizes for a processor, to try the rows out."""

    def cut(size: int, most: int) -> int:
        return min(size, most) if small else size

    found = [*gpu_operators.rows(source, cut), *gpu_models.rows(source, cut), *gpu_launch.rows(source, cut)]
    # What there is a goal for comes first, and of each section something before any has all: time may run out.
    ranks: Counter[tuple[str, bool, bool]] = Counter()
    order = []
    for row in found:
        kind = row.section, not row.goals, not row.headline
        order.append((*kind[1:], ranks[kind]))
        ranks[kind] += 1
    return [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


# ---- One row


def measure(
    row: GpuRow, device: str, rounds: int, skip: Mapping[str, str], tell: Callable[[str], None] = lambda _: None
) -> Entries:
    """What each provider of a row takes, or why that is not known.

    Args:
        skip: provider -> why it is left out.
        tell: is told whose turn it is to be verified.
    """
    torch.compiler.reset()
    built = row.build()
    if device == "cuda":
        skip = {**{name: why for name in built.providers if (why := absent(row, name)) is not None}, **skip}
    case = _without(built, skip)
    del built
    contexts = {name: _backend_of(row, name, device) for name in case.providers}
    forced = {name: _inside(contexts[name], provider, partial(tell, name)) for name, provider in case.providers.items()}
    errors, failures = check(row, Case(forced, case.exact))
    failed = {**skip, **{name: _text(failure) for name, failure in failures.items()}}
    # What is read from memory must come from there; models and products are no matter of the cache.
    count = min(MOST_SETS, _sets(row.work)) if row.unit == BYTES and row.work and device == "cuda" else 1
    cases = [case, *(_without(row.build(), failed) for _ in range(count - 1))]
    calls: dict[str, Function] = {}
    peaks: dict[str, int | None] = {}
    for name in errors:
        try:
            rotation = gpu_timing.Rotation([each.providers[name].call for each in cases])
            with contexts[name]():
                for _ in cases:
                    rotation()
                peaks[name] = gpu_timing.peak_bytes(case.providers[name].call)
            calls[name] = rotation
        except Exception as failure:
            failed[name] = _text(failure)
    of_calls = {calls[name]: contexts[name] for name in calls}

    def turns(clock: Any, most_calls: int | None) -> tuple[int, dict[str, list[float]]]:
        return take_turns(calls, 0.0, rounds, clock=gpu_timing.inside(clock, of_calls), most_calls=most_calls)

    on_wall = row.clock == WALL or device != "cuda"
    most = None if row.clock == WALL else gpu_timing.MOST_CALLS
    per_round, times = turns(gpu_timing.wall_clock if on_wall else gpu_timing.DeviceClock(), most) if calls else (0, {})
    busy: dict[str, list[float]] = {}
    if row.shows_gpu_time and calls and device == "cuda":
        busy = turns(gpu_timing.DeviceClock(), gpu_timing.MOST_CALLS)[1]
    entries: Entries = []
    for name in dict.fromkeys([*row.providers, *case.providers, *skip]):
        facts = {**row.facts(), "provider": name, "other_load_cores": None}
        if name in calls:
            facts |= {"error": errors[name], "calls_per_round": per_round, "peak_bytes": peaks[name]}
            facts |= {"gpu_s": gpu_timing.statistics_of(busy[name])["median"]} if name in busy else {}
            entries.append({"extra_info": facts, "stats": gpu_timing.statistics_of(times[name])})
        elif name in failed:
            entries.append({"extra_info": {**facts, "failed": failed[name]}})
    return entries


def absent(row: GpuRow, provider: str) -> str | None:
    """In a word, why a provider cannot run at all: its kernels are not there, or none of them serves the operators."""
    ours = provider.split(", ")[0]  # of a part
    if ours not in BACKENDS or not row.operators:
        return None
    if ours == CUDA and cuda.why_not is not None:
        return NOT_BUILT
    if ours == TRITON and triton.why_not is not None:
        return NOT_INSTALLED
    served = (dispatch.unavailable(BACKENDS[ours], operator, "cuda", row.dtype) is None for operator in row.operators)
    return None if all(served) else NOT_SERVED


def _backend_of(row: GpuRow, provider: str, device: str) -> Function:
    """Makes the context that a provider must be called in: its kernels, and no others."""
    if device != "cuda" or provider not in BACKENDS or not row.operators:
        return nullcontext
    return lambda: ops.backend(BACKENDS[provider], *row.operators)


def _inside(
    context: Callable[[], AbstractContextManager[None]], provider: Provider, tell: Callable[[], None]
) -> Provider:
    def call() -> Any:
        tell()
        with context():
            return provider.call()

    return Provider(call, provider.normal_form)


def _without(case: Case, left_out: Mapping[str, str]) -> Case:
    return Case({name: provider for name, provider in case.providers.items() if name not in left_out}, case.exact)


def _sets(row_bytes: float) -> int:
    """So many sets of inputs are three times as large as the cache."""
    return 1 + int(3 * torch.cuda.get_device_properties(0).L2_cache_size / row_bytes)


def _text(failure: BaseException) -> str:
    if isinstance(failure, RuntimeError) and str(failure).startswith("the forced backend"):
        return NOT_SERVED
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


def not_measured(row: GpuRow, reason: str) -> Entries:
    facts = {**row.facts(), "other_load_cores": None, "failed": f"not measured: {reason}"}
    return [{"extra_info": {**facts, "provider": name}} for name in row.ours]


# What CUDA calls errors after which a process cannot use its GPU any more, in PyTorch's and in our own kernels' words.
_FATAL = (
    "CUDA error",
    "Triton Error [CUDA]",
    "an illegal memory access",
    "an illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "hardware stack error",
    "invalid program counter",
)


def _is_fatal(text: str) -> bool:
    """Whether the process cannot use its GPU any more."""
    return any(words in text for words in _FATAL) and "out of memory" not in text


# ---- The process that measures


class Turn(NamedTuple):
    """What that process says while it measures: who is next."""

    provider: str


class Silent(NamedTuple):
    """That a provider did not come to an end: a kernel that waits for ever, say."""

    provider: str
    text: str


def _work(connection: Any, seed: int, rounds: int) -> None:
    """Answers requests: None for the ceilings, or a row's name and whom to skip."""
    by_name = {row.name: row for row in rows(Source("cuda", seed))}
    while True:
        request = connection.recv()
        try:
            if request is None:
                answer: Any = gpu_timing.ceilings()
            else:
                name, skip = request
                answer = measure(by_name[name], "cuda", rounds, skip, lambda who: connection.send(Turn(who)))
        except Exception as failure:
            answer = _text(failure)
        connection.send(answer)
        gc.collect()
        if not (isinstance(answer, str) and _is_fatal(answer)):
            torch.cuda.empty_cache()


class Worker:
    """That process, started when it is needed."""

    def __init__(self, seed: int, rounds: int) -> None:
        self._arguments = seed, rounds
        self._process: Any = None

    def ask(self, request: Any, limit_s: float) -> Any:
        """Its answer; text, or who was silent for too long, if it has none."""
        silence_s, provider = SILENCE_LIMIT_S, ""
        if self._process is None:
            # Compiling processes of torch.compile's would outlive a killed one, and disturb the clock on the wall.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
            limit_s += START_LIMIT_S
            silence_s += START_LIMIT_S
        deadline = time.monotonic() + limit_s
        try:
            self._connection.send(request)
            while self._connection.poll(max(0.0, min(silence_s, deadline - time.monotonic()))):
                answer = self._connection.recv()
                if not isinstance(answer, Turn):
                    return answer
                silence_s, provider = SILENCE_LIMIT_S, answer.provider
            self.stop()
            if provider and time.monotonic() < deadline:
                return Silent(provider, f"not done in {silence_s:.0f} s")
            return f"it was not done in {limit_s:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            return f"the process ended with status {code}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def measure_all(
    chosen: Sequence[GpuRow], worker: Worker, deadline: float, left_out: Mapping[str, str] | None = None
) -> Iterator[tuple[GpuRow, Entries]]:
    """Rows as they are measured, until time.monotonic() passes `deadline`. `left_out`: provider -> why."""
    hung: dict[tuple[str, ...], str] = {}  # key -> in which row
    for row in chosen:
        skip = {name: why for name, why in (left_out or {}).items() if name in row.providers}
        for name in row.providers:
            before = hung.get(_key(row, name))
            if before is not None:
                skip[name] = f"left out, not done in {before}"
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                yield row, not_measured(row, OUT_OF_TIME)
                break
            answer = worker.ask((row.name, skip), min(ROW_LIMIT_S, left))
            if isinstance(answer, Silent) and answer.provider not in skip:
                skip[answer.provider] = answer.text
                hung[_key(row, answer.provider)] = row.name
                continue
            if isinstance(answer, (str, Silent)):
                text = answer if isinstance(answer, str) else answer.text
                if _is_fatal(text):
                    worker.stop()
                yield row, not_measured(row, text)
                break
            failed = {e["extra_info"]["provider"]: e["extra_info"].get("failed", "") for e in answer}
            culprit = next((name for name, text in failed.items() if _is_fatal(text) and name not in skip), None)
            if culprit is None:
                yield row, answer
                break
            worker.stop()  # what the providers after this one did says nothing about them: once more without it
            skip[culprit] = failed[culprit]


def _key(row: GpuRow, provider: str) -> tuple[str, ...]:
    """What rows have in common in which a provider may wait for ever."""
    return (provider, row.direction, *row.operators)


# ---- All of them


def bench(path: Path, quick: bool, only: str, seconds: float) -> None:
    """Measure, and write to `path` and pictures beside it."""
    deadline = time.monotonic() + seconds
    seed = int.from_bytes(os.urandom(3), "big")  # other numbers each time
    chosen = [row for row in rows(Source("cuda", seed)) if fnmatch(row.name.lower(), f"*{only.lower()}*")]
    facts = {**machine.describe(), "gpu": gpu_timing.describe(), "quick": quick, "seed": seed}
    entries = {row.name: not_measured(row, NO_GPU if facts["gpu"] is None else OUT_OF_TIME) for row in chosen}
    ceilings: Any = None

    def results() -> dict[str, Any]:
        return gpu_report.make_results(facts, ceilings, [entry for row in entries.values() for entry in row])

    gpu_report.save(results(), path)
    if facts["gpu"] is not None:
        worker = Worker(seed, QUICK_ROUNDS if quick else ROUNDS)
        answer = worker.ask(None, 60)
        if isinstance(answer, str):
            print(f"The ceilings are not known: {answer}", file=sys.stderr)
        else:
            ceilings = answer
        for row, found in measure_all(chosen, worker, deadline, LEFT_OUT_OF_QUICK if quick else None):
            entries[row.name] = found
            print(_progress(row, found), flush=True)
            gpu_report.save(results(), path)
        worker.stop()
    print(gpu_report.render_table(results()))
    written = [path, *gpu_report.draw_pictures(results(), path.parent)]
    print(f"Written: {', '.join(map(str, written))}")


def _progress(row: GpuRow, entries: Entries) -> str:
    shown = [
        f"{e['extra_info']['provider']} {format_time(e['stats']['median']) if 'stats' in e else '-'}" for e in entries
    ]
    return f"  {row.name:<60} {', '.join(shown)}"


def adopt(directory: Path) -> None:
    """Take measured results over; SystemExit where they are of other rows than ours, or written in another way."""
    path = directory / "bench.json"
    adopted = gpu_report.load(path)
    if adopted.get("schema") != gpu_report.SCHEMA:
        raise SystemExit(f"{path} has schema {adopted.get('schema', 1)}, not {gpu_report.SCHEMA}: measure again")
    here, there = {row.name for row in rows(Source("cuda", 0))}, {row["benchmark"] for row in adopted["rows"]}
    if here != there:
        raise SystemExit(f"{path} has other rows than there are now ({min(here ^ there)}, ...): measure again")
    gpu_report.save(adopted, gpu_report.STORED)
    gpu_report.draw_pictures(adopted, gpu_report.STORED.parent)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and the pictures there")
    parser.add_argument("--adopt", type=Path, metavar="DIR", help="measure nothing, take what DIR's bench.json says")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--seconds", type=float, default=1e9, metavar="S", help="rows that do not fit are marked as not measured"
    )
    options = parser.parse_args(arguments)
    if options.out is not None:
        bench(options.out / "bench.json", options.quick, options.only, options.seconds)
        return 0
    if options.only:
        parser.error("a part is not what the README shows: give --out")
    if options.adopt is None:
        bench(gpu_report.STORED, options.quick, options.only, options.seconds)
    else:
        adopt(options.adopt)
    if report.README.exists():
        gpu_report.update_readme()
        proven.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
