"""Memory that this process may still allocate, on a CPU or a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Room:
    """Bytes of memory: what may be allocated without moving other programs' memory out, and what there is in all."""

    available: int
    total: int


def memory(device: torch.device) -> Room | None:
    """Return how much memory `device` has for this process; None if nobody knows.

    For a CPU that is the system's, swap included, within the limits of the control groups (containers, batch systems)
    and of the process (`ulimit -v`).
    """
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return Room(available, total)
    known = [room for room in (_system_memory(), *_group_memory(), _process_memory()) if room is not None]
    if not known:
        return None
    return Room(max(0, min(room.available for room in known)), min(room.total for room in known))


def _system_memory() -> Room | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)}
        swap = found.get("SwapTotal", 0)
        total = found["MemTotal"] + swap
        free = found.get("MemAvailable", found["MemTotal"]) + found.get("SwapFree", swap)
        return Room(free, total)
    except (OSError, KeyError, ValueError):  # not Linux: nobody says what is free, so it is all that there is
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
        return Room(total, total)


def _group_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Room]:
    """Yield the limits of the control groups that this process is in, from its own up to the outermost it can see."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in lines:
        if controllers == "":  # version 2
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / name.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (room := _limit(folder, limit, usage)) is not None:
                yield room


def _limit(group: Path, limit: str, usage: str) -> Room | None:
    try:
        total = int((group / limit).read_text())
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or no limit: "max"
        return None
    # Given back when needed. In version 1 the numbers with "total_" are those of the groups below, too.
    given = [stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file")]
    used -= sum(map(int, [*given, stat.get("slab_reclaimable", 0)]))
    return Room(total - max(0, used), total)


def _process_memory() -> Room | None:
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return None
    if most == resource.RLIM_INFINITY:
        return None
    free = most - pages * resource.getpagesize()
    return Room(free, free)  # what the program takes itself it never gives back
