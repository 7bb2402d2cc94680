"""Processes that are forked from this one, such as those that read data ahead, inherit more than they should keep."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable


@functools.cache
def in_forked_processes(action: Callable[[], None]) -> None:
    """Have every process that is forked from now on call `action` first; telling it twice is once."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=action)
