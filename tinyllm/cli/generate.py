"""The command generate."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyllm._internal.words import count
from tinyllm.cli._app import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    Checkpoint,
    app,
    one_line_errors,
    prepare_process,
    warnings_in_one_line,
    which,
    write,
)

if TYPE_CHECKING:
    from tinyllm.generation import TextStream


@app.command()
def generate(
    run: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder that a training made, or one with a Hugging Face GPT-2."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The text to go on from; - reads it from a pipe, as does no prompt at all."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A UTF-8 file with the text to go on from."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = SAMPLE_TOKENS,
    num_samples: Annotated[
        int, typer.Option(help="How many texts to write, each with the next seed, under a line that names it.")
    ] = 1,
    temperature: Annotated[
        float,
        typer.Option(help="0: always the likeliest token; 1: as the model expects; above: wilder."),
    ] = SAMPLE_TEMPERATURE,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among the k likeliest tokens only. Default: among all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the fewest tokens that are together this likely, above 0 to 1. Default: all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among tokens with at least this fraction, below 1, of the likeliest one's probability. "
            "Default: all."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: less often what the text has already; 1: as the model expects.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End where this text would come; may be given several times."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text. Default: a new one.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bf16|int8|int4",
            help="Store the weights in fewer bits: faster, and less exact. Default: as they are there.",
        ),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        typer.Option(
            help="Guess up to this many tokens at once, where the text repeats itself: the same text, faster or slower."
        ),
    ] = None,
    checkpoint: Checkpoint = "last",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Let a trained model go on from a text.

    A prompt from a file or a pipe is taken without its last line break. Ctrl-C ends the text where it is. For example:
    tinyllm generate --run runs/tiny-1 --prompt "def"
    """
    with one_line_errors():
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        prepare_process()
        from tinyllm.generation import encode_prompt, make_decoder, stream_text
        from tinyllm.model import choose_device
        from tinyllm.runs.load import load_run

        text = _prompt_text(prompt, prompt_file)
        if seed is not None and not 0 <= seed <= 2**63 - num_samples:
            raise ValueError(f"seed is {seed}; it must be at least 0, and at most 2**63 - num_samples")
        if seed is None:  # torch's own default is the same in every process
            seed = secrets.randbits(32)
        model, tokenizer, _ = load_run(run, choose_device(device), checkpoint=which(checkpoint), weights=weights)
        ids = encode_prompt(tokenizer, text)
        # For all samples, which read the same prompt: it is computed once.
        with warnings_in_one_line():
            decoder = make_decoder(model, 1, len(ids) + max_new_tokens)

        first_seed = seed

        def sample(index: int) -> TextStream:
            return stream_text(
                model,
                tokenizer,
                ids,
                max_new_tokens,
                temperature,
                top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=stop or (),
                seed=first_seed + index,
                prompt_lookup_num_tokens=prompt_lookup_num_tokens,
                decoder=decoder,
            )

        sample(0)  # all arguments are checked here, and nothing is written yet
        if unknown := ids.count(-1 if tokenizer.unknown_id is None else tokenizer.unknown_id):
            typer.echo(
                f"tinyllm: the {tokenizer.kind} tokenizer does not know {unknown:,} of the prompt's "
                f"{count(len(ids), 'token')}; the model sees its unknown token there",
                err=True,
            )
        context = model.config.max_seq_len
        if len(ids) > context:
            typer.echo(
                f"tinyllm: the prompt has {len(ids):,} tokens; the model reads the last {context:,}, its whole context",
                err=True,
            )
        samples = []
        for index in range(num_samples):
            pieces = sample(index)
            samples.append(pieces)
            if num_samples > 1:
                write(f"--- {index + 1} of {num_samples}, --seed {seed + index} ---\n")
            try:
                write(text)
                for piece in pieces:
                    write(piece)
            finally:  # what comes next, an error included, begins a line
                write("\n")
            if pieces.finish_reason == "interrupt":
                raise KeyboardInterrupt
        typer.echo(_speed(samples, min(len(ids), context)), err=True)


def _speed(samples: Sequence[TextStream], prompt_tokens: int) -> str:
    """Return how fast the prompt was read, by the first sample, and how fast all of them wrote."""
    first, tokens = samples[0], sum(sample.num_tokens for sample in samples)
    decode_seconds = sum(sample.decode_seconds for sample in samples)
    seconds = decode_seconds + sum(sample.prefill_seconds for sample in samples)
    prefill = prompt_tokens / first.prefill_seconds
    line = f"{count(tokens, 'token')}, {seconds:.1f} s; prefill {prefill:,.1f} tokens/s"
    if decode_seconds == 0:  # each sample's first token belongs to reading the prompt
        return line
    return f"{line}, decode {(tokens - len(samples)) / decode_seconds:,.1f} tokens/s"


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt: an option's text, a file's or standard input's. The last line break of the latter two belongs
    to the file, not to the text: `echo "def" |` is the prompt "def"."""
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; one is allowed")
    if prompt is not None and prompt != "-":
        return prompt
    from tinyllm.data.corpus import decode_text, read_text

    if prompt_file is not None:
        text = read_text(prompt_file)
    else:
        ways = "--prompt TEXT, --prompt-file FILE, or text from a pipe"
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise ValueError(f"there is no prompt; give {ways}")
        text = decode_text(sys.stdin.buffer, "standard input")
        if not text:
            raise ValueError(f"there is no prompt: standard input is empty; give {ways}")
    return text.removesuffix("\n")
