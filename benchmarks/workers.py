"""The processes of `benchmarks.writers`, as the one that measures sees them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from . import machine, report
from .cpu import TUNED

LONGEST_S = 300.0  # for one request; a provider that takes longer is stopped
LOAD_S = 120.0


def settings(threads: int) -> dict[str, str]:
    """Return the environment of a process that has so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1", **TUNED}


class WriterError(Exception):
    """A provider cannot do what it is asked for; the message says why."""


class Worker:
    """Process of a provider, see `benchmarks.writers`; a context that ends it.

    Attributes:
        loaded: what it says when it has loaded the model.
    """

    def __init__(self, label: str, folder: Path, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed when this one is
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.writers", label, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=machine.ROOT if report.IN_REPOSITORY else None,
            env={**os.environ, **settings(threads)},
        )
        self.pid = self._process.pid
        try:
            self.loaded = self._answer(LOAD_S)
        except WriterError:
            self.__exit__(None, None, None)
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            WriterError: there is none, or an error instead.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except OSError:
            raise WriterError("its process has ended before") from None
        return self._answer(LONGEST_S)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        # No more than one answer is ever on its way, so that none waits in the buffer of `readline`.
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self._process.kill()
            raise WriterError(f"did not finish in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise WriterError(f"ended with {self._process.wait()}: {self._log.read().strip()[-200:]}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WriterError(answer["failed"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
