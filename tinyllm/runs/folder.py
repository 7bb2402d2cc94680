"""The run folder: what a training leaves behind, and what `load_run` needs to bring it back.

    config.json        model (SimpleLLMConfig), training (TrainConfig), data, versions, products (who multiplies); of
                       `tinyllm quantize`, whose folders have only this, tokenizer.json and model.safetensors: model,
                       weights, group_size (weights that share a scale), made_from (run, checkpoint, preset)
    tokenizer.json     see tinyllm.tokenizer
    model.safetensors  the weights of the last checkpoint; tied ones are stored once
    checkpoints/       what a training needs to go on, see tinyllm.training.checkpoint
    metrics.jsonl      one JSON object a line, see tinyllm.runs.metrics
    metrics.csv        the same as a table
    loss_curve.png     a picture of it
    samples.jsonl      what the model wrote at each validation: step, prompt, text
    tensorboard/       TensorBoard's files, if they were asked for
    data/              the tokens, see tinyllm.data.shards; data that were prepared before stay where they are
    train.bin val.bin  the tokens of runs that older versions made, without a header: uint16, uint32 from 65,537 ids on

Weights are safetensors, never pickles: loading a file that a stranger sent cannot run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinyllm._internal.files import replacing
from tinyllm._internal.locks import LOCK_FILE, is_owned
from tinyllm.config.saved import CONFIG_FILE, read_config

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "model.safetensors"
METRICS_FILE = "metrics.jsonl"
TABLE_FILE = "metrics.csv"
CURVE_FILE = "loss_curve.png"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
DATA = "data"
OLD_TOKENS = {"train": "train.bin", "val": "val.bin"}

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
    *OLD_TOKENS.values(),
)
RUN_FOLDERS = (CHECKPOINTS, TENSORBOARD, DATA)  # the last one of runs with `owns_data`
RUNS = Path("runs")
NEW = ".tinyllm-new"  # in it, a run's files are made, see tinyllm.runs.succession


def check_out(directory: str | os.PathLike[str], *, overwrite: bool, writes_data: bool = True) -> Path:
    """Return the run folder to write to, or raise an error if writing would touch what is there. Changes nothing.

    Args:
        directory: the run folder.
        overwrite: allow a run to be there.
        writes_data: the new run's tokens will be in `directory`, and not elsewhere.

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
    # config.json, data and checkpoints are common names: those of another program are not ours to replace.
    ours = _written_names(directory) | (set() if writes_data else {DATA})
    taken = [name for name in (*RUN_FILES, *RUN_FOLDERS) if name not in ours and Path(directory, name).exists()]
    if taken:
        raise FileExistsError(
            f"out {directory} has a {taken[0]} that no training wrote; choose another directory, or move it away"
        )
    return directory


def _written_names(directory: Path) -> set[str]:
    """Return the names in a directory that are a run's if they are there; none if no training wrote it."""
    try:
        config = read_config(directory, parts=["model"])
    except (OSError, ValueError):
        return set()
    if "training" not in config:
        return set()
    return {*RUN_FILES, *RUN_FOLDERS} - (set() if owns_data(directory) else {DATA})


def owns_data(directory: Path) -> bool:
    """Return whether the run in a directory wrote the folder `data` that may be in it, for which config.json is asked:
    data that were prepared elsewhere, even there, stay the user's."""
    try:
        data = read_config(directory, parts=["data"])["data"]
    except (OSError, ValueError):
        return False
    return bool(data.get("prepared") == DATA)


@contextmanager
def new_run_folder(preset: str) -> Iterator[Path]:
    """Make runs/PRESET-NUMBER with the first free number; remove it afterwards if nothing has come into it."""
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
    """Return the folder of the checkpoint of that step."""
    return out / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(out: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the folder of each checkpoint of a run by its step, in order."""
    folder = Path(out, CHECKPOINTS)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def best_step(out: str | os.PathLike[str]) -> int | None:
    """Return the step of the checkpoint with the lowest validation loss; None if none was validated or none is left.

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
    source = weights_in(checkpoint)
    with replacing(out / MODEL_FILE) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without them
            shutil.copyfile(source, temporary)


def publish_last(out: Path) -> None:
    """Publish the last checkpoint where a kill came between: nothing newer is `out`/model.safetensors."""
    there = checkpoints(out)
    last, published = there[max(there)], out / MODEL_FILE
    if not published.exists() or published.stat().st_mtime_ns < weights_in(last).stat().st_mtime_ns:
        publish(last, out)


def weights_in(checkpoint: Path) -> Path:
    """Return the file of a checkpoint's weights: the averaged ones, if there are any."""
    averages = checkpoint / AVERAGES_FILE
    return averages if averages.is_file() else checkpoint / MODEL_FILE


def is_run(folder: Path) -> bool:
    """Return whether a training or `tinyllm quantize` wrote `folder`.

    It has a metrics.jsonl, or a config.json with a "training" object, or one that says how the weights are stored.
    """
    if (folder / METRICS_FILE).is_file():
        return True
    if not (folder / CONFIG_FILE).is_file():
        return False
    try:
        config = read_config(folder, parts=["model"])
    except (OSError, ValueError):
        return False
    return isinstance(config.get("training"), dict) or is_quantised(config)


def is_quantised(config: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a folder that `tinyllm quantize` wrote."""
    return "training" not in config and isinstance(config.get("weights"), str)
