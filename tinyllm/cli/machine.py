"""The commands about this machine and others: bench, check, estimate, info."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.cli._app import PresetName, app, one_line_errors, prepare_process
from tinyllm.presets import PRESETS, TrainConfig

if TYPE_CHECKING:
    from tinyllm.check.run import Outcome


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
) -> None:
    """Compare the speed of every operator and the model with PyTorch.

    The comparison is with PyTorch and torch.compile, on this machine. Each result is checked before it is timed. A
    whole run takes a quarter of an hour.

    For example: tinyllm bench --only "causal attention forward"
    """
    with one_line_errors():
        missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing; pip install 'tinyllm[test]' brings what bench needs")
        prepare_process()
        from tinyllm.benchmarks.run import bench

        raise typer.Exit(bench(only, quick, out))


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
        from tinyllm import estimate as estimates

        model = config.model_config(PRESETS[preset].vocab_size)
        settings = estimates.Settings(devices, batch_size, config.seq_len, precision, device_memory, peak_tflops, mfu)
        found = estimates.estimate(
            model, devices=devices, batch_size=batch_size, precision=precision, checkpointing=checkpointing
        )
        typer.echo(estimates.report(preset, model, found, settings))


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
        prepare_process()
        from tinyllm._info import print_info

        if tune:
            from tinyllm.ops import _products

            _products.tune()
            typer.echo(f"Wrote {_products.tuned_file()}\n")
        print_info()
