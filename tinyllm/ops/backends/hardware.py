"""On which GPUs the GPU kernels have run, as the project's benchmarks found."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

PROVEN = Path(__file__).with_name("proven.json")  # which `python -m benchmarks.report` writes


def proven(operator: str, backend: str) -> list[int]:
    """Return the major compute capabilities of the GPUs on which a backend's kernels of an operator were measured and
    gave right results."""
    return sorted(int(major) for major, backends in _measured().items() if operator in backends.get(backend, ()))


def remark(operator: str, backend: str) -> str | None:
    """Return on which GPUs a backend's kernels of an operator have run or have not, or None where they have run on all
    families of GPU that this machine has."""
    if backend not in ("cuda", "triton"):
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
def _measured() -> dict[str, dict[str, list[str]]]:
    """Return operators by major compute capability and backend."""
    return dict(json.loads(PROVEN.read_text(encoding="utf-8")))
