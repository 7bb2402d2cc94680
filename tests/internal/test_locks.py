"""One owner for a folder, see tinyllm._internal.locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.runs import environment
from tinyllm._internal import locks
from tinyllm._internal.locks import LOCK_FILE, is_owned, owned

HOLD = """
import sys, time
from tinyllm._internal.locks import owned
with owned(sys.argv[1], "trained"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    try:
        assert is_owned(tmp_path / "run")
        with (
            pytest.raises(BlockingIOError, match=f"run is being trained by process {process.pid}$"),
            owned(tmp_path / "run", "prepared"),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    assert not is_owned(tmp_path / "run")
    with owned(tmp_path / "run", "trained"):
        assert is_owned(tmp_path / "run")
    assert (tmp_path / "run").is_dir()  # it was there before


def test_folders_made_for_it_go_if_they_stay_empty(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b", "trained"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with owned(tmp_path / "a" / "b", "trained"):
        (tmp_path / "a" / "b" / "c").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


def test_threads_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    inside = 0
    most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            try:
                with owned(tmp_path, "trained"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.002)
                    inside -= 1
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_a_forked_process_does_not_outlive_its_parents_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    with owned(tmp_path, "trained"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the test is over
            os._exit(0)
        assert is_owned(tmp_path)
    try:
        with owned(tmp_path, "trained"):
            pass
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_that_cannot_lock_says_so(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    fake: Any = None if number is None else SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4, LOCK_SH=1)
    monkeypatch.setattr(locks, "fcntl", fake)
    said: list[str] = []
    with owned(tmp_path, "trained", said.append):
        assert is_owned(tmp_path) is None
    assert said == [
        f"{tmp_path} lies on a file system that cannot lock files: see to it that nothing else writes there"
    ]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, problem in (("file", "is a file"), ("file/x", "cannot be written to: Not a directory")):
        with pytest.raises(OSError, match=f"out {tmp_path / path} {problem}"), owned(tmp_path / path, "trained"):
            pass
