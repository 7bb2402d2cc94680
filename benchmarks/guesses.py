"""Measure how much faster a text is written with guesses from the text itself:

    python -m benchmarks.guesses FOLDER

FOLDER holds a GPT-2 as Hugging Face saves it, and what `benchmarks.writers` makes of it; OMP_NUM_THREADS is the number
of threads. `benchmarks.generation` asks, and reads the JSON that is printed.

How often guesses are right depends on the text, and the weights are random. So the model is computed as ever, and what
it draws is replaced by a text of people: the times are those of a model that writes this text.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tinyllm.data.corpus import standard_library
from tinyllm.generation import iter_tokens
from tinyllm.generation.engine import Engine
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import BPETokenizer

from . import machine, report
from .workers import WriterError, settings
from .writers import BF16, FLOAT32, INT4, INT8, load_tinyllm

PROMPT, NEW, MOST = 512, 96, (0, 3, 10)  # tokens of a prompt and after it, and the most to guess; 0: no guesses
EXCERPTS, ROUNDS = 3, 2


class Replay(Engine):
    """Engine that draws the tokens of a text, whatever the logits are.

    Attributes:
        text: its tokens.
        calls: how many times tokens were drawn.
    """

    def __init__(self, model: SimpleLLM, text: Sequence[int]) -> None:
        super().__init__(model, 1, len(text))
        self.calls, self.text = 0, list(text)
        self._text = torch.tensor(text)

    def read(self, prompts: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        logits = super().read(prompts, rows)
        logits[0, self._text[len(prompts[0])]] = logits.max() + 1.0  # the likeliest
        return logits

    def _draw(self, tokens: Tensor, uniforms: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        drawn, logprobs = super()._draw(tokens, uniforms, *rest)
        self.calls += 1
        lengths = torch.tensor(rest[3])  # of the text, before each row's token
        return self._text[lengths.unsqueeze(-1) + 1 + torch.arange(drawn.size(1))], logprobs


def texts() -> dict[str, list[str]]:
    """Return excerpts of texts that every Python has, by their kind. Of an edit the second half repeats the first one,
    in which a name has been replaced."""
    code = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    prose = "\n".join(topics[name] for name in ("objects", "compound", "context-managers", "import", "lambda"))
    starts = [len(code) * i // (EXCERPTS + 1) for i in range(1, EXCERPTS + 1)]
    edits = [code[start : start + 1800] for start in starts]
    return {
        "code": [code[start:] for start in starts],
        "prose": [prose[len(prose) * i // (EXCERPTS + 1) :] for i in range(1, EXCERPTS + 1)],
        "edited code": [f"{before}\n\n{before.replace('self', 'this')}" for before in edits],
    }


def excerpts() -> dict[str, list[list[int]]]:
    """Return the tokens of the excerpts, each with room for guesses at its end."""
    corpus = standard_library()
    tokenizer = BPETokenizer.from_texts(corpus.texts(0), 16_384)
    size = PROMPT + NEW + max(MOST) + 1
    found = {kind: [tokenizer.encode(text)[:size] for text in each] for kind, each in texts().items()}
    assert all(len(text) == size for each in found.values() for text in each), "an excerpt is too short"
    return found


def write(decoder: Replay, most: int) -> tuple[float, float]:
    """Write the text; return the seconds of a token after the first one, and how many tokens a call gave."""
    decoder.calls = 0
    prompt, lookup = torch.tensor(decoder.text[:PROMPT]), most or None
    stream = iter_tokens(decoder.model, prompt, NEW, temperature=0, decoder=decoder, prompt_lookup_num_tokens=lookup)
    written = [int(token) for token in stream]
    assert written == decoder.text[PROMPT : PROMPT + NEW], "another text than was to be written"
    return stream.decode_seconds / (NEW - 1), (NEW - 1) / decoder.calls


def rows_of(model: SimpleLLM, weights: str, found: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Return a row for each kind of text and number of guesses."""
    rows = []
    for kind, each in found.items():
        times: dict[int, list[float]] = {most: [] for most in MOST}
        tokens: dict[int, list[float]] = {most: [] for most in MOST}
        for text in each:
            decoder = Replay(model, text)  # reads the prompt once
            for number in range(ROUNDS):
                for most in random.Random(number).sample(MOST, len(MOST)):
                    seconds, a_call = write(decoder, most)
                    times[most].append(seconds)
                    tokens[most].append(a_call)
        for most in MOST:
            # Without guesses a call gives several tokens too, and computes them one by one.
            row = {"text": kind, "weights": weights, "guesses": most, "tokens_per_s": 1 / fmean(times[most])}
            rows.append(row if most == 0 else {**row, "tokens_a_pass": fmean(tokens[most])})
    return rows


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """Return what `main` prints, of a process of its own.

    Raises:
        WriterError: it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.guesses", str(folder)],
        capture_output=True,
        text=True,
        cwd=machine.ROOT if report.IN_REPOSITORY else None,
        env={**os.environ, **settings(threads)},
    )
    if done.returncode != 0:
        raise WriterError(f"{__package__}.guesses ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(folder: str) -> None:
    found, rows = excerpts(), []
    for weights in (FLOAT32, BF16, INT8, INT4):
        rows += rows_of(load_tinyllm(Path(folder), weights), weights, found)
    print(json.dumps({"prompt": PROMPT, "new_tokens": NEW, "excerpts": EXCERPTS, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
