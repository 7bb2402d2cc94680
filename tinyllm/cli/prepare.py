"""The command prepare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyllm._internal.words import count, size
from tinyllm.cli._app import app, one_line_errors, prepare_process

if TYPE_CHECKING:
    from tinyllm.data.prepare import Prepared


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the result.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH", help="More inputs, as after --data.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Text files, directories of them, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, and datasets of "
            "the Hugging Face Hub as hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT (split: train). A text file is "
            "one document, and so is a line of JSON or a row.",
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="bpe|word|char|PATH",
            help="What a token is: a piece of a word, a word or a character, learnt from the text; or a tokenizer "
            "that exists: a tokenizer.json, GPT-2's vocab.json with merges.txt beside it, a .tiktoken file, or a "
            "folder with one of these.",
        ),
    ] = "bpe",
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="The largest number of tokens to learn. Default: 50257, as GPT-2 has; for char, every character."
        ),
    ] = None,
    tokenizer_sample: Annotated[
        float,
        typer.Option(
            metavar="MB",
            help="How much of the text the tokens are learnt from, which takes three times as much memory.",
        ),
    ] = 64.0,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="The name of the text in JSON lines, Parquet files and datasets.")
    ] = "text",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that tokenize; each takes about 100 MB of memory. Default: one for each core."),
    ] = None,
    shard_size: Annotated[
        float, typer.Option(metavar="MB", help="About how much text goes into one file of the result.")
    ] = 64.0,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is kept for validation, above 0 and below 1.")
    ] = 0.01,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be read, and count it, instead of stopping.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed keeps the same documents for validation.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in --out; other files in it stay.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the files in --out with their checksums.")
    ] = False,
) -> None:
    """Turn any amount of text into tokens on disk, for train to read.

    This is for text that is too long to tokenize at each training, and for datasets. It works on every core, in
    memory that does not grow with the text. After an interruption the same command goes on where it stopped.

    For example: tinyllm prepare --data books/ --out prepared
    """
    with one_line_errors():
        if check:
            _check(out)
            return
        given = [*(data or []), *(paths or [])]
        if not given:
            raise ValueError("--data is missing: name the text to prepare")
        prepare_process(computes=False)
        from tinyllm.data import prepare as preparing

        try:
            done = preparing.prepare(
                given,
                out,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                text_column=text_column,
                workers=workers,
                shard_size=shard_size,
                val_fraction=val_fraction,
                tokenizer_sample=tokenizer_sample,
                skip_bad=skip_bad,
                seed=seed,
                overwrite=overwrite,
                say=typer.echo,
            )
        except KeyboardInterrupt:
            typer.echo("Interrupted: finished shards are kept, and the same command goes on from there.", err=True)
            raise typer.Exit(130) from None
        _show(done)


def _check(out: Path) -> None:
    from tinyllm.data.shards import open_shards

    shards = open_shards(out)
    shards.verify()
    typer.echo(
        f"{out} is whole: {count(len(shards.train), 'training shard')} and {count(len(shards.val), 'validation shard')}"
    )


def _show(done: Prepared) -> None:
    """Print the result and what to do next."""
    shards = done.shards
    manifest = shards.manifest
    tokens = manifest["tokens"]
    typer.echo(
        f"{count(manifest['documents'], 'document')}, {count(manifest['bytes'], 'byte')}, {count(tokens, 'token')} "
        f"({manifest['bytes'] / tokens:.2f} bytes a token, {manifest['dtype']})"
    )
    typer.echo(f"{count(shards.num_train_tokens, 'token')} for training, {shards.num_val_tokens:,} for validation")
    if done.num_bytes:
        typer.echo(f"{done.seconds:.0f} s, {size(done.num_bytes / done.seconds)}/s")
    if manifest["skipped_count"]:
        named = shards.directory / "manifest.json"
        typer.echo(f"{count(manifest['skipped_count'], 'input')} left out, named in {named}:")
        for line in manifest["skipped"][:3]:
            typer.echo(f"  {line}")
        if manifest["skipped_count"] > 3:
            typer.echo(f"  and {manifest['skipped_count'] - 3:,} more")
    where = shlex.quote(str(shards.directory))
    typer.echo(f"Everything is in {where}. Next: tinyllm train --data {where}")
