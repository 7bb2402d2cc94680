"""Numbers and names as people write them, for messages and reports."""

from __future__ import annotations


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return "1 file" or "2,000 files"; `plural` is for a noun that does not take an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that fits it, of powers of ten: "880 bytes", "11.3 kB", "1.2 GB"."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.99995 * factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return count(round(num_bytes), "byte")


def binary_size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that fits it, of powers of two: "15.2 MiB", "80.0 GiB"."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if num_bytes >= 0.99995 * 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """Return a time in the unit that fits it: "0.5 seconds", "3.0 hours", "1,200.0 years"."""
    for length, unit in ((365.25 * 86_400, "years"), (86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def option(name: str) -> str:
    """Return a parameter's name as it is typed on the command line: "seq_len" as "--seq-len"."""
    return "--" + name.replace("_", "-")


def short_number(value: float) -> str:
    """Return, as 1.25M, a number of at most four digits, with a letter for its size."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def shortened(text: str, most: int) -> str:
    """Return `text`, without its middle if it is longer than `most`."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
