"""How tables and numbers are written."""

from __future__ import annotations

from collections.abc import Sequence

MARK = "(!)"  # of what other programs disturbed


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines; the first one is the header."""
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return [lines[0], "|---|" + "---:|" * (len(table[0]) - 1), *lines[1:]]


def format_reason(text: str) -> str:
    """Return why there is no number, as a cell can hold it."""
    reason = " ".join(text.replace("|", "/").split())
    return reason if len(reason) <= 60 else f"{reason[:57]}..."


def format_time(seconds: float) -> str:
    """Return three digits and a unit."""
    for scale, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * scale < 999.5:
            return f"{format_digits(seconds * scale)} {unit}"
    return f"{format_digits(seconds)} s"


def format_digits(value: float) -> str:
    """Return three digits, or all before the point; two for what is very small."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
