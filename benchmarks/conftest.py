"""pytest benchmarks/bench_*.py: options, and the fixture that runs a row when its first provider is due."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatch
from statistics import median
from typing import Any

import pytest

# Before torch reads it: torch.compile's worker processes would still be starting while the first rows are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from tinyllm.ops.backends import cpp

from .harness import Measured, Row, compare, replay
from .timing import format_time


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tinyllm benchmarks")
    group.addoption("--rows", metavar="PATTERN", help="only rows whose name contains this; * and ? match anything")
    group.addoption("--headline", action="store_true", help="only rows of the short table")
    group.addoption("--attempts", type=int, default=3, help="so often a disturbed row is timed at most (%(default)s)")
    group.addoption("--seconds", type=float, default=1.0, help="about how long each provider runs (%(default)s)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    pattern, headline = config.getoption("--rows") or "", config.getoption("--headline")
    if not pattern and not headline:
        return
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        row = (
            item.callspec.params.get("row") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        )
        matches = (
            isinstance(row, Row)
            and fnmatch(row.name.lower(), f"*{pattern.lower()}*")
            and (row.headline or not headline)
        )
        (chosen if matches else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A line with the time instead of a dot."""
    line = dict(report.user_properties).get("line")
    if line is None or report.when != "call" or not report.passed:
        return None
    return "passed", f"{line}\n", "PASSED"


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Callable[[Row], dict[str, Measured]]:
    """`compare`, whose latest result is kept: the tests of a row follow each other, and share one measurement."""
    if not cpp.loaded:
        pytest.exit(f"there are no compiled kernels to benchmark: {cpp.why_not}", returncode=3)
    options = request.config.option
    latest: dict[str, dict[str, Measured] | None] = {}

    def measure(row: Row) -> dict[str, Measured]:
        if row.name not in latest:
            latest.clear()
            latest[row.name] = None
            latest[row.name] = compare(row, options.seconds, options.attempts)
        measured = latest[row.name]
        if measured is None:
            pytest.fail("the row has failed already", pytrace=False)
        return measured

    return measure


@pytest.fixture
def report(
    benchmark: Any, measure: Callable[[Row], dict[str, Measured]], record_property: Callable[[str, object], None]
) -> Callable[[Row, str], None]:
    """`report(row, provider)`: measure the row if that is not done yet; give this provider's times to `benchmark`."""

    def report(row: Row, provider: str) -> None:
        measured = measure(row)[provider]
        record_property("line", f"  {row.name:<60} {provider:<17} {format_time(median(measured.seconds)):>8}")
        benchmark.extra_info.update(
            row.facts(),
            provider=provider,
            error=measured.error,
            calls_per_round=measured.calls,
            other_load_cores=measured.other_load,
        )
        replay(benchmark, measured)

    return report
