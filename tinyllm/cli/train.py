"""The command train."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyllm._internal.words import count
from tinyllm.cli._app import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    app,
    is_first_of_node,
    is_worker,
    one_line_errors,
    prepare_process,
    warnings_in_one_line,
    write,
)
from tinyllm.cli._options import with_settings
from tinyllm.config import files
from tinyllm.config.presets import SIZES
from tinyllm.config.training import COMPUTING, LEARNING, MODEL, SETTINGS, TEXT, WATCHING, TrainConfig

if TYPE_CHECKING:
    from tinyllm.training.trainer import TrainResult

SAMPLE_PROMPT = "def"  # no space after it: a BPE's words bring their own

RUN = "Run folder and settings"

_FILE_ONLY = [name for name, item in SETTINGS.items() if not item.group]


def _option(group: str, help: str, *names: str, metavar: str | None = None) -> Any:
    """Return an option whose help names its default itself."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=group, show_default=False)


@app.command()
@with_settings(
    [name for name, item in SETTINGS.items() if item.group], groups=(TEXT, MODEL, LEARNING, RUN, WATCHING, COMPUTING)
)
def train(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH", rich_help_panel=TEXT, help="More files or directories, as after --data.", show_default=False
        ),
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
            f"{', '.join(_FILE_ONLY[:-1])} and {_FILE_ONLY[-1]}. A run's config.json is such a file, but for its data. "
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
    **settings: Any,
) -> None:
    """Train a model, and show a sample of what it writes.

    With no option: a small model on the source code of Python's standard library, in about a
    minute. What an option leaves open, the preset decides. Ctrl-C ends the training early and keeps
    the model; --resume goes on.
    """
    given = {name: value for name, value in settings.items() if value is not None}
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
    with warnings_in_one_line():
        pieces = stream_text(result.model, result.tokenizer, start, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed=0)
    typer.echo(f"\nA sample, going on from {shown!r}:\n{rule}")
    write(shown)
    for piece in pieces:
        write(piece)
    typer.echo(f"\n{rule}")
