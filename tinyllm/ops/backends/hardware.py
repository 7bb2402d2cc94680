"""Which GPU kernels have run on which chips, from the benchmarks' committed results."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

# What the results call the two families of kernels.
_PROVIDERS = {"cuda": "CUDA C++", "triton": "Triton"}


def proven(operator: str, backend: str) -> list[int]:
    """Return the major compute capabilities of the chips on which a backend's kernels of an operator were measured,
    which benchmarks/gpu_check.sh does only where their results are right."""
    return sorted(major for major, found in _measured() if found == (operator, backend))


def remark(operator: str, backend: str) -> str | None:
    """Return what is to be said of a backend's kernels of an operator: nothing where they have run on such GPUs as this
    machine has, or, where it has none, on some."""
    if backend not in _PROVIDERS:
        return None
    majors = proven(operator, backend)
    here = {torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())}
    if not majors:
        return "not proven on hardware"
    if here:
        missing = sorted(here - set(majors))
        return f"not proven on hardware of compute capability {_numbers(missing)}" if missing else None
    return f"proven on hardware of compute capability {_numbers(majors)}"


def _numbers(majors: list[int]) -> str:
    return ", ".join(f"{major}.x" for major in majors)


@functools.cache
def _measured() -> frozenset[tuple[int, tuple[str, str]]]:
    """What `measured_in` finds in the committed results, which are installed with the package."""
    try:
        text = (resources.files("tinyllm.benchmarks") / "results" / "gpu.json").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):  # in a source tree that was not installed
        return frozenset()
    return measured_in(json.loads(text))


def measured_in(results: Mapping[str, Any]) -> frozenset[tuple[int, tuple[str, str]]]:
    """Return (major compute capability, (operator, backend)) of every row of results that was measured."""
    if results["gpu"] is None:
        return frozenset()
    major = int(results["gpu"]["capability"].split(".")[0])
    return frozenset(
        (major, (operator, backend))
        for row in results["rows"]
        for backend, provider in _PROVIDERS.items()
        if row["provider"] == provider and "failed" not in row
        for operator in row.get("operators", ())
    )
