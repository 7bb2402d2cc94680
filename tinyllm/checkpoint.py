"""The run folder: what a training leaves behind, and what `load_run` needs to bring it back.

    config.json        model (SimpleLLMConfig), training (TrainConfig), data, versions, products (who multiplies)
    tokenizer.json     see tinyllm.tokenizer
    model.safetensors  the weights of the last checkpoint; tied ones are stored once
    checkpoints/       what a training needs to go on, see tinyllm.state
    metrics.jsonl      one JSON object a line, see tinyllm.metrics
    metrics.csv        the same as a table
    loss_curve.png     a picture of it
    samples.jsonl      what the model wrote at each validation: step, prompt, text
    tensorboard/       TensorBoard's files, if they were asked for
    train.bin val.bin  the tokens, see tinyllm.data; data that were prepared stay where they are

Weights are safetensors, never pickles: loading a file that a stranger sent cannot run code.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors

from tinyllm._files import REPLACED, replacing, write_text
from tinyllm._locks import LOCK_FILE, is_owned
from tinyllm.data import TRAIN_FILE, VAL_FILE
from tinyllm.model import SimpleLLM, SimpleLLMConfig
from tinyllm.tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "model.safetensors"
METRICS_FILE = "metrics.jsonl"
TABLE_FILE = "metrics.csv"
CURVE_FILE = "loss_curve.png"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"

# In a checkpoint, besides the weights.
AVERAGES_FILE = "averages.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")

RUN_FILES = (  # config.json is the mark of a run: it comes last into a folder, and goes first
    CONFIG_FILE,
    TOKENIZER_FILE,
    MODEL_FILE,
    METRICS_FILE,
    TABLE_FILE,
    CURVE_FILE,
    SAMPLES_FILE,
    TRAIN_FILE,
    VAL_FILE,
)
RUN_FOLDERS = (CHECKPOINTS, TENSORBOARD)
RUNS = Path("runs")
NEW = ".tinyllm-new"  # in it, a run's files are made, see tinyllm.succession


class Run(NamedTuple):
    """A training brought back: its model in eval mode, its tokenizer, and its config.json."""

    model: SimpleLLM
    tokenizer: Tokenizer
    config: dict[str, Any]


def check_out(directory: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The run folder to write to, or an error if that would touch what is there. Changes nothing.

    Raises:
        FileExistsError: the directory is not empty and `overwrite` is off; or it is on, but files
            of a run's names are there that no run wrote.
        NotADirectoryError: there is a file of that name.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"out {directory} is a file; it must be a directory, or a name not yet taken")
    if not overwrite and directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir()):
        go_on = f", go on with its training (--resume {directory})" if (directory / CONFIG_FILE).exists() else ""
        raise FileExistsError(
            f"out {directory} is not empty; choose another directory{go_on}, or overwrite (--overwrite)"
        )
    # config.json, train.bin and checkpoints are common names: those of another program are not ours to replace.
    taken = [name for name in (*RUN_FILES, *RUN_FOLDERS) if Path(directory, name).exists()]
    if taken:
        try:
            is_run = "training" in load_config(directory)
        except (OSError, ValueError):
            is_run = False
        if not is_run:
            raise FileExistsError(
                f"out {directory} has a {taken[0]} that no training wrote; choose another directory, or move it away"
            )
    return directory


@contextmanager
def new_run_folder(preset: str) -> Iterator[Path]:
    """runs/PRESET-NUMBER with the first free number, made; gone again if nothing has come into it."""
    number = 1
    while True:
        folder = RUNS / f"{preset}-{number}"
        try:  # made at once, so that a training that starts meanwhile takes another number
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            # What a kill left of one that had no run yet; whoever is at work there holds its lock.
            if set(os.listdir(folder)) == {LOCK_FILE, NEW} and is_owned(folder) is False:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                number += 1
    try:
        yield folder
    finally:
        for path in (folder, RUNS):
            with suppress(OSError):  # not empty
                path.rmdir()


def checkpoint_path(out: Path, step: int) -> Path:
    """The folder of the checkpoint of that step."""
    return out / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(out: str | os.PathLike[str]) -> dict[int, Path]:
    """step -> folder of each checkpoint of a run, in order."""
    folder = Path(out, CHECKPOINTS)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def best_step(out: str | os.PathLike[str]) -> int | None:
    """The step of the checkpoint with the lowest validation loss; None if none was validated, or none is there.

    Raises:
        ValueError: the state.json of the last checkpoint, which says so, is truncated or another program's.
    """
    there = checkpoints(out)
    if not there:
        return None
    path = there[max(there)] / STATE_FILE
    try:
        best: int | None = json.loads(path.read_text(encoding="utf-8"))["best_step"]
        return best if best in there else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated, or not a training's: it does not say which step was best") from error


def remove_unfinished(out: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written."""
    for path in Path(out, CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(path)


def publish(checkpoint: Path, out: Path) -> None:
    """Make the checkpoint's weights (the averages, if there are any) `out`/model.safetensors, without a second copy."""
    source = _weights_in(checkpoint)
    with replacing(out / MODEL_FILE) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without them
            shutil.copyfile(source, temporary)


def publish_last(out: Path) -> None:
    """Publish the last checkpoint where a kill came between: nothing newer is `out`/model.safetensors."""
    there = checkpoints(out)
    last, published = there[max(there)], out / MODEL_FILE
    if not published.exists() or published.stat().st_mtime_ns < _weights_in(last).stat().st_mtime_ns:
        publish(last, out)


def save_config(config: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """Write `directory`/config.json."""
    write_text(Path(directory, CONFIG_FILE), json.dumps(config, indent=2) + "\n")


def load_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `directory`/config.json.

    Raises:
        FileNotFoundError: there is no such directory or file.
        ValueError: the file is truncated, or another program's.
    """
    path = _existing(directory, CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is truncated: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f'{path} is not the config of a run: it has no "model" object')
    return config


def save_model(model: SimpleLLM, directory: str | os.PathLike[str]) -> Path:
    """Write the weights to `directory`/model.safetensors, whole or not at all; returns the path.

    Tied weights are stored once. A file that was there before stays until the new one is complete.
    """
    path = Path(directory, MODEL_FILE)
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's umask; safetensors leaves files to their owner only
        save_safetensors(model, str(temporary), metadata={"format": "pt"})
        temporary.chmod(mode)
    return path


Which = int | Literal["last", "best"]


def load_model(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", *, checkpoint: Which = "last"
) -> SimpleLLM:
    """Build the model that `directory`/config.json describes and load its weights; in eval mode.

    Args:
        directory: the run folder.
        device: where the model is to lie.
        checkpoint: "last"; "best": the one with the lowest validation loss; or the step of one that is there.

    Raises:
        FileNotFoundError: a file, or the checkpoint, is missing.
        ValueError: a file is truncated or foreign, the weights do not fit the config, or they are not finite.
    """
    config_path = Path(directory, CONFIG_FILE)
    config = load_config(directory)["model"]
    if checkpoint != "last":
        path = _weights_of(directory, checkpoint)
    elif not Path(directory, MODEL_FILE).exists() and (there := checkpoints(directory)):
        path = _weights_in(there[max(there)])  # there was no room for a second copy, or a kill came between
    else:
        path = _existing(directory, MODEL_FILE)
    try:
        model = SimpleLLM.from_config(SimpleLLMConfig.from_dict(config))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path} does not describe a model: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise ValueError(f"the model that {config_path} describes does not fit in memory") from error
    with path.open("rb"):  # for Python's words: the library says of whatever it cannot read that there is no such file
        pass
    try:
        load_safetensors(model, str(path), strict=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated") from error
    except RuntimeError as error:  # load_state_dict: a line for each key that is missing or differs
        first, *others = str(error).splitlines()[1:] or [str(error)]
        more = f", and {len(others)} more" if others else ""
        raise ValueError(
            f"the weights in {path} do not fit the model in {config_path}: {first.strip()}{more}"
        ) from error
    _check_finite(model, path)
    return model.to(device).eval()


def load_run(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", *, checkpoint: Which = "last"
) -> Run:
    """Bring a training back: `model, tokenizer, config = load_run("runs/tiny-1")`. Arguments as `load_model`'s.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, or the three do not belong together.
    """
    config = load_config(directory)
    tokenizer = load_tokenizer(_existing(directory, TOKENIZER_FILE))
    model = load_model(directory, device, checkpoint=checkpoint)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{Path(directory, TOKENIZER_FILE)} has {tokenizer.vocab_size} tokens, but the "
            f"model in {directory} has vocab_size {model.config.vocab_size}: they are not of one run"
        )
    return Run(model, tokenizer, config)


def _check_finite(model: SimpleLLM, path: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.is_floating_point():
            # Of nan, aminmax makes nan; unlike isfinite it needs no memory.
            wrong = [value for value in torch.stack(torch.aminmax(tensor)).tolist() if not math.isfinite(value)]
            if wrong:
                raise ValueError(f"{path} has {wrong[0]} in {name}: the training diverged, or the file is damaged")


def _weights_of(directory: str | os.PathLike[str], checkpoint: Which) -> Path:
    there = checkpoints(directory)
    if isinstance(checkpoint, str) and checkpoint != "best":
        raise ValueError(f"checkpoint is {checkpoint!r}; allowed are 'last', 'best' and the number of a step")
    step = best_step(directory) if checkpoint == "best" else checkpoint
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        missing = "no best checkpoint" if checkpoint == "best" else f"no checkpoint of step {checkpoint}"
        raise FileNotFoundError(f"{directory} has {missing}; those there are of the steps {steps}")
    return _weights_in(there[step])


def _weights_in(checkpoint: Path) -> Path:
    """The averages, if there are any."""
    averages = checkpoint / AVERAGES_FILE
    return averages if averages.is_file() else checkpoint / MODEL_FILE


def _existing(directory: str | os.PathLike[str], name: str) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no run folder {directory}")
    path = directory / name
    if not path.is_file():
        earlier = ""
        if (directory / REPLACED).is_dir():
            earlier = f"; the run before it is kept in {directory / REPLACED}, which can be used in its place"
        raise FileNotFoundError(f"{directory} has no {name}: no training, or no whole one, has been here{earlier}")
    return path
