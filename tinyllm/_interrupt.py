"""What Ctrl-C does before a command has begun: one line, and the end."""

from __future__ import annotations

import os
import signal
from typing import Any


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
