"""The command plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tinyllm.cli._app import app, one_line_errors
from tinyllm.config.saved import read_config
from tinyllm.runs.folder import CURVE_FILE, METRICS_FILE
from tinyllm.runs.listing import tokens_per_step

COMPARISON = Path("comparison.png")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that trainings made.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The picture: .png, .svg or .pdf. Default: of a single run, loss_curve.png in its folder; of several, "
            "comparison.png here.",
        ),
    ] = None,
    x: Annotated[
        Literal["step", "tokens", "time"], typer.Option("--x", help="What to draw over: steps, tokens or time.")
    ] = "step",
    split: Annotated[
        Literal["val", "train", "both"],
        typer.Option(help="Which losses to compare; with both, those of training are thin."),
    ] = "both",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that this command did not draw.")
    ] = False,
) -> None:
    """Draw the losses of one run or of several.

    One run's picture has its learning rate and throughput, too. Runs that are under way can be drawn as well.

    For example: tinyllm plot runs/tiny-1 runs/tiny-2
    """
    with one_line_errors():
        single = len({run.resolve() for run in runs}) == 1
        if out is None:
            out = runs[0] / CURVE_FILE if single else COMPARISON
            own = single  # the training's picture of the same numbers
        else:
            own = False
        from tinyllm.runs import plot

        if out.suffix.lower() in plot.FORMATS and not (own or overwrite or plot.is_ours(out)):
            raise FileExistsError(
                f"out {out} is there, and tinyllm did not draw it; choose another name, or overwrite (--overwrite)"
            )
        if single:
            config = read_config(runs[0])
            data = config.get("data")
            name = data.get("name") if isinstance(data, dict) else None
            title = f"{config['training'].get('preset')} on {name}" if name else runs[0].resolve().name
            per_step = tokens_per_step(config)
            plot.plot_run(runs[0] / METRICS_FILE, out, title=title, x=x, tokens_per_step=per_step)
        else:
            plot.plot_comparison(runs, out, x=x, split=split)
        typer.echo(f"Drawn: {out}")
