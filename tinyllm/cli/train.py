"""The command train."""

from __future__ import annotations

import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tinyllm._internal.words import count
from tinyllm.cli._app import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    PresetName,
    app,
    is_first_of_node,
    is_worker,
    one_line_errors,
    prepare_process,
    write,
)
from tinyllm.config import files
from tinyllm.config.presets import PRESETS, SIZES
from tinyllm.config.training import TrainConfig

if TYPE_CHECKING:
    from tinyllm.training.trainer import TrainResult

SAMPLE_PROMPT = "def"  # no space after it: a BPE's words bring their own

# The groups of options in the help; the last two, and --steps, are what a resumed training may change.
TEXT = "Text"
MODEL = "Model"
LEARNING = "Learning"
RUN = "Run folder and settings"
WATCHING = "Validation and checkpoints (--resume may change these)"
COMPUTING = "Devices, speed and memory (--resume may change these)"

_TINY = PRESETS["tiny"]


def _option(group: str, help: str, *names: str, metavar: str | None = None) -> Any:
    """Return an option whose help names its default itself, as the preset may decide it."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=group, show_default=False)


def _sizes() -> str:
    return "; ".join(f"{name} {p.num_layers}/{p.num_heads}/{p.embedding_dim}" for name, p in PRESETS.items())


@app.command()
def train(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="More files or directories, as after --data.", show_default=False),
    ] = None,
    data: Annotated[
        list[Path] | None,
        _option(
            TEXT,
            "Files to train on: text, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, or directories of them (all below "
            "that are not hidden); or one directory that `tinyllm prepare` made. Default: the source code of "
            "Python's own standard library, about 12 MB that every machine has.",
            metavar="PATH...",
        ),
    ] = None,
    tokenizer: Annotated[
        Literal["word", "char", "bpe"] | None,
        _option(
            TEXT,
            "What a token is: a word, a character, or a piece of a word that the text teaches. Default: bpe. "
            "Prepared data bring their own.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        _option(
            TEXT,
            f"The largest number of tokens that the tokenizer may know. Default: the preset's (tiny: "
            f"{_TINY.vocab_size}); four times as many for word, and every character for char.",
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        _option(
            TEXT,
            "The name of the text in JSON lines and Parquet files. Default: text.",
            metavar="NAME",
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        _option(TEXT, "Leave out text that cannot be read, and count it, instead of stopping.", "--skip-bad"),
    ] = False,
    preset: Annotated[
        PresetName | None,
        _option(
            MODEL,
            f"A model and the training that suits it; other options change parts of it. The names, with layers/heads/"
            f"embedding dimension: {_sizes()}. Default: tiny.",
            metavar="NAME",
        ),
    ] = None,
    num_layers: Annotated[int | None, _option(MODEL, "Number of transformer blocks. Default: the preset's.")] = None,
    num_heads: Annotated[
        int | None,
        _option(MODEL, "Attention heads of a block; they must divide --embedding-dim. Default: the preset's."),
    ] = None,
    embedding_dim: Annotated[
        int | None, _option(MODEL, "Width of the model: the numbers that stand for a token. Default: the preset's.")
    ] = None,
    hidden_dim: Annotated[
        int | None,
        _option(
            MODEL,
            "Width of the feed-forward layers. Default: as many times --embedding-dim as in the preset (tiny: "
            f"{_TINY.hidden_dim // _TINY.embedding_dim} times).",
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        _option(
            MODEL,
            "Tokens in a sequence, which is as far back as the model can look. Default: the preset's (tiny: "
            f"{_TINY.seq_len}).",
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        _option(
            MODEL,
            "Share of the activations that training sets to zero, at least 0 and below 1. Default: the preset's "
            f"(tiny: {_TINY.dropout:g}).",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        _option(
            LEARNING,
            f"Training steps in all; --resume may change it. Default: the preset's (tiny: {_TINY.steps}).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(
            LEARNING,
            f"Sequences in a step, on all devices together. Default: the preset's (tiny: {_TINY.batch_size}).",
        ),
    ] = None,
    lr: Annotated[
        float | None, _option(LEARNING, f"Learning rate at its peak. Default: the preset's (tiny: {_TINY.lr:g}).")
    ] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"] | None,
        _option(
            LEARNING,
            "How the learning rate goes on after its rise: cosine and linear fall to a tenth, constant stays, and wsd "
            "stays and falls in the last fifth of the steps. Default: cosine.",
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, _option(LEARNING, "Steps in which the learning rate rises. Default: 5 % of all, at most 500.")
    ] = None,
    weight_decay: Annotated[
        float | None,
        _option(LEARNING, "AdamW's weight decay, of matrices only; norms and biases have none. Default: 0.1."),
    ] = None,
    grad_clip: Annotated[
        float | None, _option(LEARNING, "The largest norm of the gradient; longer ones are scaled down. Default: 1.")
    ] = None,
    label_smoothing: Annotated[
        float | None,
        _option(
            LEARNING,
            "Share of the target's probability that is spread over all tokens, from 0 to 1. Default: 0.",
        ),
    ] = None,
    ema: Annotated[
        float | None,
        _option(
            LEARNING,
            "Validate and save an average of the weights over the steps, with this decay, such as 0.999: at least 0 "
            "and below 1. Default: no average.",
            metavar="DECAY",
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        _option(
            LEARNING,
            "Attention stops where a document ends. Default: --no-packing, as GPT-2 was trained.",
            "--packing/--no-packing",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        _option(LEARNING, "The same seed, text and machine give the same model. Default: 0."),
    ] = None,
    out: Annotated[
        Path | None, _option(RUN, "The folder for all results. Default: runs/PRESET-NUMBER, a new one.")
    ] = None,
    overwrite: Annotated[
        bool,
        _option(
            RUN, "Replace the run in --out, or the file of --save-config. Other files in --out stay.", "--overwrite"
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        _option(
            RUN,
            "Go on with the training in this folder, from its last checkpoint. --steps and the options of the last "
            "two groups may change how long it lasts, how it is computed and how it is watched; the others may not "
            "differ from what it began with.",
            metavar="DIR",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        _option(
            RUN,
            "Begin with the weights and the tokenizer of a finished training (a run folder), on other text, with a "
            "new optimizer. The model's sizes and --seq-len are RUN's.",
            metavar="RUN",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            RUN,
            "Read settings from a .yaml, .toml or .json file: these options without the leading dashes, also "
            "min_lr_ratio, decay_fraction, beta1 and beta2. A run's config.json is such a file, but for its data. "
            "Options that are typed count before the file, and the file before the preset.",
            metavar="FILE",
        ),
    ] = None,
    save_config: Annotated[
        Path | None,
        _option(
            RUN,
            "Write all settings, the preset's included, to a .yaml, .toml or .json file that --config reads, and train "
            "nothing.",
            metavar="FILE",
        ),
    ] = None,
    eval_interval: Annotated[
        int | None,
        _option(WATCHING, "Steps between validations. Default: a tenth of all steps, but at least 100."),
    ] = None,
    eval_batches: Annotated[
        int | None, _option(WATCHING, "Batches in a validation, the same ones each time. Default: 32.")
    ] = None,
    log_interval: Annotated[int | None, _option(WATCHING, "Steps between lines of metrics. Default: 10.")] = None,
    sample_tokens: Annotated[
        int | None,
        _option(WATCHING, "Tokens to write at each validation, into samples.jsonl; 0 for none. Default: 40."),
    ] = None,
    checkpoint_interval: Annotated[
        int | None, _option(WATCHING, "Steps between checkpoints. Default: one at each validation.")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _option(WATCHING, "How many of the last checkpoints stay, besides the best one. Default: 2.")
    ] = None,
    stop_on_save_error: Annotated[
        bool | None,
        _option(
            WATCHING,
            "End the training if a checkpoint cannot be written. Default: --no-stop-on-save-error, which says so and "
            "goes on.",
            "--stop-on-save-error/--no-stop-on-save-error",
        ),
    ] = None,
    max_skipped_steps: Annotated[
        int | None,
        _option(
            WATCHING,
            "Steps in a row that may be skipped because their gradient is not finite; one more ends the training. "
            "Default: 10.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        _option(
            WATCHING,
            "Write TensorBoard's files as well. Default: --no-tensorboard.",
            "--tensorboard/--no-tensorboard",
        ),
    ] = None,
    device: Annotated[
        str | None,
        _option(COMPUTING, "cpu, cuda, or auto, which takes a GPU if there is one. Default: auto."),
    ] = None,
    devices: Annotated[
        int | None, _option(COMPUTING, "GPUs of this machine, or processes on its CPU. Default: 1.")
    ] = None,
    num_nodes: Annotated[int | None, _option(COMPUTING, "Machines that train together. Default: 1.")] = None,
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp", "deepspeed"] | None,
        _option(
            COMPUTING,
            "How devices share the work: with ddp each has the whole model, with fsdp a part of it, and deepspeed is "
            "its ZeRO stage 2. Default: auto, which is ddp where there is more than one device.",
        ),
    ] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "bf16-true"] | None,
        _option(
            COMPUTING,
            "Number formats: 32-true computes in float32, bf16-mixed in bfloat16 with float32 weights, and bf16-true "
            "has bfloat16 for both. Default: 32-true.",
        ),
    ] = None,
    micro_batches: Annotated[
        int | None,
        _option(
            COMPUTING,
            "Parts of a step's sequences that are computed one after the other, which takes less memory. Default: 1.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        _option(
            COMPUTING,
            "Keep only the blocks' inputs for backward, and compute the rest again, which takes less memory. Default: "
            "--no-checkpointing.",
            "--checkpointing/--no-checkpointing",
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        _option(
            COMPUTING,
            "Run the model through torch.compile, which takes a while at first. With --dropout it drops others than "
            "without, so the losses differ a little. Default: --no-compile.",
            "--compile/--no-compile",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _option(
            COMPUTING,
            "Processes that read data ahead, for each device; with 0 the training reads itself. Default: 0.",
        ),
    ] = None,
) -> None:
    """Train a model, and show a sample of what it writes.

    With no option: a small model on the source code of Python's standard library, in about a
    minute. What an option leaves open, the preset decides. Ctrl-C ends the training early and keeps
    the model; --resume goes on.
    """
    options = dict(locals())
    given = {item.name: options[item.name] for item in fields(TrainConfig) if options.get(item.name) is not None}
    with one_line_errors():
        texts = [*(data or []), *(paths or [])]
        from_file = {} if config is None else files.load(config)
        if resume is None:
            data_in_file, out_in_file = from_file.pop("data", []), from_file.pop("out", None)
            texts = texts or [Path(path) for path in data_in_file]
            if out is None and out_in_file is not None:
                out = Path(out_in_file)
            chosen = _chosen(given, from_file, config, init_from)
            if save_config is not None:
                if init_from or text_column or skip_bad:
                    raise ValueError(
                        "--save-config keeps settings and paths, but no --init-from, --text-column or --skip-bad: give "
                        "these with --config"
                    )
                if not is_worker():
                    files.save(save_config, chosen, texts, out, overwrite=overwrite)
                    typer.echo(f"Wrote {save_config}. Next: tinyllm train --config {shlex.quote(str(save_config))}")
                return
        else:
            named = {"--out": out, "--overwrite": overwrite, "--data": texts, "--text-column": text_column}
            named |= {"--skip-bad": skip_bad, "--init-from": init_from, "--save-config": save_config}
            refused = [name for name, value in named.items() if value]
            refused += [f"{name} of {config}" for name in files.PATHS if name in from_file]
            if refused:
                raise ValueError(
                    f"--resume goes on with a run in its own folder and with its own data and settings: it takes no "
                    f"{' or '.join(refused)}"
                )
        prepare_process()
        from tinyllm.training import trainer

        shown = not is_worker()
        say = typer.echo if is_first_of_node() else lambda line: None  # another node says whom it waits for
        start = time.perf_counter()
        if resume is None:
            result = trainer.train(
                chosen,
                out,
                texts or None,
                text_column=text_column or "text",
                skip_bad=skip_bad,
                init_from=init_from,
                overwrite=overwrite,
                progress=shown,
                say=say,
            )
        else:
            result = trainer.resume(resume, progress=shown, say=say, **{**from_file, **given})
        if shown:
            of_ours = resume is None and not texts
            _show(result, SAMPLE_PROMPT if of_ours else None, time.perf_counter() - start)
        if result.signal is not None:
            raise typer.Exit(128 + result.signal)


def _chosen(given: dict[str, Any], from_file: dict[str, Any], path: Path | None, init_from: Path | None) -> TrainConfig:
    """Return a new training's config: what is typed counts before the file, and the file before the preset."""
    sizes = [name for name in SIZES if name in from_file and name not in given]
    if sizes and given.get("preset", from_file.get("preset", "tiny")) != from_file.get("preset", "tiny"):
        raise ValueError(
            f"preset is {given['preset']!r}, but {path} has the sizes of another model ({', '.join(sizes)}); leave out "
            "one of the two"
        )
    values = {**from_file, **given}
    try:
        if init_from is not None:
            return TrainConfig.from_run(init_from, **values)
        return TrainConfig.from_preset(**{"preset": "tiny"} | values)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        if name in from_file and name not in given:
            raise ValueError(f"{path}: {error}") from error
        raise


def _show(result: TrainResult, prompt: str | None, seconds: float) -> None:
    """Show what came of a training: a sample, the loss, where everything is, what to do next."""
    from tinyllm.runs.folder import checkpoints

    if not result.interrupted:  # whoever stops it wants it to end
        _show_sample(result, prompt)
    elif result.steps in checkpoints(result.out):
        typer.echo(f"Interrupted: the model is saved as it was after step {result.steps}; --resume goes on from there.")
    loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.3f}"
    run = shlex.quote(str(result.out))
    typer.echo(f"{count(result.steps, 'step')}, {seconds:.0f} s{loss}. Everything is in {run}:")
    for path in sorted(result.out.iterdir()):
        typer.echo(f"  {path.name}{'/' if path.is_dir() else ''}")
    typer.echo(f'Write more: tinyllm generate --run {run} --prompt "{prompt or "TEXT"}"')


def _show_sample(result: TrainResult, prompt: str | None) -> None:
    from tinyllm.data.corpus import first_tokens
    from tinyllm.generation import stream_text

    # On text of the user's own nobody knows a good beginning but the text itself.
    start = prompt or first_tokens(result.val_file, result.tokenizer.vocab_size, 16)
    shown = prompt or result.tokenizer.decode(start)  # type: ignore[arg-type]
    rule = "-" * 72
    typer.echo(f"\nA sample, going on from {shown!r}:\n{rule}")
    write(shown)
    for piece in stream_text(result.model, result.tokenizer, start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0):
        write(piece)
    typer.echo(f"\n{rule}")
