"""Memory and disk: what a training needs of them, what there is, and what to say before it begins with too little."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm._words import option, size
from tinyllm.estimate import PRECISIONS, Memory, estimate
from tinyllm.presets import TrainConfig

# What PyTorch's errors say when an allocation on a CPU fails, in an operator of its own and in one of ours.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "aoti_torch_empty")
_AVERAGE_BYTES = 4  # for each parameter, where the weights are averaged

Say = Callable[[str], None]


@dataclass(frozen=True)
class Room:
    """Bytes of memory: what may be allocated without moving other programs' memory out, and what there is in all."""

    available: int
    total: int


def check_memory(config: TrainConfig, vocab_size: int, device: torch.device, say: Say) -> None:
    """Compare what training takes with what is there; `say` a warning where it may be too little.

    Args:
        config: the training.
        vocab_size: the tokenizer's, or 1 while it is not known, for which less is needed.
        device: the first of those that it runs on.
        say: called with the warning.

    Raises:
        MemoryError: it is more than there is in all. What is available is no reason to refuse: a system may call
            memory used that it would give, such as the cache of some file systems.
    """
    room = memory(device)
    if room is None:
        return
    needed = _needed(config, vocab_size, device)
    parts = (
        f"weights {size(needed.weights)}, gradients {size(needed.gradients)}, optimizer {size(needed.optimizer)}, "
        f"activations {size(needed.activations)}"
    )
    if needed.total > room.total:
        raise MemoryError(
            f"training {config.preset} takes {size(needed.total)} of memory: {parts}; {device.type} has "
            f"{size(room.total)}, {size(room.available)} of it free. A smaller preset, --seq-len or --batch-size, "
            f"--micro-batches and --checkpointing take less: tinyllm estimate --preset {config.preset}"
        )
    if needed.total > room.available:
        say(
            f"Memory: about {size(needed.total)} is needed ({parts}), and {size(room.available)} is free; "
            f"{_remedy(config)}"
        )


def memory_error(
    config: TrainConfig, vocab_size: int, device: torch.device, error: BaseException
) -> MemoryError | None:
    """Return what to raise for an error of PyTorch's that means that memory has run out; None for any other."""
    if isinstance(error, MemoryError) and error.args:  # it says itself what to do
        return error
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        return None
    needed, room = _needed(config, vocab_size, device), memory(device)
    there = "" if room is None else f", {size(room.available)} is free now"
    return MemoryError(
        f"memory has run out on {device.type}: training {config.preset} takes about {size(needed.total)}{there}; "
        f"{_remedy(config)}"
    )


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


def checkpoint_bytes(config: TrainConfig, parameters: int) -> tuple[int, int]:
    """Return the size of a checkpoint and that of the weights alone, which is what a trained model is."""
    width = PRECISIONS[config.precision][0]
    averages = _AVERAGE_BYTES if config.ema is not None else 0
    # The averages are the model's weights then. AdamW keeps two numbers for each weight.
    return parameters * (3 * width + averages), parameters * (averages or width)


def check_disk(config: TrainConfig, parameters: int, out: Path, say: Say) -> None:
    """Compare two checkpoints, as one is only removed when the next one is there, with the room on `out`'s disk.

    Raises:
        OSError: there is no room for the weights alone.
    """
    disk = shutil.disk_usage(_existing(out))
    if disk.total == 0:  # a file system that does not say
        return
    free = disk.free
    whole, weights = checkpoint_bytes(config, parameters)
    if free < weights:
        raise OSError(
            f"the disk is full: the trained weights alone take {size(weights)}, and {size(free)} is free in {out}; "
            f"make room, or choose another folder with {option('out')}"
        )
    if free < 2 * whole:
        then = "only the weights can be saved, and a resume is not possible" if free < whole else "only one fits"
        say(f"Disk: a checkpoint takes {size(whole)}, two are needed, and {size(free)} is free in {out}: {then}")


def _needed(config: TrainConfig, vocab_size: int, device: torch.device) -> Memory:
    """Return the bytes in the memory that `device` stands for: a GPU's own, or the machine's with all its processes."""
    processes = config.devices * config.num_nodes
    found = estimate(
        config.model_config(vocab_size),
        devices=processes,
        batch_size=config.batch_size // (config.micro_batches * processes),
        precision=config.precision,
        checkpointing=config.checkpointing,
    )
    one = found.memory["ddp" if config.strategy == "auto" else config.strategy]
    averages = 0 if config.ema is None else _AVERAGE_BYTES * found.parameters
    here = 1 if device.type == "cuda" else config.devices
    parts = (one.weights + averages, one.gradients, one.optimizer, one.activations)
    return Memory(*(here * part for part in parts))


def _remedy(config: TrainConfig) -> str:
    smaller = f"{option('micro_batches')}, {option('checkpointing')} and a smaller preset take less"
    return f"{smaller}: tinyllm estimate --preset {config.preset}"


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


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
