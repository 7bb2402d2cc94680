"""The command eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyllm._internal.words import count
from tinyllm.cli._app import Checkpoint, app, one_line_errors, prepare_process, which


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Option(metavar="DIR", help="The folder that a training made.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Text, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, or directories of them. Needed, here or as "
            "arguments.",
        ),
    ] = None,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="More files or directories, as after --data.")
    ] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="What JSON lines and Parquet files call the text.")
    ] = "text",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be read, and count it, instead of stopping.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences that are computed at a time.")] = 16,
    checkpoint: Checkpoint = "last",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Measure how well a trained model predicts texts.

    Its loss, perplexity and bits per byte are shown. Bits per byte compare models whatever their tokenizers.

    For example: tinyllm eval --run runs/tiny-1 --data new.txt
    """
    with one_line_errors():
        given = [*(data or []), *(paths or [])]
        if not given:
            raise ValueError("--data is missing: name the text to evaluate")
        prepare_process()
        from tinyllm.data.corpus import find_files
        from tinyllm.evaluation import evaluate_texts
        from tinyllm.model import choose_device
        from tinyllm.runs.load import load_run

        corpus = find_files(given, text_column=text_column, skip_bad=skip_bad)
        for line in corpus.notes:
            typer.echo(line)
        model, tokenizer, _ = load_run(run, choose_device(device), checkpoint=which(checkpoint))
        found = evaluate_texts(model, tokenizer, corpus.texts(0), batch_size, show_progress=True)
        if corpus.left_out.count:
            typer.echo(f"Left out {count(corpus.left_out.count, 'input')}, such as {corpus.left_out.named[0]}")
        typer.echo(
            f"{count(found.documents, 'document')}, {count(found.num_bytes, 'byte')}, {count(found.tokens, 'token')}\n"
            f"loss           {found.loss:.4f} nats a token\n"
            f"perplexity     {found.perplexity:.2f}\n"
            f"bits per byte  {found.bits_per_byte:.4f}"
        )
        if found.unknown:
            are = "is" if found.unknown == 1 else "are"
            typer.echo(f"{count(found.unknown, 'token')} {are} not in the vocabulary: bits per byte do not compare")
