"""How fast training is, everything counted: data, forward, backward, clipping, optimizer and bookkeeping.

    python -m benchmarks.training_speed              all three; some ten minutes
    python -m benchmarks.training_speed --only char  what `tinyllm train --tokenizer char` does, beside plain PyTorch
    python -m benchmarks.training_speed --only gpt2  GPT-2's size, beside Hugging Face's model
    python -m benchmarks.training_speed --only engine    `tinyllm train` beside a bare loop of the same model
    python -m benchmarks.training_speed --quick      a first impression

A whole run writes results/training.json and the README's table. A part, or a quick run, is printed and nothing else;
`--out DIR` keeps its JSON.

`tinyllm train`'s loop runs as it is. It takes turns of LOG_INTERVAL steps with the others, which run when it asks for
the next step's random numbers: all learn from the same text, at the same rates, in the same process, and the losses
they end with compare as their times do.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

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
from tinyllm.data.corpus import Corpus, standard_library, write_tokens
from tinyllm.data.shards import token_dtype
from tinyllm.model import SimpleLLM, init_gpt2_weights
from tinyllm.ops.backends import cpp
from tinyllm.runs.folder import METRICS_FILE
from tinyllm.runs.metrics import read_metrics
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training import loop
from tinyllm.training.engine import launch
from tinyllm.training.optim import adamw

from . import machine, report, training_report
from .harness import FLOPS, OURS, STEP, relative_error
from .timing import format_time
from .training_peers import gpt2_names, hugging_face, plain_gpt
from .training_turns import HandWritten, LossOf, NextBatch, Rounds, Terminal, Turns, in_turns
from .work import model_flops

PLAIN, COMPILED, BARE = "plain PyTorch", "torch.compile", "bare loop"
HF, HF_COMPILED = "Hugging Face", "torch.compile of it"
SECTIONS = ("char", "gpt2", "engine")
CHARACTERS = 65
GPT2 = SimpleLLMConfig(50257, 768, 3072, 12, 12, True, 256, 0.0, "gelu", True, True, True, "learned")
GPT2_BATCH = 4


@dataclass(frozen=True)
class Text:
    """A tokenized text: what to train on, what to validate with."""

    tokenizer: CharTokenizer
    train: TokenDataset
    val: TokenDataset


# ---- The character model


def prepare_text(corpus: Corpus, folder: Path, seq_len: int, characters: int = CHARACTERS) -> Text:
    """As `tinyllm train --tokenizer char` does, with the most frequent characters."""
    tokenizer = CharTokenizer.from_texts(corpus.texts(0), characters)
    files = write_tokens(corpus.texts(0), tokenizer, folder, seq_len=seq_len)
    sets = [TokenDataset(path, tokenizer.vocab_size, seq_len) for path in (files.train, files.val)]
    return Text(tokenizer, *sets)


def char_config(steps: int, seed: int = 0, **changes: Any) -> TrainConfig:
    """What `tinyllm train --preset tiny --tokenizer char` trains, with no validation before the end."""
    return TrainConfig.from_preset(
        "tiny",
        tokenizer="char",
        vocab_size=CHARACTERS,
        steps=steps,
        seed=seed,
        eval_interval=steps,
        device="cpu",
        **changes,
    )


def new_model(config: TrainConfig, vocab_size: int) -> SimpleLLM:
    """With the first weights that `tinyllm train` would give it."""
    torch.manual_seed(config.seed)
    return init_gpt2_weights(SimpleLLM.from_config(config.model_config(vocab_size)))


def random_batches(path: Path, vocab_size: int, config: TrainConfig) -> NextBatch:
    """nanoGPT's way: windows from random places of the memory-mapped text."""
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
    text: Text, config: TrainConfig, others: Mapping[str, Callable[[int], None]]
) -> tuple[Turns, loop.Fitted, list[dict[str, Any]]]:
    """Run `tinyllm train`'s loop, in turns with the others: times, how it ended, the lines of metrics.jsonl."""
    turns = Turns(others, config.seed)
    model = new_model(config, text.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "seed_step", turns):
        with redirect_stderr(Terminal()):
            done = loop.fit(launch(config), model, text.tokenizer, text.train, text.val, config, Path(folder))
        return turns, done, read_metrics(Path(folder, METRICS_FILE))


@torch.no_grad()
def mean_loss(loss_of: LossOf, batches: Batches) -> float:
    """Per token, over all batches."""
    sums = [(loss_of(inputs, targets).item() * targets.numel(), targets.numel()) for inputs, targets in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def measure_char(text: Text, steps: int, seeds: int, compiled: bool = True, **changes: Any) -> dict[str, Any]:
    """`tinyllm train` beside a GPT in plain PyTorch: same first weights, same text, same rates, same number of steps.

    Each has its own way to draw batches. Raises AssertionError if the two models' losses or gradients differ at first.
    """
    ours = new_model(char_config(steps, **changes), text.tokenizer.vocab_size)
    plain = plain_gpt(ours)
    peers: dict[str, nn.Module] = {PLAIN: plain}
    losses: dict[str, LossOf] = {PLAIN: plain}
    failed: dict[str, str] = {}
    batch = text.train.__getitems__(range(0, len(text.train), max(1, len(text.train) // 12))[:12])
    errors = {OURS: 0.0, PLAIN: check_same(ours, PLAIN, plain, plain, batch)}
    if compiled:
        other = plain_gpt(ours)
        function: Any = torch.compile(other, dynamic=False)
        try:
            errors[COMPILED] = check_same(ours, COMPILED, function, other, batch)
        except Exception as error:  # a compiler may raise anything
            failed[COMPILED] = f"{type(error).__name__}: {error}"
        else:
            peers[COMPILED], losses[COMPILED] = other, function
    rounds = Rounds()
    val_losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        config = char_config(steps, seed, **changes)
        first = gpt2_names(dict(new_model(config, text.tokenizer.vocab_size).named_parameters()))
        by_hand = {}
        for name, peer in peers.items():
            peer.load_state_dict({**first, "lm_head.weight": first["wte.weight"]})
            batches = random_batches(text.train.paths[0], text.tokenizer.vocab_size, config)
            by_hand[name] = HandWritten(losses[name], adamw(peer, config), config, batches)
        turns, done, _ = fitted(text, config, {name: side.run for name, side in by_hand.items()})
        found = {OURS: done.val_loss, **{name: mean_loss(peers[name], _val(text, config)) for name in peers}}
        rounds.times += turns.rounds.times
        rounds.loads += turns.rounds.loads
        for name in found:
            val_losses.setdefault(name, []).append(float(found[name] or "nan"))
    sizes = ours.config
    return {
        "benchmark": f"character model, a step {shape_of(sizes, config.batch_size, config.seq_len)}",
        "model": sizes,
        "batch": (config.batch_size, config.seq_len),
        "rounds": rounds,
        "failed": failed,
        "errors": errors,
        "facts": {
            "steps": steps,
            "seeds": seeds,
            "val_loss": val_losses,
            "parameters": {OURS: ours.num_parameters(), PLAIN: count(plain)},
        },
    }


def _val(text: Text, config: TrainConfig) -> Batches:
    return val_loader(text.val, batch_size=config.batch_size, max_batches=config.eval_batches)


def check_same(
    ours: SimpleLLM, name: str, function: LossOf, peer: nn.Module, batch: tuple[Tensor, Tensor], prefix: str = ""
) -> float:
    """How far the peer's loss and gradients are from ours; AssertionError where it is more than rounding."""
    loss = ours.loss(*batch)
    loss.backward()
    transposed = bool(prefix)
    exact = gpt2_names({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, transposed=transposed)
    theirs = function(*batch)
    theirs.backward()
    got = {n.removeprefix(prefix): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    names = sorted(exact.keys() & got.keys())
    missing = (exact.keys() ^ got.keys()) - {"lm_head.bias"}  # which Hugging Face's has not
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


# ---- What the engine costs


def measure_engine(text: Text, steps: int, **changes: Any) -> dict[str, Any]:
    """`tinyllm train` beside a loop of the same model with nothing around it, and its batches ready in memory.

    Raises AssertionError unless both do the same to the bit.
    """
    config = char_config(steps, **changes)
    model = new_model(config, text.tokenizer.vocab_size)
    windows = ShuffledWindows(text.train, batch_size=config.batch_size, seed=config.seed)
    loader = iter(train_loader(text.train, windows))
    batches: Iterator[tuple[Tensor, Tensor]] = iter([next(loader) for _ in range(steps)])
    bare = HandWritten(model.loss, adamw(model, config), config, lambda: next(batches))
    turns, done, lines = fitted(text, config, {BARE: bare.run})
    val_loss = mean_loss(model.loss, _val(text, config))
    assert done.val_loss == val_loss, f"the bare loop ends with loss {val_loss}, `tinyllm train` with {done.val_loss}"
    rounds = turns.rounds.undisturbed()
    waited = sum(line["wait_s"] for line in lines if line["split"] == "train") / steps
    return {
        "benchmark": f"the engine, a step {shape_of(model.config, config.batch_size, config.seq_len)}",
        "model": model.config,
        "batch": (config.batch_size, config.seq_len),
        "rounds": turns.rounds,
        "failed": {},
        "errors": {OURS: 0.0, BARE: 0.0},
        "facts": {
            "cost_s": median(times[OURS] - times[BARE] for times in rounds.times),
            "wait_s": waited,
            "wait_fraction": waited / median(rounds.of(OURS)),
        },
    }


# ---- GPT-2


def measure_gpt2(
    config: SimpleLLMConfig = GPT2, batch: int = GPT2_BATCH, rounds: int = 8, compiled: bool = True
) -> dict[str, Any]:
    """Steps of SimpleLLM and of Hugging Face's model, on the same random tokens."""
    settings = TrainConfig(steps=1000, schedule="constant", lr=1e-4, warmup_steps=0)
    torch.manual_seed(0)
    ours = init_gpt2_weights(SimpleLLM.from_config(config))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, config.max_seq_len + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    sides: dict[str, tuple[LossOf, nn.Module]] = {OURS: (ours.loss, ours)}
    errors, failed = {OURS: 0.0}, {}
    for name in (HF, HF_COMPILED)[: 1 + compiled]:
        try:
            peer = hugging_face(ours)
            function: LossOf = torch.compile(peer, dynamic=False) if name == HF_COMPILED else peer
            errors[name] = check_same(ours, name, function, peer, (inputs, targets), "model.transformer.")
            sides[name] = (function, peer)
        except ImportError:
            failed[name] = "no transformers; pip install 'tinyllm[bench]'"
        except Exception as error:
            if name == HF:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    by_hand = {
        name: HandWritten(loss_of, adamw(model, settings), settings, lambda: (inputs, targets))
        for name, (loss_of, model) in sides.items()
    }
    found = in_turns({name: side.run for name, side in by_hand.items()}, rounds)
    ends = {name: loss_of(inputs, targets).item() for name, (loss_of, _) in sides.items()}
    return {
        "benchmark": f"GPT-2's size, a step {shape_of(config, batch, config.max_seq_len)}",
        "model": config,
        "batch": (batch, config.max_seq_len),
        "rounds": found,
        "failed": failed,
        "errors": errors,
        "facts": {"loss": ends, "parameters": {name: count(model) for name, (_, model) in sides.items()}},
    }


# ---- All of it


def shape_of(model: SimpleLLMConfig, batch: int, seq_len: int) -> str:
    sizes = f"{model.embedding_dim}/{model.hidden_dim}/{model.num_layers}"
    return f"{sizes} B{batch} T{seq_len} V{model.vocab_size}"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rows(section: str, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In the form that `report.make_results` takes."""
    rounds = measured["rounds"].undisturbed()
    model, (batch, seq_len) = measured["model"], measured["batch"]
    info = {
        "benchmark": measured["benchmark"],
        "section": section,
        "direction": STEP,
        "dtype": "float32",
        "unit": FLOPS,
        "tokens": batch * seq_len,
        "threads": torch.get_num_threads(),
        "other_load_cores": rounds.load(),
        "rounds_left_out": len(measured["rounds"].times) - len(rounds.times),
        "work": model_flops(
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
    found: list[dict[str, Any]] = []
    for name in measured["errors"]:
        seconds = rounds.of(name)
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        stats = {"rounds": len(seconds), "median": median(seconds), "iqr": high - low}
        found.append({"extra_info": {**info, "provider": name, "error": measured["errors"][name]}, "stats": stats})
    found += [{"extra_info": {**info, "provider": name, "failed": why}} for name, why in measured["failed"].items()]
    return found


def make_results(
    facts: Mapping[str, Any], ceilings: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of training.json; `sections`: what was measured, by its name."""
    found = [row for name, measured in sections.items() for row in rows(name, measured)]
    results = report.make_results(facts, ceilings, found)
    del results["one_thread"]
    return {**results, "details": training_report.rounded({name: sections[name]["facts"] for name in sections})}


def undisturbed_ceilings(quick: bool, attempts: int = 5) -> dict[str, Any]:
    """`machine.ceilings`, again while other programs are busy: they would make every fraction of it too large."""
    least: float | None = math.inf
    found: dict[str, Any] = {}
    for _ in range(1 if quick else attempts):
        others = machine.OtherLoad()
        ceilings = machine.ceilings(quick)
        load = others.cores()
        if load is None or least is None or load < least:
            least, found = load, ceilings
        if least is None or least < machine.DISTURBED:
            break
    return found


def bench(only: str | None = None, quick: bool = False, out: Path | None = None) -> int:
    """Measure, print the table, write what there is to write; returns the exit status."""
    if not cpp.loaded:
        print(f"There are no compiled kernels to benchmark: {cpp.why_not}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    tune_allocator()  # for all sides, as the command line does
    facts = {**machine.describe(), "quick": quick, "allocator": {"glibc": allocator_state()}}
    facts["versions"] |= training_report.versions()
    print("Measuring what the machine can do at best ...", flush=True)
    ceilings = undisturbed_ceilings(quick)
    sections: dict[str, dict[str, Any]] = {}
    print("Median times of a step, all having been verified to compute the same:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text: Text | None = None
        for name in SECTIONS if only is None else (only,):
            if name != "gpt2" and text is None:
                text = prepare_text(standard_library(), Path(folder), char_config(1).seq_len)
            if text is None or name == "gpt2":
                sections[name] = measure_gpt2(rounds=2 if quick else 8, compiled=not quick)
            elif name == "char":
                sections[name] = measure_char(text, *((60, 1) if quick else (300, 3)))
            else:
                sections[name] = measure_engine(text, 60 if quick else 600)
            title = sections[name]["benchmark"]
            for row in rows(name, sections[name]):
                shown = format_time(row["stats"]["median"]) if "stats" in row else row["extra_info"]["failed"]
                print(f"  {title:<55} {row['extra_info']['provider']:<20} {shown:>8}", flush=True)
    results = make_results(facts, ceilings, sections)

    print(f"\n{training_report.render_table(results)}\n")
    whole = not (quick or only)
    where = out or (report.RESULTS if whole else None)
    if where:
        print(f"Written: {training_report.save(results, where)}")
    if whole and not out and report.README.exists():
        training_report.update_readme(results)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few steps, and no torch.compile of GPT-2")
    parser.add_argument("--only", choices=SECTIONS, help="one of the three")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write training.json there, and leave the README")
    parser.add_argument("--render", action="store_true", help="only regenerate the README's table")
    options = parser.parse_args(arguments)
    if options.render:
        training_report.update_readme(training_report.load())
        return 0
    return bench(options.only, options.quick, options.out)


if __name__ == "__main__":
    sys.exit(main())
