"""Checkpoints: all that a training needs to go on as if it had never stopped.

    checkpoints/step-00000200/
        model.safetensors      the weights
        averages.safetensors   their moving averages, if there are any
        optimizer.safetensors  AdamW's or Muon's state, by the names of the weights
        state.json             the step, what the validations found, what belongs to which run

A checkpoint is written beside its name and renamed when all of it is on the disk, so one that has its name is whole.
Its files do not depend on how many processes wrote them, or by which strategy. There is no random state in it: the
order of the data and each step's random numbers follow from the seed and the step. Nor is there a pickle: loading a
checkpoint cannot run code. (DeepSpeed's optimizer is the exception: it is stored in its own format.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllm._internal.files import fsync, is_full_disk, replacing
from tinyllm.runs.folder import AVERAGES_FILE, MODEL_FILE, STATE_FILE, checkpoint_path, checkpoints
from tinyllm.runs.succession import settle
from tinyllm.training.engine import Engine
from tinyllm.training.optim import AveragedWeights

OPTIMIZER_FILE = "optimizer.safetensors"
_VERSION = 1


@dataclass
class Progress:
    """Progress of a training, besides its weights.

    Attributes:
        step: steps done.
        val_loss: the last validation loss.
        best_loss, best_step: the lowest validation loss, and when it was.
        losses: of the steps since the last line of metrics.
        skipped: steps whose loss or gradient was not finite, since the last line of metrics.
        skipped_in_a_row: how many of them came last.
        average_updates: see `AveragedWeights.updates`.
    """

    step: int = 0
    val_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    average_updates: int = 0


def save_checkpoint(
    engine: Engine, out: Path, model: nn.Module, averages: AveragedWeights | None, progress: Progress, *, keep: int
) -> Path:
    """Write `out`/checkpoints/step-N, and remove all but the best, this one and the `keep` - 1 before it.

    All processes call it; rank 0 writes.

    Args:
        engine: with its optimizer.
        out: the run folder.
        model: sharded or not: its own parameters' names are the files'.
        averages: of the weights.
        progress: becomes state.json.
        keep: at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, in all processes; the checkpoints before it are untouched.
    """
    path = checkpoint_path(out, progress.step)
    if engine.on_rank_zero(path.exists):
        return path
    with _new_folder(engine, path) as folder:

        def save(name: str, tensors: dict[str, Tensor]) -> None:
            _writing(engine, lambda: save_file(tensors, folder / name, metadata={"format": "pt"}))

        values = _gather(engine, weights(model))
        save(MODEL_FILE, values)
        if averages is not None:  # with buffers, so that the file is a model's, too
            save(AVERAGES_FILE, values | _gather(engine, averages.averages.items()))
        if not engine.save_own_state(folder):
            save(OPTIMIZER_FILE, _gather(engine, _optimizer_state(model, engine.optimizer)))

        def finish() -> None:
            state = {"version": _VERSION, "world_size": engine.world_size, **asdict(progress)}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for file in folder.iterdir():
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # safetensors leaves files to their owner only
                    fsync(file)

        _writing(engine, finish)
    engine.on_rank_zero(lambda: prune(out, keep, progress.best_step))
    return path


def save_weights(
    engine: Engine,
    out: Path,
    model: nn.Module,
    averages: AveragedWeights | None,
    *,
    step: int,
    ending: bool,
    done: bool,
) -> tuple[bool, str]:
    """Write `out`/model.safetensors alone, as the last resort where there is no room for a checkpoint.

    All processes call it; the first one writes. Where the weights do not fit beside what is there, either, something
    has to go: when the training is `ending` the run that it replaces; if it is `done`, the checkpoints before, whose
    weights remain until the new ones are written; and last those of an earlier step, which would be all that is left.

    Returns:
        Whether they are written, and what came of it in words.
    """
    tensors = _gather(engine, weights(model))
    if averages is not None:
        tensors |= _gather(engine, averages.averages.items())

    def write() -> None:
        with replacing(out / MODEL_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.chmod(0o666 & ~_umask())

    def drop_weights() -> bool:
        if checkpoints(out) or not (out / MODEL_FILE).exists():
            return False
        (out / MODEL_FILE).unlink()
        return True

    sacrifices = [lambda: settle(out)] if ending else []
    sacrifices += [lambda: prune(out, 0, None)] if done else []
    sacrifices += [drop_weights] if ending else []
    said = f"the weights of step {step} alone are saved: generate and eval can use them, a resume cannot"
    while True:
        try:
            _writing(engine, write)
        except OSError as error:
            if not (is_full_disk(error) and any(engine.on_rank_zero(sacrifices.pop(0)) for _ in list(sacrifices))):
                return False, f"nor could its weights alone: {error.strerror or error}"
        else:
            return True, said


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill `model`, sharded or not, with a run's weights. All processes call it. Raises as `load_checkpoint`."""
    _load(path, weights(model))


def load_checkpoint(engine: Engine, path: Path, model: nn.Module, averages: AveragedWeights | None) -> Progress:
    """Take up what `save_checkpoint` left, with whatever strategy and number of processes. All processes call it.

    Raises:
        ValueError: a file is truncated or missing, or holds other weights than the model's; the message names it.
    """
    progress = _read_state(path / STATE_FILE)
    _load(path / MODEL_FILE, weights(model))
    if averages is not None:
        _load(path / AVERAGES_FILE, averages.averages.items())
        averages.updates = progress.average_updates
    if not engine.load_own_state(path):
        _make_optimizer_state(engine.optimizer)
        _load(path / OPTIMIZER_FILE, _optimizer_state(model, engine.optimizer))
    return progress


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return parameters and stored buffers by their names in a state_dict, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _optimizer_state(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}.{name}", value


def _make_optimizer_state(optimizer: Any) -> None:
    """Make the state of AdamW, and of Muon's group, before its first step does."""
    for group in optimizer.param_groups:
        averages = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "momentum" not in group:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in averages}


def _gather(engine: Engine, tensors: Any) -> dict[str, Tensor]:
    """Return each tensor whole, on the CPU of rank 0; they come one by one, so that no device needs room for all."""
    found = {}
    for name, tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if engine.rank == 0:
            found[name] = whole.to("cpu").contiguous()
    return found


@torch.no_grad()
def _load(path: Path, tensors: Any) -> None:
    """Fill each tensor with the part of the file's that it has to hold."""
    try:
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            for name, tensor in tensors:
                if name not in there:
                    raise ValueError(f"{path} has no {name}: it is of another model")
                value = file.get_tensor(name)
                if value.shape != tensor.shape:
                    raise ValueError(f"{path} has {name} of {list(value.shape)}; the model's is {list(tensor.shape)}")
                if isinstance(tensor, DTensor):
                    # Every process reads the file: there is nothing to send.
                    value = distribute_tensor(
                        value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                    )
                tensor.copy_(value)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read, or is truncated") from error


def _read_state(path: Path) -> Progress:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["version"] == _VERSION:
            return Progress(**{item.name: state[item.name] for item in fields(Progress)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read, or is not the state of a training") from error
    raise ValueError(f"{path} is of version {state['version']!r}; this program reads version {_VERSION}")


@contextmanager
def _new_folder(engine: Engine, path: Path) -> Iterator[Path]:
    """Give the block a folder beside `path`, which gets its name afterwards; remove it if the block fails."""
    temporary = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)

    _writing(engine, begin)
    try:
        yield temporary
        _writing(engine, finish)
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _writing(engine: Engine, work: Callable[[], None]) -> None:
    """Do `work` in the first process; a full disk is an OSError, whichever library meets it."""

    def attempt() -> None:
        try:
            work()
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise OSError(str(error)) from error

    engine.on_rank_zero(attempt)


def prune(out: Path, keep: int, best: int | None) -> bool:
    """Remove all checkpoints but the last `keep` and the best one; return whether there were any."""
    there = checkpoints(out)
    gone = [step for step in list(there)[: len(there) - keep] if step != best]
    for step in gone:
        # First out of sight: what has a checkpoint's name is whole, also if the removal is cut short.
        hidden = there[step].with_name(f".{there[step].name}.tmp")
        there[step].rename(hidden)
        shutil.rmtree(hidden)
    return bool(gone)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
