"""The command runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tinyllm._internal.words import short_number
from tinyllm.cli._app import app, one_line_errors, write
from tinyllm.runs.folder import RUNS
from tinyllm.runs.listing import RunInfo, describe_run, find_runs

if TYPE_CHECKING:
    from rich.table import Table


SortKey = Literal["when", "name", "loss", "best", "steps", "parameters", "speed"]

# What each is sorted by, and whether the largest comes first.
_SORTED: dict[str, tuple[Callable[[RunInfo], Any], bool]] = {
    "when": (lambda run: run.when, True),
    "name": (lambda run: str(run.path), False),
    "loss": (lambda run: run.val_loss, False),
    "best": (lambda run: run.best_val_loss, False),
    "steps": (lambda run: run.step, True),
    "parameters": (lambda run: run.parameters, True),
    "speed": (lambda run: run.tokens_per_s, True),
}
_COLOURS = {
    "finished": "green",
    "quantised": "green",
    "running": "cyan",
    "running?": "cyan",
    "interrupted": "yellow",
    "killed": "yellow",
    "broken": "red",
}


@app.command("runs")
def list_runs(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR", help="Run folders, or folders of them. Default: runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: all that is known, as JSON.")] = False,
    sort: Annotated[
        SortKey, typer.Option(help="Sort by this: the latest, the largest, the fastest or the lowest loss comes first.")
    ] = "when",
) -> None:
    """List runs with their steps, losses, speed and state.

    The losses are the last and the best validation loss. A run that has not done all its steps is running, interrupted
    (its weights are saved) or killed (the steps since its last checkpoint are lost). A folder of tinyllm quantize is
    listed with how its weights are stored.

    For example: tinyllm runs --sort best
    """
    with one_line_errors():
        found = [describe_run(folder) for folder in find_runs(directories or [RUNS])]
        value, largest = _SORTED[sort]
        known = sorted((run for run in found if value(run) is not None), key=value, reverse=largest)
        found = known + [run for run in found if value(run) is None]
        if as_json:
            write(json.dumps([run.to_dict() for run in found], indent=2) + "\n")
        elif not found:
            typer.echo(f"No runs below {', '.join(map(str, directories or [RUNS]))}.")
        else:
            _show(found, sort)


def _show(found: list[RunInfo], sort: str) -> None:
    """Print a table as wide as the terminal, or as wide as needed in a file, and what is wrong with broken runs."""
    from rich.console import Console

    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=shutil.get_terminal_size().columns if terminal else 1000, highlight=False, markup=False)
    # From a narrow terminal, one after the other; but not what the runs are sorted by.
    kept = {"speed": "tokens/s"}.get(sort, sort if sort != "when" else "")
    dropped = [name for name in ("tokens/s", "parameters", "preset", "when", "best", "weights") if name != kept]
    unused = {"weights"} if all(run.weights in (None, "float32") for run in found) else set()
    table = _table(found, unused)
    for count in range(1, len(dropped) + 1):
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
            break
        table = _table(found, unused.union(dropped[:count]))
    with console.capture() as capture:
        console.print(table)
    write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
    for run in found:
        if run.problem:
            typer.echo(f"\n{run.path} is broken: {' '.join(run.problem.split())}")


def _table(found: list[RunInfo], without: set[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    columns: dict[str, Callable[[RunInfo], str]] = {
        "run": lambda run: str(run.path),
        "preset": lambda run: run.preset or "",
        "weights": lambda run: run.weights or "",
        "parameters": lambda run: "" if run.parameters is None else short_number(run.parameters),
        "steps": lambda run: "" if run.step is None else f"{run.step:,}/{run.steps:,}",
        "loss": lambda run: _loss(run.val_loss),
        "best": lambda run: _loss(run.best_val_loss),
        "tokens/s": lambda run: "" if run.tokens_per_s is None else short_number(run.tokens_per_s),
        "when": lambda run: "" if run.when is None else datetime.fromtimestamp(run.when).strftime("%Y-%m-%d %H:%M"),
        "state": lambda run: run.state,
    }
    left = {"run", "preset", "weights", "when", "state"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown = {name: cell for name, cell in columns.items() if name not in without}
    for name in shown:
        # Where even this is too wide, the path goes on in the next line: cut short it would be of no use.
        overflow: Literal["fold", "ellipsis"] = "fold" if name == "run" else "ellipsis"
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != "run", overflow=overflow)
    for run in found:
        style = _COLOURS.get(run.state, "")
        table.add_row(*(Text(cell(run), style=style if name == "state" else "") for name, cell in shown.items()))
    return table


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
