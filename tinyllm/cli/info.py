"""The command info."""

from __future__ import annotations

from typing import Annotated

import typer

from tinyllm.cli._app import app, one_line_errors, prepare_process


@app.command()
def info(
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="First measure for some seconds whose matrix products are faster here, best while nothing else runs, "
            "and write that down.",
        ),
    ] = False,
) -> None:
    """Show versions, what is built, and what serves each operator.

    For each operator: the backend that serves it here, and why the others do not.
    """
    with one_line_errors():
        prepare_process(computes=tune)  # else it shows what a program of the user's own would have
        from tinyllm._info import print_info

        print_info(tune)
