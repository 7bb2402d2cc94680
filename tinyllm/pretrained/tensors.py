"""Files of weights as other programs write them: safetensors or pickles, whole or in shards."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyllm._internal.files import replacing

SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"


class StoredTensor(NamedTuple):
    """A tensor in a file, which is read when `read` is called; of safetensors, and no other before."""

    file: Path
    read: Callable[[], Tensor]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Find the tensors in a folder's files of weights, by their names there.

    It takes model.safetensors, its shards, pytorch_model.bin or its shards, whichever is there first.

    Raises:
        FileNotFoundError: there is none of them, or a shard is missing.
        ValueError: a file is truncated or foreign, a pickle holds anything but tensors, or shards have the same name.
    """
    found: dict[str, StoredTensor] = {}
    for path in _files(folder):
        tensors = _in_safetensors(path) if path.suffix == ".safetensors" else _in_pickle(path)
        for name, read in tensors.items():
            if name in found:
                raise ValueError(f"{path} has {name}, which {found[name].file} has, too")
            found[name] = StoredTensor(path, read)
    return found


def _files(folder: Path) -> list[Path]:
    for name in (SAFETENSORS_FILE, PICKLE_FILE):
        if (path := folder / name).is_file():
            return [path]
        if (path := folder / f"{name}.index.json").is_file():
            return _shards(path)
    raise FileNotFoundError(
        f"{folder} has no weights: neither {SAFETENSORS_FILE} nor {PICKLE_FILE}, nor the index of either's shards"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        paths = [index.with_name(name) for name in names]  # which refuses any other folder's
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of shards, or is truncated: {error}") from error
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index.parent} has no {', '.join(missing)}, of which {index.name} speaks")
    return paths


def _in_safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    def read(name: str) -> Tensor:
        # The file is mapped anew for each tensor: what is mapped counts as the process's memory until it is closed.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    with path.open("rb"):  # for Python's words: the library says of whatever it cannot read that there is no such file
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118 (it is not iterable itself)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from error


def _in_pickle(path: Path) -> dict[str, Callable[[], Tensor]]:
    with path.open("rb"):
        pass
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} is a pickle that asks for {asked[1] if asked else 'something'} besides tensors, which could be "
            "code, or it is damaged; it was refused, and nothing in it was run"
        ) from error
    except Exception as error:  # a damaged file makes almost any of them
        raise ValueError(f"{path} is not a file of torch.save, or is truncated: {error or 'it ends early'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dict of names and tensors is needed")
    if wrong := [repr(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} has {', '.join(wrong)}, which are not tensors")
    return {str(name): partial(content.__getitem__, name) for name in content}


@contextmanager
def new_safetensors_file(path: Path) -> Iterator[Path]:
    """As `replacing`, for safetensors, which makes files for their owner only: this one has the user's usual mode."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
