"""The command bench."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tinyllm._internal.extras import check_extra
from tinyllm.cli._app import app, one_line_errors, prepare_process


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Give a first impression, in a few minutes.")] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Measure only rows whose name contains this; * and ? match anything."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write JSON and pictures there. Default: benchmarks/results for a whole run, nothing for a part.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Measure nothing: write DIR/index.html, a page that shows all stored results.",
        ),
    ] = None,
) -> None:
    """Compare the speed of every operator and the model with PyTorch.

    The comparison is with PyTorch and torch.compile, on this machine. Each result is checked before it is timed. A
    whole run takes a quarter of an hour.

    For example: tinyllm bench --only "causal attention forward"
    """
    with one_line_errors():
        if report is not None:
            others = {"--quick": quick, "--only": only is not None, "--out": out is not None}
            if given := [name for name, is_given in others.items() if is_given]:
                raise ValueError(f"--report measures nothing, and goes without {' and '.join(given)}")
            check_extra("bench", "plotly")
            from tinyllm.benchmarks.html_report import write_report

            typer.echo(f"Written: {write_report(report)}")
            return
        missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing; the extra tinyllm[test] brings what bench needs")
        prepare_process()
        from tinyllm.benchmarks.cpu import bench

        raise typer.Exit(bench(only, quick, out))
