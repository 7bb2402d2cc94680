"""A folder that is being written to has one owner: a second process is refused instead of mixing its files in.

The owner holds a lock (flock) on a hidden file in the folder, in which its process number stands for others to read.
The system lets go of the lock when the owner ends, however it ends; a file that a killed one leaves binds nobody.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinyllm._internal.forks import in_forked_processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".tinyllm-lock"

_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_PATIENCE = 0.2  # seconds: a look at the lock, and an owner that has not written its number yet, take less

_held: set[int] = set()


@contextmanager
def owned(
    directory: str | os.PathLike[str], doing: str, say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Own `directory`, which is made if missing, while the block runs. Folders made for it that stay empty are removed.

    Args:
        directory: the folder.
        doing: what happens to it, for the one who is refused: "trained", "prepared".
        say: called with a warning where the file system cannot lock.

    Raises:
        BlockingIOError: another process owns it; the message has its number.
        NotADirectoryError: `directory` is a file.
        OSError: the folder cannot be made, or not be written to.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"out {directory} is a file; it must be a directory, or a name not yet taken")
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(directory, doing, say)
    except OSError as error:
        _remove_empty(made)
        if error.errno is None:  # ours
            raise
        raise type(error)(f"out {directory} cannot be written to: {error.strerror}") from error
    _held.add(descriptor)
    in_forked_processes(_close_all)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            with suppress(OSError):
                os.unlink(directory / LOCK_FILE)  # while it is still locked: see _acquire
            _held.discard(descriptor)
            os.close(descriptor)
            _remove_empty(made)


def is_owned(directory: str | os.PathLike[str]) -> bool | None:
    """Return whether a process owns `directory` now; None where the file system cannot tell."""
    try:
        descriptor = os.open(Path(directory, LOCK_FILE), os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        if fcntl is None:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _acquire(directory: Path, doing: str, say: Callable[[str], None]) -> int:
    """Return the descriptor of the lock file, locked."""
    path = directory / LOCK_FILE
    until = time.monotonic() + _PATIENCE
    while True:
        # Not through a link, which may lead to something of somebody's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(descriptor)
            os.close(descriptor)
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
            raise BlockingIOError(_refusal(directory, doing, owner)) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                os.close(descriptor)
                raise
            say(f"{directory} lies on a file system that cannot lock files: see to it that nothing else writes there")
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # of a file that its owner has removed since it was opened
    with suppress(OSError):  # a full disk: then nobody learns the number
        os.ftruncate(descriptor, 0)
        content = {"process": os.getpid(), "host": socket.gethostname(), "doing": doing}
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(content).encode())
    return descriptor


def _read(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        content = json.loads(os.read(descriptor, 4096))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(directory: Path, doing: str, owner: dict[str, Any]) -> str:
    number, host = owner.get("process"), owner.get("host")
    who = "another process" if number is None else f"process {number}"
    where = "" if host in (None, socket.gethostname()) else f" on {host}"
    return f"{directory} is being {owner.get('doing', doing)} by {who}{where}"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()


def _close_all() -> None:
    """Close this process's copies of the locks, with which it would outlive a killed owner's."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
