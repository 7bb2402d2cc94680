"""The table that `tinyllm check` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

from tinyllm.check.run import FAILED, HUNG, NOT_HERE, PASSED, Outcome

HEADER = f"{'device':<8}{'operator':<22}{'backend':<13}{'result':<10}"


def lines(outcomes: Iterable[Outcome]) -> Iterable[str]:
    """Yield a line for each outcome as it comes; neighbours that are not here for one reason share one."""
    for _, group in groupby(outcomes, key=_together):
        first, *others = group
        operator = f"{first.check.operator} +{len(others)}" if others else first.check.operator
        check = first.check
        yield f"{check.device:<8}{operator:<22}{check.where:<13}{first.result:<10}{first.text}"


def _together(outcome: Outcome) -> tuple[object, ...]:
    check = outcome.check
    if outcome.result == NOT_HERE:
        return check.device, check.backend, outcome.text
    return check.device, check.where, check.operator


def summary(outcomes: Iterable[Outcome]) -> str:
    """Return how many passed, failed, hung and are not here."""
    counts = Counter(outcome.result for outcome in outcomes)
    return ", ".join(f"{counts[result]} {result.lower()}" for result in (PASSED, FAILED, HUNG, NOT_HERE))
