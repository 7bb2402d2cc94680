"""Rows, and results of rows, that nobody has measured."""

from __future__ import annotations

import copy
import json
from typing import Any

from benchmarks import report
from benchmarks.row import BACKWARD, BYTES, COMPILED, EAGER, FLOPS, FORWARD, OURS, Case, Row

FACTS: dict[str, Any] = {
    "machine": {
        "family": "abacus",
        "processor": "Abacus",
        "cores": 2,
        "threads": 1,
        "isa": "beads",
        "memory_gib": 0.5,
        "cache_mib": None,
    },
    "versions": {"tinyllm": "0", "torch": "1", "python": "2", "system": "Desk"},
    "commit": "c0ffee",
    "date": "2000-01-01T00:00:00+00:00",
    "allocator": {},
    "quick": False,
}
CEILINGS = {"gemm_gflops": {"float32": 100.0, "bfloat16": 400.0}, "copy_gb_per_s": 10.0}
TIMES = {OURS: 0.1, EAGER: 0.4, COMPILED: 0.2}


def a_row(**changes: Any) -> Row:
    options = {"section": "attention", "operation": "an operation", "direction": FORWARD, "shape": "4x4", "work": 2e9}
    return Row(**{**options, "unit": FLOPS, "build": lambda: Case({}, tuple), **changes})


def a_norm(**changes: Any) -> Row:
    options = {"section": "layer_norm", "operation": "a norm", "direction": BACKWARD, "shape": "2x2", "work": 3e8}
    return a_row(**{**options, "unit": BYTES, **changes})


def measured(row: Row, provider: str, median: float) -> dict[str, Any]:
    numbers = {"rounds": 7, "median_s": median, "iqr_s": median / 10, "calls_per_round": 3, "error": 0.0}
    return {**row.facts(), "provider": provider, "other_load_cores": 0.05, **numbers}


def results_of(*rows: dict[str, Any], facts: dict[str, Any] = FACTS, **options: Any) -> dict[str, Any]:
    """Return results, as they are read from a file."""
    return json.loads(json.dumps(report.make_results(copy.deepcopy(facts), CEILINGS, rows, **options)))
