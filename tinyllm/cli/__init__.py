"""The command `tinyllm`: train a small language model, let it write, see what is built. `tinyllm.__main__` starts it.

Only what `--help` needs is imported at the top of these files; torch takes a second, so it waits for a command.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from tinyllm.cli import (
    bench,
    check,
    doctor,
    estimate,
    evaluate,
    export,
    generate,
    info,
    plot,
    prepare,
    quantize,
    runs,
    train,
)
from tinyllm.cli._app import app

__all__ = [
    "app",
    "bench",
    "check",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "info",
    "plot",
    "prepare",
    "quantize",
    "runs",
    "train",
]


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        try:
            typer.echo(f"tinyllm {version('tinyllm')}")
        except PackageNotFoundError:
            typer.echo("tinyllm, run from its sources, not installed")
        raise typer.Exit
