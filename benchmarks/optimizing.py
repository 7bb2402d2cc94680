"""Measure models of transformers before and after `tinyllm.optimize`, and compiled:

    python -m benchmarks.optimizing    in a quarter of an hour; writes results/optimize/FAMILY.json and the page

Weights are random, as they take as long as others. Writing is transformers' own loop of `generate`; compiled, it needs
a cache of a fixed length. Compiled training and reading are `torch.compile` of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import tinyllm
from tinyllm._internal.cpus import usable_cpus

from . import machine, report
from .cpu import TUNED
from .row import OURS
from .turns import in_turns
from .workers import WriterError, settings

SECTION = "optimize"
PLAIN, COMPILED = "transformers", "torch.compile of it"
ROUNDS = 5
NEW = 32  # tokens that are written

Run = Callable[[], float]  # takes the seconds of one unit


@dataclass
class Case:
    """A way to call a model, and its sides.

    Attributes:
        name: the model and what it does.
        sides: provider, or ours with weights in fewer bits -> what takes the seconds of one unit.
        weights: the kinds of weights of ours; each is a row.
    """

    name: str
    sides: dict[str, Run]
    weights: tuple[str, ...] = ("float32",)
    headline: bool = False
    failed: dict[str, str] = field(default_factory=dict)


def _label(weights: str) -> str:
    return OURS if weights == "float32" else f"{OURS}, {weights}"


def timed(call: Callable[[], object]) -> Run:
    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def check(plain: Tensor, ours: Tensor) -> None:
    """Raise AssertionError unless both models say the same."""
    error = float((plain - ours).norm() / plain.norm())
    assert error < 1e-4, f"an optimized model differs by {error:.1e}"


# ---- Models


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, pad_token_id=0, **dropout)).eval()


def qwen() -> nn.Module:
    """Return a model of the shape of Qwen 2.5 with half a billion parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig()).eval()


# ---- What they do


def inference(name: str, model: nn.Module, inputs: dict[str, Any]) -> Case:
    """Return a forward pass without gradients."""
    ours, compiled = tinyllm.optimize(model, inplace=False), torch.compile(model, dynamic=False)

    def call(which: Any) -> Run:
        def forward() -> None:
            with torch.no_grad():
                which(**inputs)

        return timed(forward)

    with torch.no_grad():
        check(model(**inputs)[0], ours(**inputs)[0])
    return Case(name, {PLAIN: call(model), COMPILED: call(compiled), OURS: call(ours)})


def training(name: str, model: nn.Module, ids: Tensor) -> Case:
    """Return a step: forward, loss and backward; the optimizer, the same for all, is left out."""
    ours, compiled = tinyllm.optimize(model, inplace=False), torch.compile(model, dynamic=False)
    losses = []

    def call(which: Any) -> Run:
        def step() -> None:
            loss = which(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
            for parameter in model.parameters():
                parameter.grad = None

        return timed(step)

    sides = {PLAIN: call(model), COMPILED: call(compiled), OURS: call(ours)}
    for run in (sides[PLAIN], sides[OURS]):
        run()
    check(*losses[-2:])
    return Case(name, sides, headline=True)


def writing(name: str, model: Any, ids: Tensor) -> Case:
    """Return a token after those of a prompt, which is left out: the difference of a text and its first token."""
    from transformers import CompileConfig

    config: Any = CompileConfig(fullgraph=False, dynamic=False)
    config._compile_all_devices = True  # by itself `generate` compiles on GPUs only
    static = {"cache_implementation": "static", "compile_config": config}
    kinds = ("float32", "bf16", "int8", "int4")
    models = {
        _label(kind): tinyllm.optimize(model, None if kind == "float32" else kind, inplace=False) for kind in kinds
    }

    def call(which: Any, **options: Any) -> Run:
        def write(tokens: int) -> float:
            start = time.perf_counter()
            which.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, **options,
            )  # fmt: skip
            return time.perf_counter() - start

        return lambda: (write(NEW + 1) - write(1)) / NEW

    with torch.no_grad():
        check(model(ids).logits, models[OURS](ids).logits)
    sides = {PLAIN: call(model), COMPILED: call(model, **static), **{who: call(it) for who, it in models.items()}}
    return Case(name, sides, kinds, headline=True)


def cases() -> Iterator[Case]:
    """Yield the cases; each model is made when it is its turn."""
    generator = torch.Generator().manual_seed(0)

    def ids(rows: int, tokens: int) -> Tensor:
        return torch.randint(30_000, (rows, tokens), generator=generator)

    yield training("GPT-2 124M trains, B4 T256", gpt2().train(), ids(4, 256))
    for name, make in (("GPT-2 124M", gpt2), ("Qwen 2.5 0.5B", qwen)):
        model: Any = make()
        prompt = {"input_ids": ids(1, 1024), "logits_to_keep": 1}
        yield inference(f"{name} reads, B1 T1024", model, prompt)
        yield writing(f"{name} writes after B1 T256", model, ids(1, 256))
        del model
    yield inference("BERT base reads, B8 T128", bert(), {"input_ids": ids(8, 128)})
    yield inference("ViT base sees, B8 224x224", vit(), {"pixel_values": torch.randn(8, 3, 224, 224)})


# ---- Measuring


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each side of a case and each kind of weights, with the ratios to the others."""
    sides = dict(case.sides)
    for name, run in case.sides.items():  # compiles, and says so where that fails
        try:
            run()
        except Exception as error:
            if name != COMPILED:
                raise
            case.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del sides[name]
    taken: dict[str, list[float]] = {name: [] for name in sides}

    def noting(name: str) -> Callable[[int], None]:
        return lambda steps: taken[name].append(sides[name]())

    turns = in_turns({name: noting(name) for name in sides}, rounds).undisturbed()
    times = {name: each[-rounds:] for name, each in taken.items()}  # the first round warms up
    rows = []
    for kind in case.weights:
        row = {
            "section": SECTION,
            "benchmark": case.name if case.weights == ("float32",) else f"{case.name}, {kind} weights",
            "headline": case.headline,
            "other_load_cores": turns.load(),
            "rounds": rounds,
        }
        medians = {who: median(times[who]) for who in (PLAIN, COMPILED) if who in times}
        found = median(times[_label(kind)])
        ratios = {who: seconds / found for who, seconds in medians.items()}
        own = {"provider": OURS, "median_s": found, "iqr_s": _spread(times[_label(kind)]), "ratios": ratios}
        rows.append({**row, **own, "weights": kind})
        for who in (PLAIN, COMPILED):
            if who in case.failed:
                rows.append({**row, "provider": who, "failed": case.failed[who]})
            elif who in medians:
                rows.append({**row, "provider": who, "median_s": medians[who], "iqr_s": _spread(times[who])})
    return rows


def _spread(times: list[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low


def measure(arguments: list[str]) -> list[dict[str, Any]]:
    """Return the rows, of a process with the settings of all others.

    Raises:
        WriterError: it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.optimizing", "--here", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=machine.ROOT if report.IN_REPOSITORY else None,
        env={**os.environ, **settings(usable_cpus()), "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode != 0:
        raise WriterError(f"the process that measures has ended with {done.returncode}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = report.parser_of("optimizing", __doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="those whose names have this text; nothing is stored"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else ROUNDS
    if options.here:
        rows = []
        for case in cases():
            if options.only in case.name:
                rows += rows_of(case, rounds)
                print(f"{case.name}: {time.strftime('%H:%M:%S')}", file=sys.stderr)
        print(json.dumps(rows))
        return 0
    facts: Mapping[str, Any] = {
        **machine.describe(), "quick": options.quick, "only": options.only, "allocator": TUNED, "ceilings": None,
        "optimize": True,
    }  # fmt: skip
    passed = ["--only", options.only, *(["--quick"] if options.quick else [])]
    try:
        results = report.rounded({**facts, "rows": measure(passed)})
    except (WriterError, ImportError) as error:
        print(f"python -m benchmarks.optimizing: error: {error}", file=sys.stderr)
        return 2
    print(report.render_tables(results))
    report.publish(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
