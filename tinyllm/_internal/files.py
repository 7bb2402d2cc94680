"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import errno
import os
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
