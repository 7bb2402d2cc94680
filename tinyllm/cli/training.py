"""The command train."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.cli._app import SAMPLE_TEMPERATURE, SAMPLE_TOKENS, PresetName, app, one_line_errors, prepare_process, write
from tinyllm.presets import PRESETS, TrainConfig

if TYPE_CHECKING:
    from tinyllm.training import TrainResult

RUNS = Path("runs")
SAMPLE_PROMPT = "def"  # no space after it: a BPE's words bring their own


@app.command()
def train(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="More files or directories, as after --data."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Text files to train on, or directories of them (all text files below, but no "
            "hidden ones). Default: the source code of Python's own standard library, about 12 MB "
            "that every machine has.",
        ),
    ] = None,
    preset: Annotated[
        PresetName,
        typer.Option(
            help="The size of the model: "
            + "; ".join(f"{name} {p.embedding_dim}/{p.hidden_dim}/{p.num_layers}" for name, p in PRESETS.items())
            + " (embedding / hidden dimension / layers).",
        ),
    ] = "tiny",
    tokenizer: Annotated[
        Literal["word", "char", "bpe"],
        typer.Option(
            help="What a token is: a word, a character, or a piece of a word that the text teaches.",
        ),
    ] = "bpe",
    vocab_size: Annotated[int | None, typer.Option(help="The most tokens that the tokenizer may know.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence: as far back as the model can look.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share of activations dropped in training, from 0 to 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text, same machine: the same model.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for all results. Default: runs/PRESET-NUMBER, a new one."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out; files of others stay."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Train a model, and show a sample of what it writes.

    With no option: a small model on the source code of Python's standard library, in about a
    minute. What an option leaves open, the preset decides. Ctrl-C ends the training early and keeps
    the model.
    """
    with one_line_errors():
        given = [*(data or []), *(paths or [])]
        config = TrainConfig.from_preset(
            preset,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            lr=lr,
            dropout=dropout,
            seed=seed,
            device=device,
        )
        prepare_process()
        from tinyllm import training

        start = time.perf_counter()
        with _run_folder(out, preset) as folder:
            result = training.train(config, folder, given or None, overwrite=overwrite, say=typer.echo)
        _show(result, SAMPLE_PROMPT if not given else None, time.perf_counter() - start)
        if result.interrupted:
            raise typer.Exit(130)


def _show(result: TrainResult, prompt: str | None, seconds: float) -> None:
    """What came of a training: a sample, the loss, where everything is, what to do next."""
    from tinyllm.data import first_tokens
    from tinyllm.generation import stream_text

    tokenizer = result.tokenizer
    # On text of the user's own nobody knows a good beginning but the text itself.
    start = prompt or first_tokens(result.out, tokenizer.vocab_size, 16)
    shown = prompt or tokenizer.decode(start)  # type: ignore[arg-type]
    rule = "-" * 72
    typer.echo(f"\nA sample, going on from {shown!r}:\n{rule}")
    write(shown)
    for piece in stream_text(result.model, tokenizer, start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0):
        write(piece)
    typer.echo(f"\n{rule}")
    if result.interrupted:
        typer.echo(f"Interrupted: the model is saved as it was after step {result.steps}.")
    loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.3f}"
    typer.echo(f"{result.steps} steps, {seconds:.0f} s{loss}. Everything is in {result.out}:")
    for name in sorted(path.name for path in result.out.iterdir() if path.is_file()):
        typer.echo(f"  {name}")
    run = shlex.quote(str(result.out))
    typer.echo(f'Write more: tinyllm generate --run {run} --prompt "{prompt or "TEXT"}"')


@contextmanager
def _run_folder(out: Path | None, preset: str) -> Iterator[Path]:
    """`out`, or else runs/PRESET-NUMBER with the first free number; gone again if nothing came into it."""
    if out is not None:
        yield out
        return
    number = 1
    while True:
        folder = RUNS / f"{preset}-{number}"
        try:  # made at once, so that a training that starts meanwhile takes another number
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    try:
        yield folder
    finally:
        for path in (folder, RUNS):
            with suppress(OSError):  # not empty
                path.rmdir()
