"""config.json, which says how a run was made and what its model is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllm._internal.files import REPLACED, write_text

CONFIG_FILE = "config.json"


def save_config(config: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """Write `directory`/config.json."""
    write_text(Path(directory, CONFIG_FILE), json.dumps(config, indent=2) + "\n")


def read_config(directory: str | os.PathLike[str], *, parts: Sequence[str] = ("model", "training")) -> dict[str, Any]:
    """Read `directory`/config.json.

    Args:
        directory: the run folder.
        parts: the objects that it must have.

    Raises:
        FileNotFoundError: there is no such directory or file.
        ValueError: the file is truncated, or another program's.
    """
    path = existing_file(directory, CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is truncated: {error}") from error
    for name in parts:
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise ValueError(f'{path} is not the config of a run: it has no "{name}" object')
    return dict(config)


def existing_file(directory: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file that a run folder must have; FileNotFoundError if it has none."""
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
