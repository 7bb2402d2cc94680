"""Replace the run in a folder by a new one, such that the folder holds a whole run at every moment.

    out/.tinyllm-new/       the new run's files while they are made; nothing else has changed yet
    out/.tinyllm-replaced/  the earlier run, from then on until the new run's first checkpoint stands, or weights alone

A new run is begun when its config.json lies in `out`. One that fails before its first checkpoint is removed, and the
earlier one put back. All of it needs the folder's owner, see `tinyllm._internal.locks`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllm._internal.files import REPLACED
from tinyllm.config.saved import CONFIG_FILE
from tinyllm.runs.folder import DATA, MODEL_FILE, NEW, RUN_FILES, RUN_FOLDERS, checkpoints, owns_data

_MOVING = ".tinyllm-moving"  # part of the earlier run, the other part lies in `out`
_REMOVED = ".tinyllm-removed"  # the tokens of a new run that is being removed


@contextmanager
def new_files(out: Path) -> Iterator[Path]:
    """Give the block a folder for a new run's files; afterwards move them to `out`, and an earlier run aside."""
    folder = out / NEW
    folder.mkdir()
    try:
        yield folder
        _set_aside(out)
        _move(folder, out, [*RUN_FOLDERS, *RUN_FILES[1:], CONFIG_FILE])  # the mark of a run, last
    finally:
        recover(out)


@contextmanager
def giving_up(out: Path) -> Iterator[None]:
    """Undo the new run in `out` if the block fails, unless it has come to a checkpoint, or to weights."""
    try:
        yield
    except BaseException:
        if not _has_come_to_something(out):
            _put_back(out)
        raise


def settle(out: Path) -> bool:
    """Remove the earlier run, as the new one has a checkpoint, or weights; return whether there was one."""
    there = (out / REPLACED).is_dir()
    shutil.rmtree(out / REPLACED, ignore_errors=True)
    return there


def recover(out: Path) -> None:
    """Mend what a kill left: files of a run that was not begun, and an earlier run that was on its way."""
    if owns_data(out / NEW) and not (out / NEW / DATA).exists() and (out / DATA).exists():  # on its way to `out`
        (out / DATA).rename(out / NEW / DATA)
    (out / NEW / CONFIG_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / NEW, ignore_errors=True)
    if (out / _MOVING).is_dir():
        _return(out)
    elif (out / _REMOVED).is_dir():
        _put_back(out)
    elif (out / REPLACED).is_dir():
        if not (out / CONFIG_FILE).exists():
            _put_back(out)
        elif _has_come_to_something(out):
            settle(out)


def _has_come_to_something(out: Path) -> bool:
    return bool(checkpoints(out)) or (out / MODEL_FILE).exists()


def _set_aside(out: Path) -> None:
    if (out / REPLACED).is_dir():  # and stays there: what has taken its place came to no checkpoint
        _remove(out)
        return
    names = [name for name in (*RUN_FILES, *RUN_FOLDERS) if name != DATA or owns_data(out)]
    (out / _MOVING).mkdir()
    _move(out, out / _MOVING, names)
    if any((out / _MOVING).iterdir()):
        (out / _MOVING).rename(out / REPLACED)
    else:
        (out / _MOVING).rmdir()


def _put_back(out: Path) -> None:
    _remove(out)
    if (out / REPLACED).is_dir():
        (out / REPLACED).rename(out / _MOVING)
        _return(out)


def _return(out: Path) -> None:
    _move(out / _MOVING, out, [*RUN_FOLDERS, *reversed(RUN_FILES)])
    (out / _MOVING).rmdir()


def _remove(out: Path) -> None:
    """Remove the run in `out`, its mark first, but not one that is aside."""
    if owns_data(out) and (out / DATA).is_dir():  # which only the mark tells
        (out / DATA).rename(out / _REMOVED)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    for name in (*RUN_FOLDERS, _REMOVED):
        if name != DATA and (out / name).is_dir():
            shutil.rmtree(out / name)


def _move(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        if (source / name).exists():
            (source / name).rename(target / name)
