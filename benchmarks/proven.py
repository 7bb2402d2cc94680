"""Tell `tinyllm info` on which GPUs which kernels have run, from all the results that are committed:

    python -m benchmarks.proven

The results themselves are not installed. `python -m benchmarks.gpu` does this where it changes them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllm._internal.files import write_text
from tinyllm.ops.backends import hardware

from .gpu_row import CUDA, TRITON
from .report import RESULTS

PROVIDERS = {"cuda": CUDA, "triton": TRITON}


def proven(measurements: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Return the operators that were measured, which is done only where their results are right, as a dictionary from
    major compute capability to backend to operators."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for results in measurements:
        for row in results["rows"] if results["gpu"] else ():
            major = results["gpu"]["capability"].split(".")[0]
            for backend, provider in PROVIDERS.items():
                if row["provider"] == provider and "failed" not in row and row.get("operators"):
                    found[major][backend].update(row["operators"])
    return {
        major: {backend: sorted(operators) for backend, operators in sorted(backends.items())}
        for major, backends in sorted(found.items(), key=lambda item: int(item[0]))
    }


def committed() -> dict[str, dict[str, list[str]]]:
    """Return what the committed results of all GPUs prove."""
    paths = sorted([*RESULTS.glob("gpu*.json"), *RESULTS.glob("gpu/*.json")])
    return proven(json.loads(path.read_text(encoding="utf-8")) for path in paths)


def write() -> None:
    """Write what the committed results prove beside tinyllm.ops.backends.hardware, with which it is installed."""
    write_text(hardware.PROVEN, json.dumps(committed(), indent=1) + "\n")


if __name__ == "__main__":
    write()
