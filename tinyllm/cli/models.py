"""The commands that use a trained model: generate and eval."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyllm.cli._app import SAMPLE_TEMPERATURE, SAMPLE_TOKENS, app, one_line_errors, prepare_process, write

if TYPE_CHECKING:
    from tinyllm.checkpoint import Which

Checkpoint = Annotated[
    str,
    typer.Option(metavar="last|best|STEP", help="Which of its weights: the last, the best, or a step's."),
]


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
    checkpoint: Checkpoint = "last",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Let a trained model go on from a text.

    For example: tinyllm generate --run runs/tiny-1 --prompt "def"
    """
    with one_line_errors():
        prepare_process()
        from tinyllm.checkpoint import load_run
        from tinyllm.generation import stream_text
        from tinyllm.model import choose_device

        if seed is None:  # torch's own default is the same in every process
            seed = secrets.randbits(32)
        model, tokenizer, _ = load_run(run, choose_device(device), checkpoint=_which(checkpoint))
        pieces = stream_text(model, tokenizer, prompt, max_new_tokens, temperature, top_k, seed=seed)
        write(prompt)
        for piece in pieces:
            write(piece)
        write("\n")


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
    checkpoint: Checkpoint = "last",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Measure how well a trained model predicts texts: loss, perplexity, bits per byte.

    Bits per byte compare models whatever their tokenizers. For example: tinyllm eval --run
    runs/tiny-1 --data new.txt
    """
    with one_line_errors():
        prepare_process()
        from tinyllm.checkpoint import load_run
        from tinyllm.data import find_files
        from tinyllm.evaluation import evaluate_texts
        from tinyllm.model import choose_device

        corpus = find_files([*data, *(paths or [])])
        model, tokenizer, _ = load_run(run, choose_device(device), checkpoint=_which(checkpoint))
        found = evaluate_texts(model, tokenizer, corpus.texts(0), batch_size)
        typer.echo(
            f"{found.documents:,} documents, {found.num_bytes:,} bytes, {found.tokens:,} tokens\n"
            f"loss           {found.loss:.4f} nats a token\n"
            f"perplexity     {found.perplexity:.2f}\n"
            f"bits per byte  {found.bits_per_byte:.4f}"
        )
        if found.unknown:
            typer.echo(f"{found.unknown:,} tokens are not in the vocabulary: bits per byte do not compare")


def _which(checkpoint: str) -> Which:
    if checkpoint == "last":
        return "last"
    if checkpoint == "best":
        return "best"
    if not checkpoint.isdigit():
        raise ValueError(f"checkpoint is {checkpoint!r}; it must be 'last', 'best' or the number of a step")
    return int(checkpoint)
