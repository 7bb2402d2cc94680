"""Lets a program keep the memory of large tensors, which glibc would hand back to the system at every release."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# The most that mallopt's int can say: larger blocks still go back.
_KEPT_BYTES = 2**31 - 1
# What the user decided already; glibc reads them at the start of a process.
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES = ("glibc.malloc.mmap_threshold", "glibc.malloc.mmap_max", "glibc.malloc.trim_threshold")

_tuned = False


def tune_allocator() -> str | None:
    """Tell glibc's malloc to keep freed blocks of up to 2 GiB for the next tensor, for the whole process.

    By default glibc maps each block above 32 MiB anew and unmaps it when it is freed, so that every large tensor is
    page-faulted in again, zeroed by the kernel: several times the cost of a memory-bound operation. The price: memory
    that was used once stays with the process. Importing tinyllm does not call this; the command line does.

    Returns:
        None when it is in effect, otherwise the reason why it does not apply: the C library is not glibc, another
        allocator (jemalloc, tcmalloc, ...) is loaded in its place, or the environment has set it already. Calling it
        again changes nothing.
    """
    global _tuned
    reason = _why_not()
    if reason is None and not _tuned:
        mallopt = ctypes.CDLL(None).mallopt
        # Before version 2.35 glibc refuses a threshold above 32 MiB; it can be told never to map a block at all.
        kept = mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) or mallopt(_M_MMAP_MAX, 0)
        if not (kept and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)):
            return "glibc's mallopt refused"
        _tuned = True
    return reason


def allocator_state() -> str:
    """Return the description of the allocator that `tinyllm.info()` shows."""
    if _tuned:
        return "glibc, tuned: it keeps the memory of large tensors"
    reason = _why_not()
    return f"not tuned: {reason}" if reason else "glibc's defaults: tinyllm.tune_allocator() has not been called"


@cache
def _why_not() -> str | None:
    """Why mallopt would do nothing, or nothing that the user wants; None when it would."""
    if not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return "the C library is not glibc"
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
        glibc = ctypes.CDLL("libc.so.6")
    except (OSError, ValueError):  # musl knows neither
        version = None
    if not version or not version.startswith("glibc"):
        return "the C library is not glibc"
    if _address(ctypes.CDLL(None)) != _address(glibc):
        return "another allocator is loaded in front of glibc's"
    variables = [name for name in _VARIABLES if name in os.environ]
    tunables = [name for name in _TUNABLES if name in os.environ.get("GLIBC_TUNABLES", "")]
    if variables or tunables:
        return f"the environment sets {', '.join([*variables, *tunables])}"
    return None


def _address(library: ctypes.CDLL) -> int | None:
    """Return the address of posix_memalign, by which PyTorch allocates tensors, as this library's users find it.

    Not malloc's: an executable that is linked to a fixed address, as Debian's Python is, has an address of its own for
    malloc.
    """
    return ctypes.cast(library.posix_memalign, ctypes.c_void_p).value
