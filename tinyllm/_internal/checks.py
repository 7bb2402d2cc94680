"""Checks of arguments: each error names the argument, what it was and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence


def check_int(name: str, value: object, minimum: int) -> int:
    """Return `value` as an int; it may be of any integer type but bool. TypeError, ValueError."""
    try:
        number = _index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer of at least {minimum}") from None
    if number < minimum:
        raise ValueError(f"{name} is {number}; it must be at least {minimum}")
    return number


def check_ints(name: str, value: object) -> int | list[int]:
    """Return an integer, or a sequence of them, as an int or a list of ints. TypeError."""
    try:
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return [_index(number) for number in value]
        return _index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer, or a list of integers") from None


def _index(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def check_probability(name: str, value: object) -> float:
    """Return `value` as a float in [0, 1). TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number from 0 up to, but not including, 1")
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be from 0 up to, but not including, 1")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float that is above 0 and finite. TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a positive number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")
    return float(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`. ValueError."""
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return value


def check_heads(embedding_dim: int, num_heads: int) -> None:
    """Both at least 1, and embedding_dim a multiple of num_heads. TypeError, ValueError."""
    check_int("embedding_dim", embedding_dim, 1)
    check_int("num_heads", num_heads, 1)
    if embedding_dim % num_heads:
        raise ValueError(
            f"embedding_dim is {embedding_dim} and num_heads {num_heads}; embedding_dim must be divisible by num_heads"
        )
