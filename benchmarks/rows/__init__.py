"""The rows of the comparison: a file for each kind of operator, and one for whole models."""

from __future__ import annotations

from collections import Counter

from ..row import Row, Target
from . import attention, embedding, launch, linear, losses, model, norms, optimizer, writing


def rows(target: Target) -> list[Row]:
    """Return all rows of a CPU, or of a GPU.

    Those of a GPU come in the order in which they are to be measured, as time may run out there: the rows of the
    headline first, and one of each section before a second one of any.
    """
    files = [embedding, norms, attention, linear, losses, optimizer, writing, model]
    found = [row for file in [*files, launch] for row in file.rows(target)]
    if not target.gpu:
        return found
    ranks: Counter[tuple[str, bool]] = Counter()
    order = []
    for row in found:
        kind = row.section, row.headline
        order.append((not row.headline, ranks[kind]))
        ranks[kind] += 1
    return [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
