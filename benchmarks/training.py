"""Compare how fast training is, everything counted: data, forward, backward, clipping, optimizer and bookkeeping.

    python -m benchmarks.training              all of these; a quarter of an hour
    python -m benchmarks.training --only char  what `tinyllm train --tokenizer char` does, beside plain PyTorch
    python -m benchmarks.training --only goal  the time to a loss, of `tinyllm train` by its own recipe and of plain
                                               PyTorch by nanoGPT's; three minutes
    python -m benchmarks.training --only gpt2  GPT-2's size, beside Hugging Face's model
    python -m benchmarks.training --only engine    `tinyllm train` beside a bare loop of the same model
    python -m benchmarks.training --quick      a first impression

A whole run writes results/training/FAMILY.json, the page and the README's table. A part, or a quick run, is printed and
nothing else; `--out DIR` keeps its JSON.

`tinyllm train`'s loop runs as it is. It takes turns of LOG_INTERVAL steps with the others, which run when it begins its
next step: all learn from the same text, at the same rates, in the same process, and the losses they end with compare as
their times do.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

# Before torch reads it: torch.compile's worker processes would still be starting when the first steps are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm import tune_allocator
from tinyllm._internal.allocator import allocator_state
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.training import TrainConfig
from tinyllm.data.batches import Batches, ShuffledWindows, TokenDataset, train_loader, val_loader
from tinyllm.data.corpus import Corpus, standard_library, write_shards
from tinyllm.data.shards import token_dtype
from tinyllm.model import SimpleLLM, init_gpt2_weights
from tinyllm.ops.backends import cpp
from tinyllm.runs.folder import METRICS_FILE
from tinyllm.runs.metrics import read_metrics
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training import loop
from tinyllm.training.engine import launch
from tinyllm.training.optim import adamw

from . import machine, report
from .measure import relative_error, statistics_of
from .peers import HuggingFace, PlainLLM, gpt2_names, torchs_adamw
from .row import FLOPS, OURS, STEP
from .tables import format_time
from .turns import LOG_INTERVAL, HandWritten, LossOf, NextBatch, Rounds, Run, Terminal, Turns, in_turns
from .work import model_flops

PLAIN, COMPILED, BARE = "plain PyTorch", "torch.compile", "bare loop"
HF, HF_COMPILED = "Hugging Face", "torch.compile of it"
SECTIONS = ("char", "goal", "gpt2", "engine")
CHARACTERS = 65
GPT2 = SimpleLLMConfig(50257, 768, 3072, 12, 12, True, 256, 0.0, "gelu", True, True, True, "learned")
GPT2_BATCH = 4

# ---- What is trained


@dataclass(frozen=True)
class Text:
    """A tokenized text: what to train on, what to validate with."""

    tokenizer: CharTokenizer
    train: TokenDataset
    val: TokenDataset


def prepare_text(corpus: Corpus, folder: Path, seq_len: int, characters: int = CHARACTERS) -> Text:
    """Tokenize as `tinyllm train --tokenizer char` does, with the most frequent characters."""
    tokenizer = CharTokenizer.from_texts(corpus.texts(0), characters)
    shards = write_shards(corpus, tokenizer, folder, seed=0, seq_len=seq_len)
    sets = [TokenDataset(paths, tokenizer.vocab_size, seq_len) for paths in (shards.train, shards.val)]
    return Text(tokenizer, *sets)


def char_config(steps: int, seed: int = 0, **changes: Any) -> TrainConfig:
    """Return what `tinyllm train --preset tiny --tokenizer char --optimizer adamw` does, validated at the end only."""
    fixed: dict[str, Any] = {"tokenizer": "char", "vocab_size": CHARACTERS, "device": "cpu", "optimizer": "adamw"}
    return TrainConfig.from_preset("tiny", steps=steps, seed=seed, eval_interval=steps, **{**fixed, **changes})


def new_model(config: TrainConfig, vocab_size: int) -> SimpleLLM:
    """Return a model with the first weights that `tinyllm train` would give it."""
    torch.manual_seed(config.seed)
    return init_gpt2_weights(SimpleLLM.from_config(config.model_config(vocab_size)))


def random_batches(path: Path, vocab_size: int, config: TrainConfig) -> NextBatch:
    """Draw batches nanoGPT's way: windows from random places of the memory-mapped text."""
    data = np.memmap(path, dtype=token_dtype(vocab_size), mode="r")
    generator = torch.Generator().manual_seed(config.seed)
    length = config.seq_len

    def next_batch() -> tuple[Tensor, Tensor]:
        places = torch.randint(len(data) - length, (config.batch_size,), generator=generator).tolist()
        inputs = torch.stack([torch.from_numpy(data[at : at + length].astype(np.int64)) for at in places])
        targets = torch.stack([torch.from_numpy(data[at + 1 : at + 1 + length].astype(np.int64)) for at in places])
        return inputs, targets

    return next_batch


def fitted(
    text: Text, config: TrainConfig, others: Mapping[str, Run]
) -> tuple[Rounds, loop.Fitted, list[dict[str, Any]]]:
    """Run `tinyllm train`'s loop, in turns with the others: times, how it ended, the lines of metrics.jsonl."""
    turns = Turns(others, LOG_INTERVAL)
    sets = (text.train, text.val)
    model = new_model(config, text.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stderr(Terminal()):
            done = loop.fit(launch(config), model, text.tokenizer, *sets, config, Path(folder), on_step=turns.on_step)
        return turns.rounds, done, read_metrics(Path(folder, METRICS_FILE))


def validation(text: Text, config: TrainConfig) -> Batches:
    return val_loader(text.val, batch_size=config.batch_size, max_batches=config.eval_batches)


@torch.no_grad()
def mean_loss(loss_of: LossOf, batches: Batches) -> float:
    """Return the loss per token, over all batches."""
    sums = [(loss_of(inputs, targets).item() * targets.numel(), targets.numel()) for inputs, targets in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def check_same(ours: SimpleLLM, name: str, function: LossOf, peer: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return how far the peer's loss and gradients are from ours; AssertionError where it is more than rounding."""
    loss = ours.loss(*batch)
    loss.backward()
    hugging_face = isinstance(peer, HuggingFace)
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    exact = gpt2_names(gradients, transposed=hugging_face)
    theirs = function(*batch)
    theirs.backward()
    got = {n.removeprefix("model.transformer."): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    names = sorted(exact.keys() & got.keys())
    missing = (exact.keys() ^ got.keys()) - ({"lm_head.bias"} if hugging_face else set())
    assert not missing, f"{name} has other parameters: {missing}"
    error = relative_error(
        [theirs.detach(), *(got[n] for n in names)],
        [loss.detach().double(), *(exact[n].double() for n in names)],
    )
    ours.zero_grad(set_to_none=True)
    peer.zero_grad(set_to_none=True)
    limit = torch.finfo(loss.dtype).eps ** 0.5
    assert error <= limit, f"{name}: loss and gradients differ from ours by {error:.1e} of their size, not {limit:.1e}"
    return error


def peers_of(
    ours: SimpleLLM, make: Callable[[SimpleLLM], Any], names: Sequence[str], batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, tuple[LossOf, Any]], dict[str, float], dict[str, str]]:
    """Return the peers of a model that compute what it does with their losses, their errors, and why others cannot take
    part. The second one of `names` is torch.compile of the first."""
    found: dict[str, tuple[LossOf, Any]] = {}
    errors, failed = {OURS: 0.0}, {}
    for name in names:
        try:
            peer = make(ours)
            loss_of = peer.loss if name == names[0] else torch.compile(peer.loss, dynamic=False)
            errors[name] = check_same(ours, name, loss_of, peer, batch)
            found[name] = loss_of, peer
        except ImportError:
            failed[name] = "no transformers; pip install 'tinyllm[bench]'"
        except Exception as error:  # a compiler may raise anything
            if name == names[0]:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    return found, errors, failed


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- The comparisons


@dataclass
class Measured:
    """Result of a comparison: the sides that took part with their errors, the others with the reason, and what
    the table does not say."""

    title: str
    model: SimpleLLMConfig
    batch: tuple[int, int]  # sequences, tokens in each
    rounds: Rounds
    errors: dict[str, float]
    details: dict[str, Any]
    failed: dict[str, str] = field(default_factory=dict)
    steps: int = 1  # how many a row's time is of

    def rows(self, section: str) -> list[dict[str, Any]]:
        """Return them in the form that `report.make_results` takes."""
        rounds, model, (batch, seq_len) = self.rounds.undisturbed(), self.model, self.batch
        what = "a step" if self.steps == 1 else "all steps"
        sizes = f"{model.embedding_dim}/{model.hidden_dim}/{model.num_layers}"
        facts = {
            "benchmark": f"{self.title}, {what} {sizes} B{batch} T{seq_len} V{model.vocab_size}",
            "section": section,
            "direction": STEP,
            "dtype": "float32",
            "unit": FLOPS,
            "tokens": self.steps * batch * seq_len,
            "threads": torch.get_num_threads(),
            "other_load_cores": rounds.load(),
            "rounds_left_out": len(self.rounds.times) - len(rounds.times),
            "work": self.steps
            * model_flops(
                STEP,
                batch=batch,
                seq_len=seq_len,
                vocab_size=model.vocab_size,
                embedding_dim=model.embedding_dim,
                hidden_dim=model.hidden_dim,
                num_layers=model.num_layers,
                out_proj=True,
                causal=True,
            ),
        }
        found = [
            {**facts, "provider": name, "error": error, **statistics_of([self.steps * t for t in rounds.of(name)])}
            for name, error in self.errors.items()
        ]
        return found + [{**facts, "provider": name, "failed": why} for name, why in self.failed.items()]


def measure_char(text: Text, steps: int, seeds: int, compiled: bool = True, **changes: Any) -> Measured:
    """Compare `tinyllm train` with a GPT in plain PyTorch: same first weights, same text, same rates, same number of
    steps. Each has its own way to draw batches. Raises AssertionError if losses or gradients differ at first."""
    ours = new_model(char_config(steps, **changes), text.tokenizer.vocab_size)
    batch = text.train.__getitems__(range(0, len(text.train), max(1, len(text.train) // 12))[:12])
    peers, errors, failed = peers_of(ours, PlainLLM, (PLAIN, COMPILED)[: 1 + compiled], batch)
    rounds = Rounds()
    val_losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        config = char_config(steps, seed, **changes)
        first = PlainLLM(new_model(config, text.tokenizer.vocab_size)).state_dict()
        by_hand = {}
        for name, (loss_of, peer) in peers.items():
            peer.load_state_dict(first)
            batches = random_batches(text.train.paths[0], text.tokenizer.vocab_size, config)
            by_hand[name] = HandWritten(loss_of, torchs_adamw(peer, config), config, batches)
        found, done, _ = fitted(text, config, {name: side.run for name, side in by_hand.items()})
        rounds.times += found.times
        rounds.loads += found.loads
        ends = {OURS: done.val_loss}
        ends |= {name: mean_loss(peer.loss, validation(text, config)) for name, (_, peer) in peers.items()}
        for name, end in ends.items():
            val_losses.setdefault(name, []).append(float(end or "nan"))
    parameters = {OURS: ours.num_parameters(), PLAIN: count(peers[PLAIN][1])}
    details = {"steps": steps, "seeds": seeds, "val_loss": val_losses, "parameters": parameters}
    shape = config.batch_size, config.seq_len
    return Measured("character model", ours.config, shape, rounds, errors, details, failed)


def measure_goal(text: Text, steps: int = 2000, our_steps: int = 290, **changes: Any) -> Measured:
    """Compare whole trainings: a GPT in plain PyTorch by nanoGPT's recipe for a small model, in `steps`, and `tinyllm
    train` by its own, in so few that it ends with the same loss. In a turn each does the same share of its steps."""
    recipe: dict[str, Any] = {"lr": 1e-3, "warmup_steps": min(100, steps // 20), "beta2": 0.99}
    theirs, ours = char_config(steps, **recipe, **changes), char_config(our_steps, optimizer=None, **changes)
    peer = PlainLLM(new_model(theirs, text.tokenizer.vocab_size))
    batches = random_batches(text.train.paths[0], text.tokenizer.vocab_size, theirs)
    by_hand = HandWritten(peer.loss, torchs_adamw(peer, theirs), theirs, batches)
    done = 0

    def run(n: int) -> None:
        nonlocal done
        done += n
        by_hand.run(round(done * steps / our_steps) - by_hand.step)

    rounds, fit, _ = fitted(text, ours, {PLAIN: run})
    ends = {OURS: fit.val_loss, PLAIN: mean_loss(peer.loss, validation(text, ours))}
    details = {"steps": {OURS: fit.steps, PLAIN: by_hand.step}, "val_loss": ends}
    model = ours.model_config(text.tokenizer.vocab_size)
    shape = ours.batch_size, ours.seq_len
    errors = {OURS: 0.0, PLAIN: 0.0}
    return Measured("character model to a loss", model, shape, rounds, errors, details, steps=our_steps)


def measure_engine(text: Text, steps: int, **changes: Any) -> Measured:
    """Compare `tinyllm train` with a loop of the same model with nothing around it, and its batches ready in memory.
    Raises AssertionError unless both do the same to the bit."""
    config = char_config(steps, **changes)
    model = new_model(config, text.tokenizer.vocab_size)
    windows = ShuffledWindows(text.train, batch_size=config.batch_size, seed=config.seed)
    loader = iter(train_loader(text.train, windows))
    batches: Iterator[tuple[Tensor, Tensor]] = iter([next(loader) for _ in range(steps)])
    bare = HandWritten(model.loss, adamw(model, config), config, lambda: next(batches))
    rounds, done, lines = fitted(text, config, {BARE: bare.run})
    val_loss = mean_loss(model.loss, validation(text, config))
    assert done.val_loss == val_loss, f"the bare loop ends with loss {val_loss}, `tinyllm train` with {done.val_loss}"
    quiet = rounds.undisturbed()
    waited = sum(line["wait_s"] for line in lines if line["split"] == "train") / steps
    details = {
        "cost_s": median(times[OURS] - times[BARE] for times in quiet.times),
        "wait_s": waited,
        "wait_fraction": waited / median(quiet.of(OURS)),
    }
    shape = config.batch_size, config.seq_len
    return Measured("the engine", model.config, shape, rounds, {OURS: 0.0, BARE: 0.0}, details)


def measure_gpt2(
    config: SimpleLLMConfig = GPT2, batch: int = GPT2_BATCH, rounds: int = 8, compiled: bool = True
) -> Measured:
    """Compare steps of SimpleLLM with those of Hugging Face's model, on the same random tokens."""
    settings = TrainConfig(steps=1000, schedule="constant", lr=1e-4, warmup_steps=0)
    torch.manual_seed(0)
    ours = init_gpt2_weights(SimpleLLM.from_config(config))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, config.max_seq_len + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    peers, errors, failed = peers_of(ours, HuggingFace, (HF, HF_COMPILED)[: 1 + compiled], (inputs, targets))
    sides: dict[str, tuple[LossOf, Any]] = {OURS: (ours.loss, ours), **peers}
    by_hand = {
        name: HandWritten(loss_of, optimizer(model, settings), settings, lambda: (inputs, targets))
        for name, (loss_of, model) in sides.items()
        for optimizer in [adamw if name == OURS else torchs_adamw]
    }
    found = in_turns({name: side.run for name, side in by_hand.items()}, rounds)
    details = {
        "loss": {name: loss_of(inputs, targets).item() for name, (loss_of, _) in sides.items()},
        "parameters": {name: count(model) for name, (_, model) in sides.items()},
    }
    return Measured("GPT-2's size", config, (batch, config.max_seq_len), found, errors, details, failed)


# ---- All of it


def make_results(facts: Mapping[str, Any], ceilings: Any, sections: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the content of a file of results; `sections`: what was measured, by its name."""
    rows = [row for name, measured in sections.items() for row in measured.rows(name)]
    return report.make_results(
        {**facts, "details": {name: measured.details for name, measured in sections.items()}}, ceilings, rows
    )


def bench(only: str | None = None, quick: bool = False, out: Path | None = None) -> int:
    """Measure, print the table, write what there is to write; return the exit status."""
    if not cpp.loaded:
        print(f"There are no compiled kernels to benchmark: {cpp.why_not}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    tune_allocator()  # for all sides, as the command line does
    facts = {**machine.describe(), "quick": quick, "only": only, "allocator": {"glibc": allocator_state()}}
    for package in ("lightning-fabric", "transformers"):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    print("Measuring what the machine can do at best ...", flush=True)
    ceilings = machine.ceilings(quick)
    sections: dict[str, Measured] = {}
    print("Median times of a step, all having been verified to compute the same:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text: Text | None = None
        for name in SECTIONS if only is None else (only,):
            if name == "gpt2":
                sections[name] = measure_gpt2(rounds=2 if quick else 8, compiled=not quick)
            else:
                text = text or prepare_text(standard_library(), Path(folder), char_config(1).seq_len)
                if name == "char":
                    sections[name] = measure_char(text, *((60, 1) if quick else (300, 3)))
                elif name == "goal":
                    sections[name] = measure_goal(text, *((200, 30) if quick else ()))
                else:
                    sections[name] = measure_engine(text, 60 if quick else 600)
            for row in sections[name].rows(name):
                shown = format_time(row["median_s"]) if report.is_measured(row) else row["failed"]
                print(f"  {row['benchmark']:<55} {row['provider']:<20} {shown:>8}", flush=True)
    results = make_results(facts, ceilings, sections)
    print(f"\n{report.render_tables(results)}\n")
    report.publish(results, out)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = report.parser_of("training", __doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one of them")
    options = parser.parse_args(arguments)
    return bench(options.only, options.quick, options.out)


if __name__ == "__main__":
    sys.exit(main())
