"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyllm.cli._app import Checkpoint, app, one_line_errors, prepare_process, which


@app.command()
def export(
    run: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder that a training made, or one with a Hugging Face GPT-2.")
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="hf|gguf",
            help="hf: a folder for Hugging Face's AutoModelForCausalLM and AutoTokenizer. gguf: a file for llama.cpp.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A new folder for hf, a new file for gguf.")],
    weights: Annotated[
        str, typer.Option(metavar="float32|bf16|int8|int4", help="How gguf is to store the weights.")
    ] = "float32",
    checkpoint: Checkpoint = "last",
) -> None:
    """Write a trained model for other programs.

    Models of the presets but tutorial are GPT-2s, which both formats hold. Of other models hf makes a folder that needs
    tinyllm to be loaded, and gguf an error that says why.

    For example: tinyllm export --run runs/tiny-1 --to gguf --out tiny.gguf
    """
    with one_line_errors():
        prepare_process()
        from tinyllm._internal.files import check_new_folder
        from tinyllm.integrations.export import export as export_model
        from tinyllm.runs.load import load_run

        if to == "hf":
            check_new_folder(out)
        model, tokenizer, _ = load_run(run, checkpoint=which(checkpoint))
        typer.echo(export_model(model, tokenizer, out, to=to, weights=weights))
