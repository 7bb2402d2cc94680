"""The machine that benchmarks run on: what it is, how busy, and its ceilings, measured with plain PyTorch."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tinyllm

ROOT = Path(__file__).parents[1]

# What decides whether large blocks go back to the kernel, and so how many pages each allocation faults in.
ALLOCATOR_VARIABLES = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def describe() -> dict[str, Any]:
    """Machine, versions, commit, date and allocator settings, as JSON types."""
    cpu = tinyllm.info()["cpu"]
    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": cpu["chosen_isa"],
            "memory_gib": _memory_gib(),
            "cache_mib": _last_level_cache_mib(),
        },
        "versions": {
            "tinyllm": tinyllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "allocator": {
            # A preloaded allocator is named, but where it lies is nobody's business.
            name: Path(os.environ[name]).name if name == "LD_PRELOAD" else os.environ[name]
            for name in ALLOCATOR_VARIABLES
            if name in os.environ
        },
    }


# So many cores in use by others spoil a measurement.
DISTURBED = 0.1


class OtherLoad:
    """How busy other programs, and on a virtual machine other guests, keep the processor from now on."""

    def __init__(self) -> None:
        self._start = self._readings()

    def cores(self) -> float | None:
        """Cores in use by others, on average; None where the system does not tell."""
        now = self._readings()
        if self._start is None or now is None:
            return None
        busy, own, wall = (new - old for new, old in zip(now, self._start, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _readings() -> tuple[float, float, float] | None:
        """Seconds of processor time: of all, of this process and its children that have ended, and of the clock."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        ticks: int = os.sysconf("SC_CLK_TCK")
        return (user + nice + system + irq + softirq + steal) / ticks, sum(os.times()[:4]), time.monotonic()


def ceilings(quick: bool = False) -> dict[str, Any]:
    """The rates that the tables' percentages are of.

    Args:
        quick: about a second in all.

    Returns:
        gemm_gflops: dtype -> the best of `a @ b` at 1024^3 and 2048^3. For bfloat16 it is not below float32's: a
            kernel may convert what it loads.
        copy_gb_per_s: bytes read and written, the best of several ways to copy arrays much larger than the caches.
    """
    seconds = 0.2 if quick else 1.0
    gemm = {"float32": _gemm_gflops(torch.float32, seconds)}
    gemm["bfloat16"] = max(gemm["float32"], _gemm_gflops(torch.bfloat16, seconds))
    return {"gemm_gflops": gemm, "copy_gb_per_s": _copy_gb_per_s(seconds)}


def _gemm_gflops(dtype: torch.dtype, seconds: float) -> float:
    best = 0.0
    for size in (256, 1024, 2048):
        if best and 2 * size**3 / best / 1e9 > seconds:
            break  # bfloat16 without instructions for it is hundreds of times slower
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        best = max(best, 2 * size**3 / _best_time(partial(torch.mm, a, b, out=out), seconds) / 1e9)
    return best


def _copy_gb_per_s(seconds: float) -> float:
    megabytes = max(256, 4 * round(_last_level_cache_mib() or 0))
    source = torch.ones(megabytes << 18)
    target = torch.zeros_like(source)
    ways: list[Callable[[], object]] = [
        lambda: target.copy_(source),
        lambda: torch.mul(source, 2.0, out=target),
        lambda: torch.add(source, 1.0, out=target),
        lambda: torch.neg(source, out=target),
        lambda: target.numpy().__setitem__(slice(None), source.numpy()),  # NumPy's memcpy: one thread
    ]
    best = min(_best_time(way, seconds) for way in ways)
    return 2 * source.nbytes / best / 1e9


def _best_time(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, within about `seconds` of them: a ceiling is what the machine can do undisturbed."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _last_level_cache_mib() -> float | None:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) / 1024)
    return max(sizes, default=None)


def _commit() -> str | None:
    """The commit, with "+changes" if the sources differ from it; outside a repository what TINYLLM_COMMIT says, if
    anything."""
    told = os.environ.get("TINYLLM_COMMIT") or None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (ROOT / "pyproject.toml").exists():
        return told  # an installed package, in whosever repository that may lie
    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return told
