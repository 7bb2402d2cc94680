"""The command quantize."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyllm.cli._app import Checkpoint, app, one_line_errors, prepare_process, which

if TYPE_CHECKING:
    from tinyllm.runs.load import Run

_BATCHES = 64  # of the run's validation text


@app.command()
def quantize(
    run: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder that a training made, or one with a Hugging Face GPT-2."),
    ],
    weights: Annotated[str, typer.Option(metavar="bf16|int8|int4", help="How the weights are to be stored.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the result.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Texts to measure the loss of quality on, as for `tinyllm eval`. Default: the run's validation text.",
        ),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(help="How many weights share a scale: 64, or a multiple of it that divides the layers' widths."),
    ] = 64,
    checkpoint: Checkpoint = "last",
) -> None:
    """Store a trained model's weights in fewer bits, for writing.

    Shows the perplexity before and after, of 1,024 sequences of the run's validation text or of the texts of --data,
    where there are any. The new folder serves `tinyllm generate --run` and `tinyllm.load_run`.

    For example: tinyllm quantize --run runs/tiny-1 --weights int8 --out runs/tiny-int8
    """
    with one_line_errors():
        prepare_process()
        from tinyllm._internal.files import check_new_folder
        from tinyllm.quantization import WEIGHTS, weights_of
        from tinyllm.quantization import quantize as quantize_model
        from tinyllm.runs.load import load_run, save_quantized

        if weights not in WEIGHTS[1:]:
            raise ValueError(f"weights is {weights!r}; allowed are {', '.join(WEIGHTS[1:])}")
        check_new_folder(out)
        if group_size < 64 or group_size % 64:
            raise ValueError(f"group_size is {group_size}; it must be a multiple of 64")
        found = load_run(run, checkpoint=which(checkpoint))
        if (stored := weights_of(found.model)) != "float32":
            raise ValueError(f"{run} has its weights as {stored} already; quantise the original")
        before = _perplexity(found, run, data)
        size = _size(found)
        quantize_model(found.model, weights, group_size=group_size)
        after = _perplexity(found, run, data)
        preset = found.config.get("training", {}).get("preset")
        made_from = {"run": str(run), "checkpoint": which(checkpoint), "preset": preset}
        save_quantized(found.model, found.tokenizer, out, made_from=made_from)
        if before is not None and after is not None:
            typer.echo(f"perplexity  {before:.3f} before, {after:.3f} after: {100 * (after / before - 1):+.2f} %")
        typer.echo(f"weights     {size / 1e6:,.1f} MB before, {_size(found) / 1e6:,.1f} MB after, in {out}")


def _size(run: Run) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in run.model.state_dict().values()}
    return sum(tensors.values())


def _perplexity(found: Run, run: Path, data: list[Path] | None) -> float | None:
    """Return the perplexity of the given texts, or of the run's own validation text; None where there are neither."""
    import torch

    model, tokenizer, config = found
    if data:
        from tinyllm.data.corpus import find_files
        from tinyllm.evaluation import evaluate_texts

        return evaluate_texts(model, tokenizer, find_files(data).texts(0), show_progress=True).perplexity
    if "data" not in config or "training" not in config:
        return None
    from tinyllm.data.batches import val_loader
    from tinyllm.training.begin import datasets

    _, dataset = datasets(config["data"], run, tokenizer, config["training"]["seq_len"])
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in val_loader(dataset, batch_size=16, max_batches=_BATCHES):
            total += model.loss(inputs, targets).item() * targets.numel()
            count += targets.numel()
    return math.exp(total / count)
