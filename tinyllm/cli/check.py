"""The command check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.cli._app import app, one_line_errors, prepare_process

if TYPE_CHECKING:
    from tinyllm.check.run import Outcome


@app.command()
def check(
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Check only the kernels of this device. Default: those of both."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Make ten times as many calls, and check every instruction set of the processor."),
    ] = False,
) -> None:
    """Verify that each kernel computes what plain PyTorch does.

    Forward and backward, on this machine, with random shapes, strides and options in each dtype. The largest error may
    be twice that of PyTorch in the same dtype, plus some rounding steps. Each operator of each backend is tried in a
    process of its own with a time limit, so that one that crashes or hangs is only named. Exit status 1 where one
    fails or hangs.
    """
    with one_line_errors():
        prepare_process()
        from tinyllm.check import report
        from tinyllm.check.run import FAILED, HUNG, NOT_HERE, plan, run
        from tinyllm.ops import _products

        _products.setting()  # one that is wrong is no fault of the kernels
        outcomes: list[Outcome] = []

        def noted() -> Iterator[Outcome]:
            for outcome in run(plan(device, full), full):
                outcomes.append(outcome)
                yield outcome

        typer.echo(report.HEADER)
        for line in report.lines(noted()):
            typer.echo(line)
        typer.echo(report.summary(outcomes))
        if all(outcome.result == NOT_HERE for outcome in outcomes):
            typer.echo("Nothing was checked: there are no kernels here. `tinyllm info` says why.")
        raise typer.Exit(any(outcome.result in (FAILED, HUNG) for outcome in outcomes))
