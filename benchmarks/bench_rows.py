"""The rows of a CPU as tests of pytest-benchmark:

    pytest benchmarks/bench_rows.py                          all of them
    pytest benchmarks/bench_rows.py -k "layer_norm and forward" --benchmark-max-time=0.1
    pytest benchmarks/bench_rows.py --benchmark-save=before, and later --benchmark-compare

pytest-benchmark times tinyllm. After each of its rounds every peer has its turn, on the same inputs and by the same
clock, so that a machine that slows down for a while slows all of them. A line for each row shows all times, which are
also in `extra_info["peers"]`. `--benchmark-max-time` is about how long each side runs.
"""

from __future__ import annotations

import os
from statistics import median
from typing import Any

# Before torch reads it: torch.compile's worker processes would still be starting while the first rows are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from tinyllm import ops
from tinyllm.ops import _products

from .machine import OtherLoad
from .measure import Turns, no_collection, plan, statistics_of, verify
from .row import OURS, Row, Target
from .rows import rows
from .tables import format_time


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows(Target(gpu=False))])
def test_row(
    row: Row,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    if row.section == "linear":  # our kernel, even where the operator would leave the product to PyTorch
        monkeypatch.setattr(_products, "_setting", "cpp")
    torch.compiler.reset()  # no guards of earlier rows in front of this one's code
    with ops.backend("cpp"):  # an error rather than a silent comparison of PyTorch with itself
        case = row.build()
        errors = verify(row, case)
    calls = {name: provider.call for name, provider in case.providers.items()}
    ours = calls[OURS]
    rounds, iterations = plan(calls, float(pytestconfig.getoption("benchmark_max_time")))
    peers = Turns({name: call for name, call in calls.items() if name != OURS}, iterations)
    others = OtherLoad()
    with no_collection():
        benchmark.pedantic(ours, rounds=rounds, iterations=iterations, teardown=peers.round)
    if not benchmark.enabled:  # --benchmark-disable: the row was verified
        return
    benchmark.extra_info.update(
        row.facts(),
        error=errors[OURS],
        calls_per_round=iterations,
        other_load_cores=others.cores(),
        peers={name: {"error": errors[name], **statistics_of(times)} for name, times in peers.times.items()},
    )
    seconds = {OURS: benchmark.stats.stats.median} | {name: median(times) for name, times in peers.times.items()}
    with capsys.disabled():
        print(f"\n  {row.name:<60} " + "  ".join(f"{name} {format_time(s)}" for name, s in seconds.items()), end=" ")
