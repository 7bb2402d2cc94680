"""Find and describe run folders without torch, for `tinyllm runs`.

running      a process owns the folder, see tinyllm._internal.locks
running?     it may be so, but the folder's file system cannot lock files
finished     all steps that were asked for are done
interrupted  not all, and its weights were saved after its last line: nothing is lost
killed       not all, and the steps since the last save, if any, are lost
quantised    no training: `tinyllm quantize` wrote it
broken       a file that a run needs is missing, or is not what it should be
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tinyllm._internal.locks import is_owned
from tinyllm.config.saved import CONFIG_FILE, existing_file, read_config
from tinyllm.runs.folder import METRICS_FILE, MODEL_FILE, checkpoints, is_quantised, is_run
from tinyllm.runs.metrics import read_metrics


@dataclass(frozen=True)
class RunInfo:
    """Description of a run folder.

    Attributes:
        path: the folder.
        state: see the top of this file.
        problem: why it is broken; None if it is not.
        preset: the model's size.
        weights: how they are stored: "float32", "bf16", "int8" or "int4".
        parameters: how many numbers its model learns; tied ones once.
        step: steps done.
        steps: steps asked for.
        val_loss: the last validation loss, in nats per token.
        best_val_loss: the lowest one.
        best_step: and its step.
        tokens_per_s: the median over the training.
        elapsed_s: seconds of training.
        when: its last sign of life: seconds since 1970. A copy of a folder may have that of the copying.

    What a folder does not say is None.
    """

    path: Path
    state: str
    problem: str | None = None
    preset: str | None = None
    weights: str | None = None
    parameters: int | None = None
    step: int | None = None
    steps: int | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    when: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every attribute by its name, as JSON has it: the path a string, `when` in ISO 8601 with its time zone."""
        when = None if self.when is None else datetime.fromtimestamp(self.when).astimezone().isoformat("T", "seconds")
        return {**asdict(self), "path": str(self.path), "when": when}


def find_runs(directories: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the run folders among and below `directories`, each once, in the order of their names.

    `is_run` says what a run folder is. What lies below one is its own. Hidden folders are passed over.

    Raises:
        FileNotFoundError, NotADirectoryError: one of `directories` is not there, or is a file.
    """
    found: list[Path] = []
    seen: set[Path] = set()  # links may lead round in circles

    def look(folder: Path) -> None:
        real = folder.resolve()
        if real in seen:
            return
        seen.add(real)
        if is_run(folder):
            found.append(folder)
            return
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except PermissionError:
            return
        for path in below:
            look(path)

    for directory in map(Path, directories):
        if not directory.exists():
            raise FileNotFoundError(
                f"there is no folder {directory}; tinyllm train makes runs, in runs/ if not told where"
            )
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; a run folder, or a folder of runs, is needed")
        look(directory)
    return found


def describe_run(folder: str | os.PathLike[str]) -> RunInfo:
    """Return what `folder` says about its run. A broken one is described as such, so this raises nothing."""
    folder = Path(folder)
    when = next((_changed(folder / name) for name in (METRICS_FILE, CONFIG_FILE) if (folder / name).exists()), None)
    try:
        config = read_config(folder, parts=["model"])
        if is_quantised(config):
            existing_file(folder, MODEL_FILE)
            made_from = config.get("made_from")
            return RunInfo(
                folder,
                "quantised",
                preset=made_from.get("preset") if isinstance(made_from, dict) else None,
                weights=config["weights"],
                parameters=count_parameters(config["model"]),
                when=when,
            )
        training = read_config(folder)["training"]  # whose error says that there is none
        known: dict[str, Any] = {
            "preset": str(training.get("preset", "")) or None,
            "weights": "float32",
            "parameters": count_parameters(config["model"]),
            "steps": training.get("steps"),
            "when": when,
        }
        if type(known["steps"]) is not int:
            raise ValueError(f"{folder / CONFIG_FILE} does not say how many steps were asked for")
        lines = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    except (OSError, ValueError) as error:
        return RunInfo(folder, "broken", problem=str(error), when=when)

    val = [(line["loss"], line["step"]) for line in lines if line["split"] == "val" and line["loss"] is not None]
    speeds = [line["tokens_per_s"] for line in lines if line["split"] == "train" and line.get("tokens_per_s")]
    best_val_loss, best_step = min(val, default=(None, None))
    step = max((line["step"] for line in lines), default=0)
    return RunInfo(
        folder,
        _state(folder, step, known["steps"]),
        step=step,
        val_loss=val[-1][0] if val else None,
        best_val_loss=best_val_loss,
        best_step=best_step,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        elapsed_s=max((line.get("elapsed_s") or 0.0 for line in lines), default=0.0),
        **known,
    )


def tokens_per_step(config: dict[str, Any]) -> int | None:
    """Return the number of tokens in a step of the run with this config.json; None if it does not say."""
    training = config["training"]
    sizes = training.get("batch_size"), training.get("seq_len")
    return sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else None


def count_parameters(model: dict[str, Any]) -> int | None:
    """Return the number of weights of the model with this config, tied ones once; None if it does not say.

    That is `SimpleLLM.num_parameters()`, without building the model, and before anything was saved.
    """
    try:
        vocab, dim, hidden, layers = (
            model[name] for name in ("vocab_size", "embedding_dim", "hidden_dim", "num_layers")
        )
        bias = model.get("bias", True)

        def linear(inputs: int, outputs: int) -> int:
            return inputs * outputs + bias * outputs

        norm = dim + bias * dim
        attention = (3 if model.get("num_heads", 1) == 1 else 4) * linear(dim, dim)
        block = attention + linear(dim, hidden) + linear(hidden, dim) + 2 * norm
        positions = model["max_seq_len"] * dim if model.get("position") == "learned" else 0
        output = linear(dim, vocab) - (dim * vocab if model.get("tie_embeddings") else 0)
        return int(vocab * dim + positions + layers * block + bool(model.get("norm_first")) * norm + output)
    except (KeyError, TypeError):
        return None


def run_names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a name for each folder: the shortest end of its path that differs from the others'."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append(str(Path(*own[-length:])))
    return names


def _state(folder: Path, step: int, steps: int) -> str:
    owner = is_owned(folder)
    if owner:
        return "running"
    if step >= steps and (_last_checkpoint(folder) >= step or (folder / MODEL_FILE).exists()):
        return "finished"
    if owner is None:
        return "running?"
    saved = _changed(folder / MODEL_FILE) >= _changed(folder / METRICS_FILE) if step else False
    return "interrupted" if saved or 0 < step <= _last_checkpoint(folder) else "killed"


def _last_checkpoint(folder: Path) -> int:
    try:
        return max(checkpoints(folder), default=-1)
    except OSError:  # another user's, perhaps
        return -1


def _changed(path: Path) -> float:
    """When the file was last written to; long ago if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
