"""How many CPUs this process may use, and as many threads for torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

# What a user or a launcher decided already.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LAUNCHERS = ("WORLD_SIZE", "SLURM_NTASKS")


def usable_cpus() -> int:
    """Return how many CPUs this process may use: by its affinity and by the CPU quota of its cgroups, rounded up."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on, which PYTHON_CPU_COUNT overrides
        cpus = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs' time that this process's cgroups allow it in a unit of time; None where there is no limit.

    A container gets it from `docker run --cpus` or from Kubernetes' `limits.cpu`. torch starts a thread for each CPU
    nevertheless, and all of them are stopped whenever their time together is used up.

    Args:
        root: of the file system.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota of each of the process's cgroups, and of those around it, that has one."""
    try:
        text = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        return
    base = root / "sys/fs/cgroup"
    for line in text.rstrip("\n").split("\n"):  # a name may have any other character
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, beside which version 1 may be mounted
            mounts = [base, base / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [base / "cpu", base / controllers]
        else:
            continue
        for mount in mounts:
            # A container may see the names that its cgroups have outside, and only its own cgroup, as the mount itself.
            inner = mount / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(mount):
                    yield from _quota_of(folder)


def _quota_of(cgroup: Path) -> Iterator[float]:
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (cgroup / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
            )
        found = None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return
    if found is not None:
        yield found


def limit_threads() -> None:
    """Let torch use no more threads than there are usable CPUs, unless the environment says how many."""
    import torch

    cpus = usable_cpus()
    if torch.get_num_threads() > cpus and not any(name in os.environ for name in _VARIABLES):
        torch.set_num_threads(cpus)


def share_threads(processes: int) -> None:
    """Give each of a training's processes on this machine its share of the usable CPUs, unless OMP_NUM_THREADS is set.

    The processes inherit the environment, and Lightning, which looks at no quota, leaves this variable alone. Processes
    that a launcher has bound to CPUs of their own share them with no other.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    cpus = usable_cpus()
    launched = any(name in os.environ for name in _LAUNCHERS)
    bound = launched and cpus * processes <= (os.cpu_count() or 1)
    threads = cpus if bound else max(1, cpus // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
