"""Measure how much faster a text is written with guesses from the text itself:

    python -m benchmarks.guesses    in five minutes; writes results/guesses/FAMILY.json and the page

How often guesses are right depends on the text, and no model that writes as people do can be had here. So GPT-2 with
random weights is computed as ever, and what it draws is replaced by a text that was written by people: the times are
those of a model that writes this text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from tinyllm._internal.cpus import usable_cpus
from tinyllm.data.corpus import standard_library
from tinyllm.generation import iter_tokens
from tinyllm.generation.engine import Engine
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import BPETokenizer

from . import machine, report
from .cpu import TUNED
from .row import OURS
from .workers import WriterError, settings
from .writers import BF16, FLOAT32, INT4, INT8, convert_tinyllm, load_tinyllm
from .written_models import GPT2, make_model

PROMPT, NEW, MOST = 512, 64, (0, 3, 10)  # tokens of a prompt and after it, and the most to guess; 0: no guesses
EXCERPTS, ROUNDS = 3, 3


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


def write(decoder: Replay, most: int) -> float:
    """Write the text; return the seconds of a token after the first one."""
    decoder.calls = 0
    prompt, lookup = torch.tensor(decoder.text[:PROMPT]), most or None
    stream = iter_tokens(decoder.model, prompt, NEW, temperature=0, decoder=decoder, prompt_lookup_num_tokens=lookup)
    written = [int(token) for token in stream]
    assert written == decoder.text[PROMPT : PROMPT + NEW], "another text than was to be written"
    return stream.decode_seconds / (NEW - 1)


def rows_of(model: SimpleLLM, weights: str, found: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Return a row without guesses, and one for each kind of text and number of guesses."""
    seconds: dict[tuple[str, int], list[float]] = {}  # of a token, in each excerpt
    passes: dict[tuple[str, int], list[int]] = {}
    for kind, each in found.items():
        for text in each:
            decoder = Replay(model, text)
            write(decoder, MOST[-1])  # reads the prompt, which stays
            times: dict[int, list[float]] = {most: [] for most in MOST}
            for number in range(ROUNDS):
                for most in random.Random(number).sample(MOST, len(MOST)):
                    times[most].append(write(decoder, most))
                    if number == 0:
                        passes.setdefault((kind, most), []).append(decoder.calls)
            for most in MOST:
                seconds.setdefault((kind, most), []).append(median(times[most]))
    # Without guesses all texts take as long.
    none = fmean(time for (_, most), times_of in seconds.items() if most == 0 for time in times_of)
    rows: list[dict[str, Any]] = [{"text": None, "guesses": 0, "tokens_per_s": 1 / none}]
    for (kind, most), times_of in seconds.items():
        if most > 0:
            pooled = len(times_of) * (NEW - 1) / sum(passes[kind, most])
            rows.append({"text": kind, "guesses": most, "tokens_per_s": 1 / fmean(times_of), "tokens_a_pass": pooled})
    return [{"section": "guesses", "provider": OURS, "weights": weights, **row} for row in rows]


def measure(folder: Path) -> list[dict[str, Any]]:
    """Return the rows, of a process with the settings of all others.

    Raises:
        WriterError: it fails.
    """
    others = machine.OtherLoad()
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.guesses", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=machine.ROOT if report.IN_REPOSITORY else None,
        env={**os.environ, **settings(usable_cpus())},
    )
    if done.returncode != 0:
        raise WriterError(f"the process that measures has ended with {done.returncode}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [{**row, "other_load_cores": others.cores()} for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guesses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help=argparse.SUPPRESS)
    folder = parser.parse_args(arguments).folder
    kinds = (FLOAT32, BF16, INT8, INT4)
    if folder is not None:
        found = excerpts()
        print(json.dumps([row for kind in kinds for row in rows_of(load_tinyllm(folder, kind), kind, found)]))
        return 0
    facts = {**machine.describe(), "quick": False, "allocator": TUNED, "ceilings": None, "guesses": list(MOST)}
    try:
        with tempfile.TemporaryDirectory() as made:
            make_model(GPT2, Path(made))
            for kind in kinds:
                convert_tinyllm(Path(made), kind)
            results = report.rounded({**facts, "rows": measure(Path(made))})
    except (WriterError, ImportError) as error:
        print(f"python -m benchmarks.guesses: error: {error}", file=sys.stderr)
        return 2
    print(report.render_tables(results))
    report.publish(results, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
