"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPLACED = ".tinyllm-replaced"  # holds what --overwrite replaces until the new stands


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` on success.

    The rename is atomic (`os.replace`), so `path` holds either its old content or all of the new.
    If the block raises, the temporary file is removed and `path` is left as it was. Missing parent
    directories are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)  # on the disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        if is_full_disk(error) and not error.filename:  # the system does not say which file
            raise OSError(error.errno, f"no space left on the disk for {path}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_full_disk(error: OSError) -> bool:
    """Return whether a disk, or a user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync(path: Path) -> None:
    """Wait until the file, or the names in the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def check_new_folder(directory: str | os.PathLike[str]) -> Path:
    """Return a directory that is empty or not there; raises FileExistsError or NotADirectoryError if it is not so."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"out {path} is a file; a new directory is needed")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"out {path} is not empty; choose another directory")
    return path


@contextmanager
def new_folder(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `directory`, which takes its name on success; if the block raises, nothing stays.

    Raises:
        FileExistsError, NotADirectoryError: as `check_new_folder`.
    """
    path = check_new_folder(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        os.replace(folder, path)
