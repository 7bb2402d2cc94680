"""Libraries that the package works without, and the extras of `pip install` that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Have a library that is missing in the block's imports named together with the extra that brings it.

    Raises:
        ModuleNotFoundError: such a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tinyllm"):
            raise
        raise missing(error.name, extra) from error


def check_extra(extra: str, *names: str) -> None:
    """Raise ModuleNotFoundError, as `from_extra` does, unless these modules are installed."""
    for name in names:
        if find_spec(name) is None:
            raise missing(name, extra)


def missing(name: str, extra: str) -> ModuleNotFoundError:
    """Return the error that a module is not installed, and which extra brings it."""
    command = f'pip install "tinyllm[{extra}]"'
    return ModuleNotFoundError(f"{name} is not installed; {command} brings it", name=name)
