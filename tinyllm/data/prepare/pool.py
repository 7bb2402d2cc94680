"""Processes that do the work of `tinyllm.data.prepare.worker`, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tinyllm.data.prepare.worker import BOOTSTRAP, ERRORS

Progress = Callable[[int], None]


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """One process.

    Args:
        parallel: whether the library `tokenizers` may use every core in it.
    """

    def __init__(self, parallel: bool = False) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if parallel else "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, str(Path(__file__).parents[3])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )

    def run(self, task: dict[str, Any], what: str, progress: Progress) -> dict[str, Any]:
        """Have a task done.

        Args:
            task: what `tinyllm.data.prepare.worker.main` understands.
            what: what that is, for the message when the process dies.
            progress: called with the bytes done since the last call.

        Returns:
            The task's result.

        Raises:
            ChildProcessError: the process died; says at what and how.
            ImportError, OSError, ValueError: the task failed.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    progress(answer["progress"])
                elif "error" in answer:
                    raise ERRORS[answer["kind"]](answer["error"])
                else:
                    done: dict[str, Any] = answer["done"]
                    return done
        except BrokenPipeError:
            pass  # it died before it could read
        status = process.wait()
        how = f"exit status {status}"
        if status < 0:
            how = signal.Signals(-status).name
            how += ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        raise ChildProcessError(
            f"a worker died ({how}) while {what}; finished shards are kept, and the same command goes on from there"
        )

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it had not read is lost with it
                pipe.close()


class WorkerPool:
    """Up to `size` workers, started when there is work for them. Used by as many threads."""

    def __init__(self, size: int) -> None:
        self._idle: SimpleQueue[Worker | None] = SimpleQueue()
        for _ in range(size):
            self._idle.put(None)
        self._workers: list[Worker] = []
        self._closed = False

    def run(self, task: dict[str, Any], what: str, progress: Progress) -> dict[str, Any]:
        """`Worker.run`, on a worker that is free, or when one is."""
        worker = self._idle.get()
        try:
            if self._closed:
                raise ChildProcessError("the workers have been stopped")
            if worker is None:
                worker = Worker()
                self._workers.append(worker)
            return worker.run(task, what, progress)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers."""
        self._closed = True
        for worker in self._workers:
            worker.close()
