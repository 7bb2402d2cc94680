"""The command estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.cli._app import PresetName, app, one_line_errors, prepare_process
from tinyllm.config.presets import PRESETS
from tinyllm.config.training import TrainConfig

if TYPE_CHECKING:
    pass


@app.command()
def estimate(
    preset: Annotated[
        PresetName,
        typer.Option(metavar="NAME", help="The model: a preset of train, as `tinyllm train --help` lists them."),
    ] = "gpt2",
    devices: Annotated[int, typer.Option(help="How many devices share the work.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences on each device at a time.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence. Default: the preset's.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Transformer blocks. Default: the preset's.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads of a block. Default: the preset's.")] = None,
    embedding_dim: Annotated[int | None, typer.Option(help="Width of the model. Default: the preset's.")] = None,
    hidden_dim: Annotated[
        int | None,
        typer.Option(help="Width of the feed-forward layers. Default: as many times --embedding-dim as in the preset."),
    ] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "bf16-true"],
        typer.Option(
            help="Number formats: 32-true computes in float32, bf16-mixed in bfloat16 with float32 weights, and "
            "bf16-true has bfloat16 for both."
        ),
    ] = "bf16-mixed",
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Keep only the blocks' inputs for backward, and compute the rest again."),
    ] = False,
    device_memory: Annotated[float, typer.Option(help="Memory of a device, in GiB.")] = 80.0,
    peak_tflops: Annotated[
        float, typer.Option(help="The peak of a device, in TFLOP/s; the default is an H100's, in bfloat16.")
    ] = 989.0,
    mfu: Annotated[
        float, typer.Option(help="The fraction of the peak that training reaches, above 0 and at most 1.")
    ] = 0.4,
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
        config = TrainConfig.from_preset(
            preset,
            seq_len=seq_len,
            num_layers=num_layers,
            num_heads=num_heads,
            embedding_dim=embedding_dim,
            hidden_dim=hidden_dim,
        )
        prepare_process()
        from tinyllm.training import estimate as estimates

        model = config.model_config(PRESETS[preset].vocab_size)
        settings = estimates.Settings(devices, batch_size, config.seq_len, precision, device_memory, peak_tflops, mfu)
        found = estimates.estimate(
            model, devices=devices, batch_size=batch_size, precision=precision, checkpointing=checkpointing
        )
        typer.echo(estimates.report(preset, model, found, settings))
