"""One declaration for each setting of a config: its default, what it allows, and the sentences that explain it.

The command line's options, the checks of files and the config's own docstring are made from it.
"""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from tinyllm._internal.words import option
from tinyllm.config.presets import PRESETS

Check = Callable[[str, Any], None]

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Setting:
    """A field of a config, as `setting` declares it."""

    name: str
    default: Any
    help: str
    group: str
    allowed: tuple[str, ...] | Check | None
    metavar: str | None
    by_preset: bool

    def validate(self, value: Any) -> None:
        """Raise a ValueError if `value` is not allowed; None is where it is the default."""
        if isinstance(self.allowed, tuple):
            if value not in self.allowed:
                raise ValueError(f"{self.name} is {value!r}; allowed are {', '.join(map(repr, self.allowed))}")
        elif self.allowed is not None and not (value is None and self.default is None):
            self.allowed(self.name, value)

    def option_help(self, preset: str, default: Any = None) -> str:
        """Return the help of the command line's option, where `preset` and `default` hold if nothing is typed."""
        value = self.default if default is None else default
        if self.by_preset and default is None:
            words = f"the preset's ({preset}: {_short(getattr(PRESETS[preset], self.name))})"
        else:
            words = option(f"no_{self.name}") if value is False and default is None else _short(value)
        return self.help.replace("{default}", words)

    def field_help(self) -> str:
        """Return the help of the config's field, in Python's terms."""
        default = f"{self.default!r}, and the preset's in `from_preset`" if self.by_preset else repr(self.default)
        text = self.help.replace("{default}", default)
        return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda found: f"`{found[1].replace('-', '_')}`", text)


def setting(
    default: Any,
    group: str,
    help: str,
    allowed: tuple[str, ...] | Check | None = None,
    *,
    metavar: str | None = None,
    by_preset: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        default: the field's.
        group: the heading under which the command line lists the option; "": there is no option, only the field.
        help: what it does, in sentences. Other settings are named as options ("--seq-len"). A last sentence names the
            default, unless one begins with "Default:", where "{default}" stands for it.
        allowed: the values that are, or a function that raises a ValueError for a name and a value out of range.
        metavar: what the command line's help shows for a value.
        by_preset: whether the command line takes the default from the preset.
    """
    text = help if "Default:" in help else f"{help} Default: {{default}}."
    details = {"help": text, "group": group, "allowed": allowed, "metavar": metavar, "by_preset": by_preset}
    return field(default=default, metadata=details)


def settings_of(config: type) -> dict[str, Setting]:
    """Return the settings that a config class declares, by their names and in their order."""
    return {item.name: Setting(item.name, item.default, **item.metadata) for item in fields(config)}


def documented(config: _Class) -> _Class:
    """Insert what its settings declare into a config class's docstring."""
    before, raises, errors = inspect.cleandoc(config.__doc__ or "").partition("Raises:")
    fields = [
        textwrap.fill(f"    {name}: {item.field_help()}", 116, subsequent_indent="        ", break_on_hyphens=False)
        for name, item in settings_of(config).items()
    ]
    config.__doc__ = "\n".join([f"{before}Args:", *fields, "", f"{raises}{errors}"])
    return config


def at_least(low: float) -> Check:
    """Return a check that a number is not below `low`."""
    return between(low, math.inf)


def between(low: float, high: float) -> Check:
    """Return a check that a number is at least `low` and at most `high`."""

    def check(name: str, value: Any) -> None:
        if not low <= value <= high:  # false for nan, too
            most = f", at most {high}" if high < math.inf else ""
            raise ValueError(f"{name} is {value}; it must be at least {low}{most}")

    return check


def below_one(name: str, value: Any) -> None:
    """Check that a number is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")


def positive(name: str, value: Any) -> None:
    """Check that a number is above 0, and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a positive number")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
