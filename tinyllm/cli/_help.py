"""Layout of a command's help: options in groups, in plain text that reads well in any terminal and in a pipe."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# As a newcomer meets them.
_COMMANDS = (
    *("train", "generate", "eval", "quantize", "export", "runs", "plot"),
    *("prepare", "estimate", "info", "doctor", "check", "bench"),
)


_WORDS = (  # of the library that reads values, and ours
    (re.compile(r"Value error, "), ""),
    (re.compile(r"Input should be a valid integer\b.*"), "a whole number is needed"),
    (re.compile(r"Input should be a valid number\b.*"), "a number is needed"),
)


class Command(TyperCommand):
    """A command whose options are listed under their `rich_help_panel`, in the order in which these first come.

    Typer itself shows such panels in boxes only, drawn by rich, which leave half of 80 columns to the text.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed; errors speak of numbers, not of a library's types."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if isinstance(message := getattr(error, "message", None), str):
                for pattern, words in _WORDS:
                    message = pattern.sub(words, message)
                error.message = message  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and each group of options as a section of its own."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            if param.param_type_name == "argument":
                # A metavar says it; typer adds a Python type's name behind it.
                sections["Arguments"].append((name.split(" <")[0], text))
            else:
                panel = getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(panel, []).append((_plain(name), text))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """The program, whose help lists its commands in the order in which they are met."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return sorted(super().list_commands(ctx), key=_COMMANDS.index)


class App(typer.Typer):
    """An application whose commands lay out their help so."""

    def command(self, *args: Any, **options: Any) -> Any:
        """Register a command; see `typer.Typer.command`."""
        return super().command(*args, **{"cls": Command} | options)


def _plain(name: str) -> str:
    """Replace a Python type's name by what is typed."""
    for kind, word in (("<int>", "NUMBER"), ("<float>", "NUMBER"), ("<str>", "TEXT"), ("<path>", "PATH")):
        name = name.replace(kind, word)
    return name
