"""The command `tinyllm`: train a small language model, let it write, see what is built.

Only what `--help` needs is imported at the top; torch takes a second, so it waits for a command.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.presets import PRESETS, TrainConfig

if TYPE_CHECKING:
    from tinyllm.training import TrainResult

RUNS = Path("runs")
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.7  # at 1 a model this young wanders off
SAMPLE_PROMPT = "def"  # no space after it: a BPE's words bring their own
_TRACEBACK = "TINYLLM_TRACEBACK"  # set it to see where an error comes from

# The keys of PRESETS: a test compares them.
PresetName = Literal["tutorial", "tiny", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3"]

app = typer.Typer(
    name="tinyllm",
    help="Train a small language model on real text, and let it write.\n\nStart with: tinyllm train",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; exits with 0, with 2 for bad input, with 130 after Ctrl-C."""
    app()


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
    with _one_line_errors():
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
        _prepare_process()
        from tinyllm import training

        start = time.perf_counter()
        with _run_folder(out, preset) as folder:
            result = training.train(config, folder, given or None, overwrite=overwrite, say=typer.echo)
        _show(result, SAMPLE_PROMPT if not given else None, time.perf_counter() - start)
        if result.interrupted:
            raise typer.Exit(130)


@app.command()
def generate(
    run: Annotated[Path, typer.Option(metavar="DIR", help="The folder that a training made.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = SAMPLE_TOKENS,
    temperature: Annotated[
        float,
        typer.Option(help="0: always the likeliest token; 1: as the model expects; above: wilder."),
    ] = SAMPLE_TEMPERATURE,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens only.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text. Default: a new one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Let a trained model go on from a text.

    For example: tinyllm generate --run runs/tiny-1 --prompt "def"
    """
    with _one_line_errors():
        _prepare_process()
        from tinyllm.checkpoint import load_run
        from tinyllm.generation import stream_text
        from tinyllm.training import choose_device

        if seed is None:  # torch's own default is the same in every process
            seed = secrets.randbits(32)
        model, tokenizer, _ = load_run(run, choose_device(device))
        pieces = stream_text(model, tokenizer, prompt, max_new_tokens, temperature, top_k, seed=seed)
        _write(prompt)
        for piece in pieces:
            _write(piece)
        _write("\n")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A first impression, in a few minutes.")] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Rows whose name contains this; * and ? match anything."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write JSON and pictures there. Default, of a whole run: benchmarks/results."),
    ] = None,
) -> None:
    """Compare every operator and the model with PyTorch and torch.compile, on this machine.

    Each result is checked before it is timed. A whole run takes a quarter of an hour. For example:
    tinyllm bench --only "causal attention forward"
    """
    with _one_line_errors():
        missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing; pip install 'tinyllm[test]' brings what bench needs")
        _prepare_process()
        from tinyllm.benchmarks.run import bench

        raise typer.Exit(bench(only, quick, out))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Option(metavar="DIR", help="The folder that a training made.")],
    data: Annotated[
        list[Path], typer.Option(metavar="PATH...", help="Text files, or directories of them, as in train.")
    ],
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="More files or directories, as after --data.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Measure how well a trained model predicts texts: loss, perplexity, bits per byte.

    Bits per byte compare models whatever their tokenizers. For example: tinyllm eval --run
    runs/tiny-1 --data new.txt
    """
    with _one_line_errors():
        _prepare_process()
        from tinyllm.checkpoint import load_run
        from tinyllm.data import find_files
        from tinyllm.evaluation import evaluate_texts
        from tinyllm.training import choose_device

        corpus = find_files([*data, *(paths or [])])
        model, tokenizer, _ = load_run(run, choose_device(device))
        found = evaluate_texts(model, tokenizer, corpus.texts(0), batch_size)
        typer.echo(
            f"{found.documents:,} documents, {found.num_bytes:,} bytes, {found.tokens:,} tokens\n"
            f"loss           {found.loss:.4f} nats a token\n"
            f"perplexity     {found.perplexity:.2f}\n"
            f"bits per byte  {found.bits_per_byte:.4f}"
        )
        if found.unknown:
            typer.echo(f"{found.unknown:,} tokens are not in the vocabulary: bits per byte do not compare")


@app.command()
def estimate(
    preset: Annotated[PresetName, typer.Option(help="The size of the model, as in train.")] = "gpt2",
    devices: Annotated[int, typer.Option(help="How many devices share the work.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences on each device at a time.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence. Default: the preset's.")] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "bf16-true"],
        typer.Option(help="Of weights and computation, as Lightning names them."),
    ] = "bf16-mixed",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Keep only the blocks' inputs, and compute the rest again.")
    ] = False,
    device_memory: Annotated[float, typer.Option(help="GiB of a device.")] = 80.0,
    peak_tflops: Annotated[float, typer.Option(help="A device's peak, in TFLOP/s. Default: an H100's, bf16.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="The fraction of it that training reaches, above 0 and to 1.")] = 0.4,
) -> None:
    """Say what training a model of a preset's size takes: parameters, memory, time. Nothing is trained.

    For example: tinyllm estimate --preset gpt3 --devices 64 --checkpointing
    """
    with _one_line_errors():
        for name, value in (("device-memory", device_memory), ("peak-tflops", peak_tflops), ("mfu", mfu)):
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name} is {value}; a positive number is needed")
        if mfu > 1:
            raise ValueError(f"--mfu is {mfu}; at most 1 is allowed")
        config = TrainConfig.from_preset(preset, seq_len=seq_len)
        _prepare_process()
        from tinyllm import estimate as estimates

        model = config.model_config(PRESETS[preset].vocab_size)
        settings = estimates.Settings(devices, batch_size, config.seq_len, precision, device_memory, peak_tflops, mfu)
        found = estimates.estimate(
            model, devices=devices, batch_size=batch_size, precision=precision, checkpointing=checkpointing
        )
        typer.echo(estimates.report(preset, model, found, settings))


@app.command()
def info() -> None:
    """Show versions, what is built, and which backend serves each operator, and why."""
    with _one_line_errors():
        _prepare_process()
        from tinyllm.info import print_info

        print_info()


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        try:
            typer.echo(f"tinyllm {version('tinyllm')}")
        except PackageNotFoundError:
            typer.echo("tinyllm, run from its sources, not installed")
        raise typer.Exit


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
    _write(shown)
    for piece in stream_text(result.model, tokenizer, start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0):
        _write(piece)
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


def _prepare_process() -> None:
    """What a program may do to its own process, and a library may not."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model may write what the terminal cannot show
            stream.reconfigure(errors="replace")
    from tinyllm.allocator import tune_allocator

    tune_allocator()  # where it does not apply, `tinyllm info` says why


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit status 2."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has gone, such as `| head`: typer ends in silence
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        line = " ".join(str(error).split())
        typer.echo(f"tinyllm: error: {line}", err=True)
        raise typer.Exit(2) from None
