"""The command `tinyllm`, also as `python -m tinyllm`. Nothing is imported here before Ctrl-C has its one line."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Run the command line; exits with 0, with 2 for bad input, with 130 after Ctrl-C."""
    # A program that was started in the background is not to be interrupted: then SIGINT is ignored, and stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    from tinyllm.cli import app

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


def _leave(number: int, frame: Any) -> None:
    """End at once. An exception in the middle of an import may come out as another one, or be lost in a callback."""
    os.write(2, b"tinyllm: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
