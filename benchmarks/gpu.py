"""Every operator on an NVIDIA GPU against the best peers there:

    python -m benchmarks.gpu               everything, into benchmarks/results/gpu/, the page and the README
    python -m benchmarks.gpu --out DIR     everything, into DIR/gpu.json

Rows are measured in a process of their own, which is replaced where it hangs or where an error leaves its GPU unusable.
With --out the results are written after each row, so that what is there stays whatever happens to the next one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyllm import ops
from tinyllm.ops import dispatch

from . import machine, measure, report
from .row import BACKENDS, BYTES, Case, Function, Provider, Row, Target
from .rows import rows
from .rows.attention import FLEX
from .tables import format_time

NO_GPU, OUT_OF_TIME = "no GPU", "out of time"
LEFT_OUT_OF_QUICK = {FLEX: "left out of a quick run"}  # it compiles for long
SILENCE_LIMIT_S = 45.0  # of one provider, compiling included
START_LIMIT_S = 90.0
ROUNDS, QUICK_ROUNDS = 20, 7
MOST_SETS = 12

Entries = list[dict[str, Any]]  # the facts of a row and a provider's times, or with "failed" instead of these


# ---- One row


def measure_row(
    row: Row, device: str, rounds: int, skip: Mapping[str, str], tell: Callable[[str], None] = lambda _: None
) -> Entries:
    """Return what each provider of a row takes, or why that is not known.

    Args:
        row: on a GPU, or on a CPU to try the row out.
        device: "cuda" or "cpu".
        rounds: so many rounds are timed.
        skip: provider -> why it is left out.
        tell: is told whose turn it is to be verified.
    """
    torch.compiler.reset()
    on_gpu = device == "cuda"
    built = row.build()
    left_out = {**(_unserved(row, built) if on_gpu else {}), **skip}
    skip = {name: why for name, why in left_out.items() if name in built.providers}
    case = built.without(skip)
    del built
    contexts = {name: _backend_of(row, name) if on_gpu else nullcontext for name in case.providers}
    forced = {name: _forced(contexts[name], side, partial(tell, name)) for name, side in case.providers.items()}
    errors, failures = measure.check(row, Case(forced, case.exact))
    failed = {**skip, **{name: _text(failure) for name, failure in failures.items()}}
    # What is read from memory must come from there; models and products are no matter of the cache.
    count = min(MOST_SETS, _sets(row.work)) if row.unit == BYTES and row.work and on_gpu else 1
    cases = [case, *(row.build().without(failed) for _ in range(count - 1))]
    calls: dict[str, Function] = {}
    peaks: dict[str, int | None] = {}
    for name in errors:
        try:
            rotation = measure.Rotation([each.providers[name].call for each in cases])
            with contexts[name]():
                for _ in cases:
                    rotation()
                peaks[name] = measure.peak_bytes(case.providers[name].call)
            calls[name] = rotation
        except Exception as failure:
            failed[name] = _text(failure)
    of_calls = {calls[name]: contexts[name] for name in calls}

    def turns(on_wall: bool) -> tuple[int, dict[str, list[float]]]:
        clock = measure.inside(measure.wall_clock if on_wall else measure.DeviceClock(), of_calls)
        most = sys.maxsize if on_wall else measure.MOST_CALLS
        return measure.take_turns(calls, 0.0, rounds, clock, most) if calls else (0, {})

    per_turn, times = turns(row.on_wall or not on_gpu)
    busy = turns(on_wall=False)[1] if row.shows_gpu_time and on_gpu else {}
    entries: Entries = []
    for name in dict.fromkeys([*case.providers, *failed]):
        facts = {**row.facts(), "provider": name, "other_load_cores": None}
        if name in calls:
            facts |= {"error": errors[name], "calls_per_round": per_turn, "peak_bytes": peaks[name]}
            facts |= {"gpu_s": measure.statistics_of(busy[name])["median_s"]} if name in busy else {}
            entries.append({**facts, **measure.statistics_of(times[name])})
        else:
            entries.append({**facts, "failed": failed[name]})
    return entries


def _unserved(row: Row, case: Case) -> dict[str, str]:
    """Return why providers of ours, and parts of them, cannot run at all."""
    found = {}
    for name in case.providers:
        backend = BACKENDS.get(name.split(", ")[0])
        for operator in row.operators if backend else ():
            why = dispatch.unavailable(str(backend), operator, "cuda", row.dtype)
            if why is not None:
                found[name] = why
    return found


def _backend_of(row: Row, provider: str) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes the context that a provider must be called in: its kernels, and no others."""
    if provider not in BACKENDS or not row.operators:
        return nullcontext
    return lambda: ops.backend(BACKENDS[provider], *row.operators)


def _forced(
    context: Callable[[], AbstractContextManager[None]], provider: Provider, tell: Callable[[], None]
) -> Provider:
    def call() -> Any:
        tell()
        with context():
            return provider.call()

    return Provider(call, provider.normal_form)


def _sets(row_bytes: float) -> int:
    """Return how many sets of inputs are three times as large as the cache."""
    return 1 + int(3 * torch.cuda.get_device_properties(0).L2_cache_size / row_bytes)


def _text(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


def not_measured(row: Row, reason: str) -> Entries:
    facts = {**row.facts(), "other_load_cores": None, "failed": f"not measured: {reason}"}
    return [{**facts, "provider": name} for name in row.ours]


# ---- The process that measures


class Lost(NamedTuple):
    """The worker was lost, and whose turn it was: by a kernel that does not end, or one that ruined its GPU."""

    provider: str
    why: str


def _work(connection: Any, seed: int, rounds: int) -> None:
    """Answer requests: None for the ceilings, or a row's name and whom to skip. Ends when its GPU is lost."""
    by_name = {row.name: row for row in rows(Target(gpu=True, seed=seed))}
    while True:
        request = connection.recv()
        try:
            if request is None:
                answer: Any = machine.gpu_ceilings()
            else:
                name, skip = request

                def tell(provider: str) -> None:
                    torch.cuda.synchronize()  # an error of the provider before is not this one's
                    connection.send(provider)

                answer = measure_row(by_name[name], "cuda", rounds, skip, tell)
            torch.cuda.synchronize()
        except Exception as failure:
            answer = Lost("", _text(failure))
        connection.send(answer)
        gc.collect()
        torch.cuda.empty_cache()


class Worker:
    """A process that is started when it is needed."""

    def __init__(self, seed: int, rounds: int) -> None:
        self._arguments = seed, rounds
        self._process: Any = None

    def ask(self, request: Any, deadline: float) -> Any:
        """Return its answer, or a Lost. `deadline`: of time.monotonic()."""
        limit_s, provider = SILENCE_LIMIT_S, ""
        if self._process is None:
            # Compiling processes of torch.compile's would outlive a killed one, and disturb the clock on the wall.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
            limit_s += START_LIMIT_S
        try:
            self._connection.send(request)
            while self._connection.poll(max(0.0, min(limit_s, deadline - time.monotonic()))):
                answer = self._connection.recv()
                if not isinstance(answer, str):
                    return answer if not isinstance(answer, Lost) else self._lost(provider, answer.why)
                limit_s, provider = SILENCE_LIMIT_S, answer
            if time.monotonic() >= deadline:
                return self._lost("", OUT_OF_TIME)
            return self._lost(provider, f"not done in {limit_s:.0f} s")
        except (EOFError, OSError):
            self._process.join(5)
            return self._lost(provider, f"the process ended with status {self._process.exitcode}")

    def _lost(self, provider: str, why: str) -> Lost:
        self.stop()
        return Lost(provider, why)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def measure_all(
    chosen: Sequence[Row], worker: Worker, deadline: float, left_out: Mapping[str, str] | None = None
) -> Iterator[tuple[Row, Entries]]:
    """Yield rows as they are measured, until time.monotonic() passes `deadline`. A provider that loses the worker is
    left out of its row, and of those that have its direction and operators in common.

    Args:
        left_out: provider -> why it is left out from the beginning.
    """
    lost: dict[tuple[str, ...], dict[str, str]] = {}
    for row in chosen:
        skip = {**(left_out or {}), **lost.get((row.direction, *row.operators), {})}
        while True:
            left = deadline - time.monotonic()
            answer = worker.ask((row.name, skip), deadline) if left > 0 else Lost("", OUT_OF_TIME)
            if not isinstance(answer, Lost):
                yield row, answer
                break
            if not answer.provider or answer.provider in skip:
                yield row, not_measured(row, answer.why)
                break
            skip[answer.provider] = answer.why
            common = lost.setdefault((row.direction, *row.operators), {})
            common[answer.provider] = f"left out, {answer.why} in {row.name}"


# ---- All of them


def bench(out: Path | None, quick: bool, only: str, seconds: float) -> int:
    """Measure, print the table, write what there is to write; return the exit status."""
    deadline = time.monotonic() + seconds
    seed = int.from_bytes(os.urandom(3), "big")  # other numbers each time
    chosen = [row for row in rows(Target(gpu=True, seed=seed)) if fnmatch(row.name.lower(), f"*{only.lower()}*")]
    gpu = machine.describe_gpu()
    facts = {**machine.describe(), "gpu": gpu, "quick": quick, "only": only or None, "seed": seed}
    entries = {row.name: not_measured(row, NO_GPU if gpu is None else OUT_OF_TIME) for row in chosen}
    ceilings: Any = None

    def results() -> dict[str, Any]:
        return report.make_results(facts, ceilings, [entry for row in entries.values() for entry in row])

    if gpu is not None:
        worker = Worker(seed, QUICK_ROUNDS if quick else ROUNDS)
        answer = worker.ask(None, deadline)
        if isinstance(answer, Lost):
            print(f"The ceilings are not known: {answer.why}", file=sys.stderr)
        else:
            ceilings = answer
        for row, found in measure_all(chosen, worker, deadline, LEFT_OUT_OF_QUICK if quick else None):
            entries[row.name] = found
            times = [f"{e['provider']} {format_time(e['median_s'])}" for e in found if report.is_measured(e)]
            print(f"  {row.name:<60} {', '.join(times)}", flush=True)
            if out is not None:
                report.save(results(), out)
        worker.stop()
    print(report.render_tables(results()))
    if gpu is None and out is None:
        print("There is no GPU; nothing was written.", file=sys.stderr)
        return 2
    report.publish(results(), out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = report.parser_of("gpu", __doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=1e9, metavar="S", help="rows that do not fit are marked as not measured"
    )
    options = parser.parse_args(arguments)
    return bench(options.out, options.quick, options.only, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
