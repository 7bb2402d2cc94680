"""The processes that `tinyllm prepare` has its work done by, and what they do: train a tokenizer, tokenize a unit.

They are those of a `ProcessPoolExecutor`, which are spawned: they inherit nothing of a program's threads and devices,
and do without torch, which would take seconds and a few hundred megabytes from each of them.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import current_process, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from tinyllm._internal.files import write_text
from tinyllm._internal.interrupt import holding_ctrl_c
from tinyllm.data.prepare.documents import Part
from tinyllm.data.prepare.encode import token_encoder, write_unit
from tinyllm.data.prepare.inputs import STREAMS, Input, Skipped
from tinyllm.data.prepare.streams import read_source
from tinyllm.data.shards import TOKENIZER_FILE
from tinyllm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_LOOK_INTERVAL = 0.2  # seconds between two looks at how far the workers are


class Workers:
    """Up to `size` processes, started when there is work for them.

    They can be ended at once, end with this process, and get no Ctrl-C. The program's main module is not imported
    again in them, so it need not be guarded, and may come from stdin.

    Args:
        size: How many.
        progress: Called with the bytes of text done since the last call.
    """

    def __init__(self, size: int, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        self._progress = progress
        self._seen = 0
        self._context = _Context()
        with _environment():  # a process is started here, too, which looks after semaphores
            self._counted = self._context.Value("q")
            self._executor = ProcessPoolExecutor(size, self._context, _begin, (self._counted,))
        self._at_work: dict[Future[Any], str] = {}

    def submit(self, what: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Have `function(*arguments)` called in a worker; `what` that is, for the message when it dies."""
        with self._naming_deaths(what):
            self._at_work[self._executor.submit(function, *arguments)] = what

    def results(self, most: int = 0) -> Iterator[Any]:
        """Yield what was returned, call by call as they finish, until no more than `most` are at work.

        Raises:
            ChildProcessError: a worker died; says at what and how.
            Exception: a call failed; its own error.
        """
        while len(self._at_work) > most:
            finished, _ = wait(self._at_work, _LOOK_INTERVAL, FIRST_COMPLETED)
            counted = self._counted.get_obj().value  # without its lock, which a worker that died may hold
            self._progress(counted - self._seen)
            self._seen = counted
            for future in finished:
                with self._naming_deaths(self._at_work[future]):
                    result = future.result()
                del self._at_work[future]
                yield result

    def run(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`, called in a worker while no other one is at work."""
        self.submit(what, function, *arguments)
        (result,) = self.results()
        return result

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._context.processes:
            if process.is_alive():
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    @contextmanager
    def _naming_deaths(self, what: str) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            # The others are being terminated, which is not how the first one died. The executor's own thread may have
            # collected its exit status without having noted it yet.
            for _ in range(100):
                statuses = [process.exitcode for process in self._context.processes]
                died = [status for status in statuses if status not in (None, 0, -signal.SIGTERM)]
                if died:
                    break
                time.sleep(0.01)
            how = _cause(died[0]) if died else "no trace"
            more = f", or one of {len(self._at_work) - 1} others" if len(self._at_work) > 1 else ""
            raise ChildProcessError(
                f"a worker died ({how}) while {what}{more}; finished shards are kept, and the same command goes on "
                f"from there"
            ) from None


def _cause(status: int) -> str:
    """Return what an exit status says of a process."""
    if status >= 0:
        return f"exit status {status}"
    return signal.Signals(-status).name + (", perhaps for want of memory" if -status == signal.SIGKILL else "")


class _Context(SpawnContext):
    """Context that starts the workers and keeps them in `processes`."""

    def __init__(self) -> None:
        self.processes: list[_Worker] = []

    def Process(self, *arguments: Any, **options: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
        self.processes.append(_Worker(*arguments, **options))
        return self.processes[-1]


class _Worker(SpawnProcess):
    def start(self) -> None:
        # Daemonic processes, such as those of a multiprocessing.Pool, may not have children, lest these outlive them;
        # workers end with their parent.
        parent: Any = current_process()
        daemon, parent._config["daemon"] = parent._config.get("daemon"), False
        try:
            self._start()
        finally:
            parent._config["daemon"] = daemon

    def _start(self) -> None:
        main = sys.modules["__main__"]
        with holding_ctrl_c(), _environment():
            sys.modules["__main__"] = ModuleType("__main__")  # which has no file that the worker would run
            try:
                super().start()
            finally:
                sys.modules["__main__"] = main


@contextmanager
def _environment() -> Iterator[None]:
    """Set what a worker looks at before its first line runs; only for the time of the block."""
    # From Python 3.11 on the second one keeps files in the user's directory from being taken for libraries.
    wanted = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# In a worker

_counted: Any = None  # bytes of text done by all workers together


def _begin(counted: Any) -> None:
    global _counted
    _counted = counted
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; one decides
    os.dup2(2, 1)  # what a library prints is no part of a report
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _count(num_bytes: int) -> None:
    with _counted.get_lock():
        _counted.value += num_bytes


@functools.cache
def _tokenizer(path: Path) -> tuple[Tokenizer, Callable[[list[str]], list[bytes]]]:
    tokenizer = load_tokenizer(path)
    return tokenizer, token_encoder(tokenizer)


def do_unit(
    number: int,
    parts: Sequence[Part],
    sidecar: Path,
    extra: dict[str, Any],
    *,
    directory: Path,
    text_column: str,
    val_fraction: float,
    seed: int,
    skip_bad: bool,
) -> tuple[int, int]:
    """Tokenize parts of files into shards in `directory`, with the tokenizer that lies there.

    `sidecar` is written last, with what the manifest needs to know of the unit, and `extra`. A part that was made for
    this unit alone, from a stream, is then removed. The other arguments are those of `prepare`.

    Returns:
        The bytes of text, and those in files that it came from.
    """
    tokenizer, encode = _tokenizer(directory / TOKENIZER_FILE)
    draw = random.Random(f"{seed}/{number}").random
    skipped = Skipped(skip_bad)
    documents = (document for part in parts for document in read_source(part, text_column, skipped))
    done = write_unit(
        number, documents, directory, tokenizer, encode, choose=lambda: draw() < val_fraction, progress=_count
    )
    write_text(sidecar, json.dumps({**done, "skipped_count": skipped.count, "skipped": skipped.named, **extra}))
    for part in parts:
        if part.name:
            os.unlink(part.path)
    return done["bytes"], sum(part.size for part in parts)


def sample_texts(samples: Sequence[tuple[Part | Input, int]], size: int, column: str, skip_bad: bool) -> Iterator[str]:
    """Yield text to train a tokenizer on, in pieces.

    Args:
        samples: Parts and streams, and how many bytes to take from the beginning of each. A stream, whose length nobody
            knows, gives more where others gave less.
        size: The most bytes in all, but for the last piece of each.
        column: The name of the text.
        skip_bad: Whether to pass over what cannot be read.

    Raises:
        ValueError: an input cannot be used, and `skip_bad` is false.
    """
    skipped = Skipped(skip_bad)
    room = size - sum(quota for _, quota in samples)  # that no quota has claimed
    for source, quota in samples:
        left = quota + (max(room, 0) if source.kind in STREAMS else 0)
        before = left
        for piece in (piece for document in read_source(source, column, skipped) for piece in document.pieces):
            yield piece
            left -= len(piece.encode())
            if left <= 0:
                break
        room += quota - (before - left)


def make_tokenizer(kind: str, vocab_size: int | None, to: Path, *sample: Any) -> int:
    """Train a tokenizer on `sample_texts(*sample)`, on every core, and write it; return its vocab_size."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = train_tokenizer(kind, sample_texts(*sample), vocab_size)
    tokenizer.save(to)
    return tokenizer.vocab_size
