"""On which GPUs which kernels have run, which `tinyllm info` tells: the results themselves are not installed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllm._internal.files import write_text
from tinyllm.ops.backends import hardware

from .row import BACKENDS


def proven(measurements: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Return the operators that were measured, which is done only where their results are right, as a dictionary from
    major compute capability to backend to operators."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for results in measurements:
        major = results["gpu"]["capability"].split(".")[0]
        for row in results["rows"]:
            backend = BACKENDS.get(row["provider"])
            if backend and "failed" not in row and row.get("operators"):
                found[major][backend].update(row["operators"])
    return {
        major: {backend: sorted(operators) for backend, operators in sorted(backends.items())}
        for major, backends in sorted(found.items(), key=lambda item: int(item[0]))
    }


def write(measurements: Iterable[Mapping[str, Any]]) -> None:
    """Write what results prove beside tinyllm.ops.backends.hardware, with which it is installed."""
    write_text(hardware.PROVEN, json.dumps(proven(measurements), indent=1) + "\n")
