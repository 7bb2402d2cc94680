"""Memory and disk: what a training needs of them, what there is, and what to say before it begins with too little."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tinyllm._words import option, size
from tinyllm.estimate import PRECISIONS, Memory, estimate
from tinyllm.presets import TrainConfig

_AVERAGE_BYTES = 4  # for each parameter, where the weights are averaged

Say = Callable[[str], None]


def check_memory(config: TrainConfig, vocab_size: int, device: torch.device, say: Say) -> None:
    """Compare what training takes with what is there; `say` a warning where it may be too little.

    Args:
        config: the training.
        vocab_size: the tokenizer's, or 1 while it is not known, for which less is needed.
        device: the first of those that it runs on.
        say: called with the warning.

    Raises:
        MemoryError: not even weights, gradients and optimizer fit.
    """
    available = available_memory(device)
    if available is None:
        return
    needed = _needed(config, vocab_size, device)
    certain = needed.weights + needed.gradients + needed.optimizer
    if certain > available:
        raise MemoryError(
            f"training {config.preset} takes {size(needed.total)} of memory: weights {size(needed.weights)}, gradients "
            f"{size(needed.gradients)}, optimizer {size(needed.optimizer)}, activations {size(needed.activations)}; "
            f"{size(available)} is available on {device.type}. A smaller preset takes less, and --strategy fsdp shares "
            f"it among --devices: tinyllm estimate --preset {config.preset}"
        )
    if needed.total > available:
        say(
            f"Memory: about {size(needed.total)} is needed, {size(needed.activations)} of it for activations, and "
            f"{size(available)} is available; {_remedy(config)}"
        )


def memory_error(
    config: TrainConfig, vocab_size: int, device: torch.device, error: BaseException
) -> MemoryError | None:
    """Return what to raise for an error of PyTorch's that means that memory has run out; None for any other."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    ):
        return None
    if isinstance(error, MemoryError) and error.args:  # it says itself what to do
        return error
    needed, available = _needed(config, vocab_size, device), available_memory(device)
    there = "" if available is None else f", {size(available)} is available"
    return MemoryError(
        f"memory has run out on {device.type}: training {config.preset} takes about {size(needed.total)}{there}; "
        f"{_remedy(config)}"
    )


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that may still be allocated on `device`; None if nobody knows.

    On a CPU that is what the system can give without moving other programs' memory out, swap included, within the
    limits of the container and of the process (`ulimit -v`).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_system_memory(), _container_memory(), _process_memory()]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


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
    free = shutil.disk_usage(_existing(out)).free
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


def _system_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: nobody says what is free, so it is all that there is
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    found = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)}
    return found["MemAvailable"] + found.get("SwapFree", 0)


def _container_memory() -> int | None:
    """Read the limit of the control group that this process sees as its root: a container's."""
    group = Path("/sys/fs/cgroup")
    try:
        if (group / "memory.max").exists():
            limit, used = (group / name for name in ("memory.max", "memory.current"))
        else:
            group = group / "memory"
            limit, used = (group / name for name in ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        most = int(limit.read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when needed
        return most - int(used.read_text()) + cached
    except (OSError, ValueError):  # no control groups, or no limit: "max"
        return None


def _process_memory() -> int | None:
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return None
    return None if most == resource.RLIM_INFINITY else most - pages * resource.getpagesize()


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
