"""The command doctor."""

from __future__ import annotations

import typer

from tinyllm.cli._app import app, one_line_errors


@app.command()
def doctor() -> None:
    """Find what is wrong with the installation, and say what mends it.

    Each finding has its cost and the command that mends it. The exit status is 1 if something is wrong, and 0 if there
    is only advice, about what may be meant to be as it is.
    """
    # Without prepare_process, which changes what is looked at: a program of the user's own has the defaults.
    with one_line_errors():
        from tinyllm._doctor import print_diagnosis

        status = print_diagnosis()
    raise typer.Exit(status)
