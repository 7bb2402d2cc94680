"""The machine that benchmarks run on: what it is, how busy, and its ceilings, measured with plain PyTorch."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tinyllm
from tinyllm._internal.cpus import usable_cpus

from .measure import DeviceClock

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
    """Return machine, versions, commit, date and allocator settings, as JSON types."""
    cpu = tinyllm.info()["cpu"]
    return {
        "machine": {
            "family": family(_cpuinfo()),
            "processor": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
            "cores": usable_cpus(),
            "threads": torch.get_num_threads(),
            "isa": cpu["chosen_isa"],
            "memory_gib": _memory_gib(),
            "cache_mib": last_level_cache_mib(),
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


def family(cpuinfo: dict[str, str]) -> str:
    """Return the name of a processor's family, by which results are stored: vendor and widest vectors, such as
    "amd-avx2", "amd-avx512" or "intel-avx512".

    Args:
        cpuinfo: what Linux says of a processor, see /proc/cpuinfo; a processor that says neither is named after its
            model or its architecture, such as "aarch64".
    """
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(cpuinfo.get("vendor_id", ""))
    flags = set(cpuinfo.get("flags", "").split())
    vectors = next((name for name, flag in (("avx512", "avx512f"), ("avx2", "avx2")) if flag in flags), "scalar")
    return f"{vendor}-{vectors}" if vendor else slug(cpuinfo.get("model name") or platform.machine())


def slug(name: str) -> str:
    """Return a name as files are called: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def describe_gpu() -> dict[str, Any] | None:
    """Return what the GPU is and what belongs to it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


# So many cores in use by others spoil a measurement.
DISTURBED = 0.1


class OtherLoad:
    """Measure of how busy other programs, and on a virtual machine other guests, keep the processor.

    Args:
        child: the id of a process that is not another program, though it has not ended.
    """

    def __init__(self, child: int | None = None) -> None:
        self._child = child
        self._start = self._readings()

    def cores(self) -> float | None:
        """Return the cores in use by others, on average; None where the system does not tell."""
        now = self._readings()
        if self._start is None or now is None:
            return None
        busy, own, wall = (new - old for new, old in zip(now, self._start, strict=True))
        return max(0.0, (busy - own) / wall)

    def _readings(self) -> tuple[float, float, float] | None:
        """Return the processor time of all, that of this process and its children that have ended, and the clock's."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
            child = "" if self._child is None else Path(f"/proc/{self._child}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        ticks: int = os.sysconf("SC_CLK_TCK")
        # Behind the name, which may hold spaces: utime and stime are the 12th and the 13th.
        own = sum(os.times()[:4]) + sum(map(int, child.rpartition(")")[2].split()[11:13])) / ticks
        return (user + nice + system + irq + softirq + steal) / ticks, own, time.monotonic()


def ceilings(quick: bool = False, attempts: int = 5) -> dict[str, Any]:
    """Measure the rates that the tables' percentages are of, again while other programs are busy: they would make every
    fraction of them too large. The least disturbed attempt counts.

    Args:
        quick: measure once, in about a second.
        attempts: so often at most.

    Returns:
        gemm_gflops: dtype -> the best of `a @ b` at 1024^3 and 2048^3. For bfloat16 it is not below float32's: a
            kernel may convert what it loads.
        copy_gb_per_s: bytes read and written, the best of several ways to copy arrays much larger than the caches.
    """
    seconds = 0.2 if quick else 1.0
    least, found = math.inf, {}
    for _ in range(1 if quick else attempts):
        others = OtherLoad()
        gemm = {"float32": _gemm_gflops(torch.float32, seconds)}
        gemm["bfloat16"] = max(gemm["float32"], _gemm_gflops(torch.bfloat16, seconds))
        measured = {"gemm_gflops": gemm, "copy_gb_per_s": _copy_gb_per_s(seconds)}
        load = others.cores() or 0.0
        if load < least:
            least, found = load, measured
        if least < DISTURBED:
            break
    return found


def _gemm_gflops(dtype: torch.dtype, seconds: float) -> float:
    best = 0.0
    for size in (256, 1024, 2048):
        if best and 2 * size**3 / best / 1e9 > seconds:
            break  # bfloat16 without instructions for it is hundreds of times slower
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        best = max(best, 2 * size**3 / best_time(partial(torch.mm, a, b, out=out), seconds) / 1e9)
    return best


def _copy_gb_per_s(seconds: float) -> float:
    megabytes = max(256, 4 * round(last_level_cache_mib() or 0))
    source = torch.ones(megabytes << 18)
    target = torch.zeros_like(source)
    ways: list[Callable[[], object]] = [
        lambda: target.copy_(source),
        lambda: torch.mul(source, 2.0, out=target),
        lambda: torch.add(source, 1.0, out=target),
        lambda: torch.neg(source, out=target),
        lambda: target.numpy().__setitem__(slice(None), source.numpy()),  # NumPy's memcpy: one thread
    ]
    best = min(best_time(way, seconds) for way in ways)
    return 2 * source.nbytes / best / 1e9


def best_time(call: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of a call in about `seconds`: a ceiling is what the machine can do undisturbed."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def gpu_ceilings() -> dict[str, Any]:
    """Measure a GPU's rates as `ceilings` does the CPU's: products of 8192^3, and a copy of 4 GiB, read and written; of
    random data, because zeros are faster. float32 is without TF32, PyTorch's default."""
    clock = DeviceClock()

    def median_s(call: Callable[[], object]) -> float:
        clock(call, 3)
        return median(clock(call, 3) / 3 for _ in range(9))

    size, gemm = 8192, {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        gemm[str(dtype).removeprefix("torch.")] = 2 * size**3 / median_s(partial(torch.mm, a, b, out=out)) / 1e9
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    return {"gemm_gflops": gemm, "copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9}


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first processor; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): " ".join(value.split()) for name, _, value in pairs}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def last_level_cache_mib() -> float | None:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) / 1024)
    return max(sizes, default=None)


def _commit() -> str | None:
    """Return the commit, with "+changes" if the sources differ from it; outside a repository, TINYLLM_COMMIT."""
    told = os.environ.get("TINYLLM_COMMIT") or None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (ROOT / "pyproject.toml").exists():
        return told  # an installed package, in whosever repository that may lie
    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return told
