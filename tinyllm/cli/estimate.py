"""The command estimate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tinyllm.cli._app import app, one_line_errors, prepare_process
from tinyllm.cli._options import with_settings
from tinyllm.config.presets import PRESETS, SIZES
from tinyllm.config.training import TrainConfig


@app.command()
@with_settings(
    ("preset", *SIZES, "seq_len", "precision", "checkpointing", "optimizer"), preset="gpt2", precision="bf16-mixed"
)
def estimate(
    devices: Annotated[int, typer.Option(help="How many devices share the work.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences on each device at a time.")] = 1,
    device_memory: Annotated[float, typer.Option(help="Memory of a device, in GiB.")] = 80.0,
    peak_tflops: Annotated[
        float, typer.Option(help="The peak of a device, in TFLOP/s; the default is an H100's, in bfloat16.")
    ] = 989.0,
    mfu: Annotated[
        float, typer.Option(help="The fraction of the peak that training reaches, above 0 and at most 1.")
    ] = 0.4,
    **settings: Any,
) -> None:
    """Say what parameters, memory and time a training takes.

    Nothing is trained.

    For example: tinyllm estimate --preset gpt3 --devices 64 --checkpointing
    """
    with one_line_errors():
        for name, value in (("device-memory", device_memory), ("peak-tflops", peak_tflops), ("mfu", mfu)):
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name} is {value}; a positive number is needed")
        if mfu > 1:
            raise ValueError(f"--mfu is {mfu}; at most 1 is allowed")
        config = TrainConfig.from_preset(**settings)
        prepare_process()
        from tinyllm.training import estimate as estimates

        model = config.model_config(PRESETS[config.preset].vocab_size)
        found = estimates.estimate(
            model,
            devices=devices,
            batch_size=batch_size,
            precision=config.precision,
            checkpointing=config.checkpointing,
            optimizer=config.optimizer,
        )
        machines = estimates.Settings(
            devices,
            batch_size,
            config.seq_len,
            config.precision,
            device_memory,
            peak_tflops,
            mfu,
            config.optimizer,
        )
        typer.echo(estimates.report(config.preset, model, found, machines))
