"""Compare how fast language models write: ours with float32, bf16, int8 and int4 weights, Hugging Face's transformers,
CTranslate2 and llama.cpp.

    python -m benchmarks.generation            all of these; half an hour
    python -m benchmarks.generation --batch 1 8 --prompts 1 256 960            each with each; hours
    python -m benchmarks.generation --batch 1 --prompts 256 --threads 2        a part; some minutes
    python -m benchmarks.generation --providers tinyllm "CTranslate2, int8"    of some providers
    python -m benchmarks.generation --quick    a first impression, of the tiny model

A whole run, without options, writes results/generation/FAMILY.json, the page and the README's table. Any other is
printed and nothing else; `--out DIR` keeps its JSON.

The models are GPT-2s with random weights: what they write makes no sense, and takes as long as sense. All write
greedily, and the end of the text is switched off. Each provider has a process of its own, see `benchmarks.writers`;
they take turns, one at a time. Before anything is timed, float32's tokens must be those of transformers; how many of
the others' are, is in the results. The prompts have 1, 256 and 960 tokens: with the 64 new ones the longest fill the
context.

Needs `pip install 'tinyllm[bench]'`. llama.cpp takes part where `CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python gguf` has built it, in a few minutes. What is not installed is named in the tables.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from tinyllm._internal.cpus import usable_cpus

from . import machine, report
from .cpu import TUNED
from .generation_tables import READING, WRITING, progress
from .measure import statistics_of
from .workers import Worker, WriterError
from .writers import FLOAT32, OURS, PROVIDERS, READ, REFERENCE, Provider
from .written_models import BITS, GPT2, MODELS, TINY, Model, draw_prompts, make_model

SLOW_S = 30.0  # who takes longer is timed once, and left out of the model's cases that are as large


@dataclass(frozen=True)
class Plan:
    """The cases, providers and rounds of a run.

    Attributes:
        threads: numbers of threads; with all but the most the model's fewer cases.
        most_rounds: of which `rounds` may take fewer.
        batches, prompts: every pair of these instead of the model's own cases; None: those of its cases.
    """

    models: Sequence[Model]
    labels: Sequence[str]
    threads: Sequence[int]
    most_rounds: int = 5
    batches: Sequence[int] | None = None
    prompts: Sequence[int] | None = None

    def cases(self, model: Model, threads: int) -> list[tuple[int, int]]:
        """Return batch and length of the prompts."""
        found = model.cases if threads == max(self.threads) else model.on_one_thread
        if self.batches or self.prompts:
            batches, prompts = (list(dict.fromkeys(each)) for each in zip(*model.cases, strict=True))
            found = tuple((batch, length) for length in self.prompts or prompts for batch in self.batches or batches)
        longest = model.context - model.new_tokens
        return [(batch, longest if length is None else min(length, longest)) for batch, length in found]

    def rounds(self, batch: int, length: int) -> int:
        """Return fewer where each takes long."""
        return min(self.most_rounds, 5 if batch * length <= 256 else 3)


# ---- What is measured


@dataclass
class Side:
    """Results of one provider in one case.

    Attributes:
        tokens: those of the first run.
        first_s, token_s: of each round, the seconds until the first token, and the mean of a step after it.
        loads: of each round, the cores that other processes kept busy.
        peak_bytes: the largest resident memory.
        failed: why there are no times.
    """

    tokens: list[list[int]] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failed: str | None = None

    def slowest_s(self, model: Model) -> float:
        """Return the most seconds that reading and writing took together, 0 where there are no times."""
        times = (a + (model.new_tokens - 1) * b for a, b in zip(self.first_s, self.token_s, strict=True))
        return max(times, default=0.0)

    def note(self, answer: Mapping[str, Any], others: float | None) -> None:
        self.first_s.append(answer["first_s"])
        self.token_s.append(answer["token_s"])
        self.loads += [] if others is None else [others]
        if answer["peak_bytes"] is not None:
            self.peak_bytes = max(self.peak_bytes or 0, answer["peak_bytes"])


def agreement(tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> tuple[float, str | None]:
    """Return the fraction of equal tokens, and the first difference in words."""
    pairs = [
        (at, row, got, wanted)
        for row, (some, others) in enumerate(zip(tokens, expected, strict=True))
        for at, (got, wanted) in enumerate(zip(some, others, strict=True))
    ]
    wrong = min((pair for pair in pairs if pair[2] != pair[3]), default=None)
    share = sum(got == wanted for _, _, got, wanted in pairs) / len(pairs)
    if wrong is None:
        return share, None
    at, row, got, wanted = wrong
    return share, f"token {at} of sequence {row} is {got}, not {wanted}"


def measure_case(workers: Mapping[str, Worker], model: Model, batch: int, length: int, rounds: int) -> dict[str, Side]:
    """Return for each worker what it did; the first one's tokens are what the others' are compared with.

    Raises:
        WriterError: the first one fails.
    """
    prompts, sides = draw_prompts(model, batch, length), {label: Side() for label in workers}
    request = {"prompts": prompts, "new_tokens": model.new_tokens}
    expected: list[list[int]] | None = None
    for label, worker in workers.items():  # which warms them up, too: compilers compile
        side, provider = sides[label], PROVIDERS[label]
        try:
            if batch > provider.most_sequences:
                raise WriterError("one sequence at a time")
            side.tokens = worker.ask(**request)["tokens"]
            expected = expected or side.tokens
            if provider.weights == FLOAT32 and (difference := agreement(side.tokens, expected)[1]):
                raise WriterError(f"other tokens: {difference}")
        except WriterError as error:
            if expected is None:
                raise
            side.failed = str(error)
    order, shuffle = [label for label in workers if sides[label].failed is None], random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for label in list(order):
            others = machine.OtherLoad(workers[label].pid)
            try:
                answer = workers[label].ask(**request)
            except WriterError as error:
                sides[label].failed = str(error)
                order.remove(label)
                continue
            sides[label].note(answer, others.cores())
            if sides[label].slowest_s(model) > SLOW_S:
                order.remove(label)
    return sides


def rows_of(
    sides: Mapping[str, Side], model: Model, batch: int, length: int, threads: int, load_s: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return two rows for each provider: reading the prompt, and writing a token for each sequence."""
    found, expected = [], next(iter(sides.values())).tokens
    for section, what in ((READING, "reads"), (WRITING, "writes after")):
        for label, side in sides.items():
            provider = PROVIDERS[label]
            row = {
                "benchmark": f"{model.name} {what} B{batch} T{length}, {provider.weights} weights",
                "section": section,
                "provider": provider.name,
                "weights": provider.weights,
                "model": model.name,
                "batch": batch,
                "prompt": length,
                "new_tokens": model.new_tokens,
                "threads": threads,
                "headline": in_headline(model, section, provider, batch, length),
                "other_load_cores": fmean(side.loads) if side.loads else None,
                "load_s": load_s.get(label),
            }
            if side.failed is not None:
                found.append({**row, "failed": side.failed})
                continue
            share, difference = agreement(side.tokens, expected)
            row |= {"same_tokens": share, "first_difference": difference, "peak_bytes": side.peak_bytes}
            if section == READING:
                row |= {"tokens": batch * length, **statistics_of(side.first_s)}
            else:
                row |= {"tokens": batch, **statistics_of(side.token_s)}
                row["work"] = model.step_bytes(provider, batch, length)
            found.append(row)
    return found


def in_headline(model: Model, section: str, provider: Provider, batch: int, length: int) -> bool:
    """Return whether the README shows it: writing after a prompt of 256, with all weights; the rest in float32."""
    if model == GPT2:
        return (batch, length) == (1, 256) and (section == WRITING or provider.weights == FLOAT32)
    return section == WRITING and batch == 1 and provider.weights == FLOAT32


def convert(labels: Iterable[str], folder: Path) -> dict[str, str]:
    """Write the model in the form of each engine that has one; return why some cannot take part."""
    reasons: dict[str, str] = {}
    for label in labels:
        provider = PROVIDERS[label]
        if find_spec(provider.module) is None:
            reasons[label] = f"not installed: pip install {provider.package}"
        elif provider.convert is not None:
            try:
                provider.convert(folder, provider.weights)
            except Exception as error:  # whatever a library may raise
                reasons[label] = f"{type(error).__name__}: {error}"
    return reasons


def measure(plan: Plan, folder: Path) -> tuple[dict[int, list[dict[str, Any]]], dict[int, float]]:
    """Return rows and read bandwidth in bytes a second, for each number of threads.

    Raises:
        WriterError: there are no tokens to compare with.
    """
    rows: dict[int, list[dict[str, Any]]] = {threads: [] for threads in plan.threads}
    bandwidth = dict.fromkeys(plan.threads, 0.0)
    for number, model in enumerate(plan.models):
        home = folder / str(number)
        make_model(model, home)
        not_there = convert(plan.labels, home)
        too_slow: dict[str, tuple[int, str]] = {}  # the size of the case, and why it is left out of larger ones
        for threads in plan.threads:
            with ExitStack() as processes:
                reader = processes.enter_context(Worker(READ, home, threads))
                workers: dict[str, Worker] = {}
                failed = dict(not_there)
                for label in plan.labels:
                    try:
                        if label not in failed:
                            workers[label] = processes.enter_context(Worker(label, home, threads))
                    except WriterError as error:
                        failed[label] = str(error)
                if REFERENCE in failed:
                    raise WriterError(f"nothing to compare with; {REFERENCE}: {failed[REFERENCE]}")
                load_s = {label: worker.loaded["load_s"] for label, worker in workers.items()}
                for batch, length in plan.cases(model, threads):
                    before = reader.ask()["bytes_per_s"]
                    size = batch * length
                    able = {x: workers[x] for x in workers if x not in too_slow or size < too_slow[x][0]}
                    sides = measure_case(able, model, batch, length, plan.rounds(batch, length))
                    for label, side in sides.items():
                        if (seconds := side.slowest_s(model)) > SLOW_S and label != REFERENCE:
                            too_slow[label] = size, f"left out: {seconds:.0f} s for B{batch} T{length}"
                    bandwidth[threads] = max(bandwidth[threads], before, reader.ask()["bytes_per_s"])
                    reasons = {**{label: why for label, (_, why) in too_slow.items()}, **failed}
                    sides = {label: sides.get(label) or Side(failed=reasons[label]) for label in plan.labels}
                    new = rows_of(sides, model, batch, length, threads, load_s)
                    print(progress(new), flush=True)
                    rows[threads] += new
    return rows, bandwidth


def make_results(
    facts: Mapping[str, Any], by_threads: Mapping[int, list[dict[str, Any]]], bandwidth: Mapping[int, float]
) -> dict[str, Any]:
    """Return the content of a file of results, from `machine.describe` and what `measure` returns."""
    for threads, rows in by_threads.items():
        for row in filter(report.is_measured, rows):
            row["tokens_per_s"] = row["tokens"] / row["median_s"]
            if row["section"] == WRITING:
                row["fraction_of_bandwidth"] = row["work"] / row["median_s"] / bandwidth[threads]
            if row["provider"] == OURS:
                row["ratios"] = ratios(row, rows)
    most, *fewer = sorted(by_threads, reverse=True)
    return report.rounded(
        {
            **facts,
            "generation": {"read_gb_per_s": {str(t): bandwidth[t] / 1e9 for t in by_threads}},
            "ceilings": None,
            "rows": by_threads[most],
            "one_thread": [row for threads in fewer for row in by_threads[threads]],
        }
    )


def ratios(ours: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the time of each peer as a multiple of ours: of those whose weights are as wide as ours or wider. A peer
    with narrower ones has less to read, and writes another text."""
    same = ("section", "model", "batch", "prompt")
    return {
        f"{row['provider']}, {row['weights']}": row["median_s"] / ours["median_s"]
        for row in filter(report.is_measured, rows)
        if row["provider"] != OURS
        and all(row[key] == ours[key] for key in same)
        and BITS[row["weights"]] >= BITS[ours["weights"]]
    }


# ---- The command


def bench(plan: Plan, only: str | None = None, quick: bool = False, out: Path | None = None) -> int:
    """Measure, print the tables, write what there is to write; return the exit status."""
    start = time.perf_counter()
    facts = {**machine.describe(), "quick": quick, "only": only, "allocator": TUNED}
    for package in ("transformers", "ctranslate2", "llama-cpp-python"):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = make_results(facts, *measure(plan, Path(folder)))
    except (WriterError, ImportError) as error:
        print(f"python -m benchmarks.generation: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.render_tables(results)}\n")
    report.publish(results, out)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = report.parser_of("generation", __doc__)
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="those whose names begin so, and transformers")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="with so many (default: all cores, and 1)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="so many sequences, with each of --prompts")
    parser.add_argument("--prompts", nargs="+", type=int, metavar="N", help="of so many tokens, with each of --batch")
    options = parser.parse_args(arguments)
    parts = {name: getattr(options, name) for name in ("providers", "threads", "batch", "prompts")}
    for name in ("threads", "batch", "prompts"):
        if any(n < 1 for n in parts[name] or ()):
            parser.error(f"--{name} is {min(parts[name])}; it must be at least 1")
    for name in parts["providers"] or ():
        if not any(label.startswith(name) for label in PROVIDERS):
            parser.error(f"--providers has {name!r}, with which none of these begins: {'; '.join(PROVIDERS)}")
    only = "; ".join(f"{name} {values}" for name, values in parts.items() if values) or None
    wanted = {TINY.name: TINY} if options.quick else {GPT2.name: GPT2} if only else {m.name: m for m in MODELS}
    labels = [label for label in PROVIDERS if label.startswith((REFERENCE, *(options.providers or [""])))]
    plan = Plan(
        tuple(wanted.values()),
        labels,
        options.threads or list(dict.fromkeys((usable_cpus(), 1))),
        1 if options.quick else 5,
        options.batch,
        options.prompts,
    )
    return bench(plan, only, options.quick, options.out)


if __name__ == "__main__":
    sys.exit(main())
