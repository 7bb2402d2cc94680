"""The command train."""

from __future__ import annotations

import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tinyllm.cli._app import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    PresetName,
    app,
    is_worker,
    one_line_errors,
    prepare_process,
    write,
)
from tinyllm.presets import PRESETS, TrainConfig

if TYPE_CHECKING:
    from tinyllm.training import TrainResult

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
            "hidden ones); or one directory that `tinyllm prepare` made. Default: the source code of "
            "Python's own standard library, about 12 MB that every machine has.",
        ),
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="The size of the model: "
            + "; ".join(f"{name} {p.embedding_dim}/{p.hidden_dim}/{p.num_layers}" for name, p in PRESETS.items())
            + " (embedding / hidden dimension / layers). Default: tiny.",
        ),
    ] = None,
    tokenizer: Annotated[
        Literal["word", "char", "bpe"] | None,
        typer.Option(
            help="What a token is: a word, a character, or a piece of a word that the text teaches. Default: bpe. "
            "Prepared data bring their own.",
        ),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="The most tokens that the tokenizer may know.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step, on all devices together.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a sequence: as far back as the model can look.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"] | None,
        typer.Option(
            help="How the learning rate goes on after its rise; wsd: it stays, and falls in the last fifth. "
            "Default: cosine."
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps in which it rises. Default: 5 % of all, at most 500.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's, on matrices. Default: 0.1.")] = None,
    grad_clip: Annotated[float | None, typer.Option(help="The largest norm of the gradient. Default: 1.")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Share of activations dropped in training, from 0 to 1.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of the target's probability that all tokens get, from 0 to 1.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Average the weights over the steps, such as 0.999.")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing", help="Attention stops where a document ends.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same text, same machine: the same model. Default: 0.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for all results. Default: runs/PRESET-NUMBER, a new one."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out; files of others stay."),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on with the training in this folder, from its last checkpoint. Other options may change how it is "
            "computed (devices, strategy, ...) and how long it lasts, not what is trained.",
        ),
    ] = None,
    eval_interval: Annotated[
        int | None, typer.Option(help="Steps between validations. Default: ten in all, but 100 steps apart at least.")
    ] = None,
    log_interval: Annotated[int | None, typer.Option(help="Steps between lines of metrics. Default: 10.")] = None,
    checkpoint_interval: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: one at each validation.")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="How many of the last ones stay, besides the best. Default: 2.")
    ] = None,
    stop_on_save_error: Annotated[
        bool | None,
        typer.Option(
            "--stop-on-save-error",
            help="End if a checkpoint cannot be written. Default: say so, and go on.",
            show_default=False,
        ),
    ] = None,
    max_skipped_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps in a row that may be skipped, as their gradient is not finite, before training ends. "
            "Default: 10."
        ),
    ] = None,
    sample_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write at each validation, into samples.jsonl. Default: 40.")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Write TensorBoard's files, too.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or auto: a GPU if there is one. Default: auto.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="GPUs of this machine, or processes on its CPU. Default: 1.")
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Machines. Default: 1.")] = None,
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp", "deepspeed"] | None,
        typer.Option(
            help="How they share the work: ddp, each has the model; fsdp, each a part of it; deepspeed, ZeRO stage 2. "
            "Default: ddp where there is more than one."
        ),
    ] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "bf16-true"] | None,
        typer.Option(help="Of weights and computation, as Lightning names them. Default: 32-true."),
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(help="Parts in which a step is computed one after the other, to save memory.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing",
            help="Keep only the blocks' inputs for backward, and compute the rest again: less memory.",
            show_default=False,
        ),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Run the model through torch.compile.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read data ahead, for each device. Default: 0, it reads itself.")
    ] = None,
) -> None:
    """Train a model, and show a sample of what it writes.

    With no option: a small model on the source code of Python's standard library, in about a
    minute. What an option leaves open, the preset decides. Ctrl-C ends the training early and keeps
    the model; --resume goes on.
    """
    options = dict(locals())
    settings = {item.name: options[item.name] for item in fields(TrainConfig) if item.name in options}
    settings.pop("preset")
    with one_line_errors():
        texts = [*(data or []), *(paths or [])]
        given = {name: value for name, value in settings.items() if value is not None}
        if resume is None:
            config = TrainConfig.from_preset(preset or "tiny", **{"device": "auto"} | given)
        elif out is not None or overwrite or texts:
            raise ValueError(
                "--resume goes on with a run in its own folder and with its own data: it takes no --out, "
                "--overwrite or --data"
            )
        prepare_process()
        from tinyllm import training

        shown = not is_worker()
        say = typer.echo if shown else lambda line: None
        start = time.perf_counter()
        if resume is None:
            result = training.train(config, out, texts or None, overwrite=overwrite, progress=shown, say=say)
        else:
            result = training.resume(resume, progress=shown, say=say, preset=preset, **given)
        if shown:
            of_ours = resume is None and not texts
            _show(result, SAMPLE_PROMPT if of_ours else None, time.perf_counter() - start)
        if result.signal is not None:
            raise typer.Exit(128 + result.signal)


def _show(result: TrainResult, prompt: str | None, seconds: float) -> None:
    """What came of a training: a sample, the loss, where everything is, what to do next."""
    from tinyllm.data import first_tokens
    from tinyllm.generation import stream_text

    tokenizer = result.tokenizer
    # On text of the user's own nobody knows a good beginning but the text itself.
    start = prompt or first_tokens(result.val_file, tokenizer.vocab_size, 16)
    shown = prompt or tokenizer.decode(start)  # type: ignore[arg-type]
    rule = "-" * 72
    typer.echo(f"\nA sample, going on from {shown!r}:\n{rule}")
    write(shown)
    for piece in stream_text(result.model, tokenizer, start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0):
        write(piece)
    typer.echo(f"\n{rule}")
    if result.interrupted:
        typer.echo(f"Interrupted: the model is saved as it was after step {result.steps}; --resume goes on from there.")
    loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.3f}"
    typer.echo(f"{result.steps} steps, {seconds:.0f} s{loss}. Everything is in {result.out}:")
    for path in sorted(result.out.iterdir()):
        typer.echo(f"  {path.name}{'/' if path.is_dir() else ''}")
    run = shlex.quote(str(result.out))
    typer.echo(f'Write more: tinyllm generate --run {run} --prompt "{prompt or "TEXT"}"')
