"""Ctrl-C and SIGTERM, before a command has begun and while a training is at work."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tinyllm._internal.forks import in_forked_processes

_PATIENCE = 3.0  # seconds from a second signal to the end, if the step under way has not come to its own


def end_at_once() -> None:
    """Have Ctrl-C end the process. An exception amid an import may come out as another one, or be lost in a callback.

    A program that was started in the background is not to be interrupted: then SIGINT is ignored, and stays so. Of
    several processes on a machine the first one decides, and ends the others.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, as Python does: there is something to clean up now."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: Any) -> None:
    os.write(2, b"tinyllm: interrupted\n")
    os._exit(128 + number)


@contextmanager
def holding_ctrl_c() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done; what the block starts has SIGINT blocked from its first moment.

    A terminal sends it to all processes. Where signals cannot be blocked, as on Windows, it does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    main = threading.current_thread() is threading.main_thread()  # which alone handles signals
    noted = False

    def note(number: int, frame: Any) -> None:  # another thread, which does not block it, may get it meanwhile
        nonlocal noted
        noted = True

    before = signal.signal(signal.SIGINT, note) if main else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started has the same mask
    try:
        yield
    finally:
        try:
            if main:
                signal.signal(signal.SIGINT, before)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if noted:
        signal.raise_signal(signal.SIGINT)


class Stop:
    """The number of the signal that asked a training to end; None if none did."""

    number: int | None = None


@contextmanager
def noting_signals() -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM; a second one acts as ever, also amid a step that takes very long.

    Only the main thread may take signals; in another one nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    # What is ignored stays so: a program that a script has started in the background is not meant by Ctrl-C.
    taken = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in taken}
    # Python calls handlers between two steps of its own, and an operator may take minutes.
    in_forked_processes(_forget)
    arrived, arriving = os.pipe()
    os.set_blocking(arriving, False)
    written_before = signal.set_wakeup_fd(arriving, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_after_two, args=(arrived, set(taken)), daemon=True)
    watch.start()
    try:
        yield stop
    finally:
        restore()
        signal.set_wakeup_fd(written_before)
        os.close(arriving)
        watch.join()
        os.close(arrived)


def _forget() -> None:
    """Keep to this process which signals it gets."""
    with suppress(ValueError):  # not forked by the main thread, which alone may say so
        signal.set_wakeup_fd(-1)


def _end_after_two(arrived: int, numbers: set[int]) -> None:
    """Read the numbers of signals as they arrive, until the other end closes or a second one was without effect."""
    found: list[int] = []
    deadline = math.inf
    while True:
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        if not select.select([arrived], [], [], wait)[0]:
            _end(found[-1], None)
        number = os.read(arrived, 1)
        if not number:
            return
        if number[0] in numbers:
            found.append(number[0])
            if len(found) == 2:
                deadline = time.monotonic() + _PATIENCE
