"""Compare how fast a trained model learns and generates on our kernels and on plain PyTorch:

    python -m benchmarks.model_speed --run runs/demo

The same weights and the same text go through both.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import Tensor

from tinyllm import info, tune_allocator
from tinyllm.config.saved import CONFIG_FILE
from tinyllm.data.batches import val_loader
from tinyllm.generation import iter_tokens
from tinyllm.model import SimpleLLM
from tinyllm.ops.backends import cpp
from tinyllm.runs.load import load_run
from tinyllm.training.begin import datasets
from tinyllm.training.trainer import TrainConfig, adamw

from .measure import relative_error, take_turns
from .peers import PlainLLM, clip_and_step, torchs_adamw
from .tables import format_time

OURS, PLAIN = "tinyllm's kernels", "plain PyTorch"
NEW_TOKENS = 32
SECONDS = 2.0  # for each path in each comparison


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a folder that `tinyllm train` made")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="rounds of each comparison (default: a few seconds' worth)"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    if not cpp.loaded:
        print(f"There is nothing to compare, both would be plain PyTorch: {cpp.why_not}")
        return 0
    tune_allocator()  # for both sides, as `tinyllm train` does
    try:
        print(comparison(options.run, options.steps))
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.model_speed: error: {error}", file=sys.stderr)
        return 2
    return 0


def comparison(run: Path, rounds: int | None = None) -> str:
    """Return the table of a run folder's model; `rounds` as in `take_turns`.

    Raises:
        FileNotFoundError, ValueError: the folder is not a whole run.
    """
    model, tokenizer, config = load_run(run)
    try:
        training = TrainConfig(**config["training"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / CONFIG_FILE} does not say how the model was trained: {error}") from error
    dataset, _ = datasets(config["data"], run, tokenizer, training.seq_len)
    inputs, targets = next(iter(val_loader(dataset, batch_size=training.batch_size, max_batches=1)))
    plain = PlainLLM(model).eval()
    _check_same(model, plain, inputs)
    models = {OURS: model, PLAIN: cast(SimpleLLM, plain)}  # to train, they have in common what it takes
    # Half the context is the prompt. It is not filled up, where ours would read half of it again.
    prompt = inputs[:1, : max(1, model.config.max_seq_len // 2)]
    new_tokens = min(NEW_TOKENS, model.config.max_seq_len - prompt.size(1))
    steps = {name: _training_step(copy.deepcopy(each), training, inputs, targets) for name, each in models.items()}
    writing: dict[str, Callable[[], object]] = {
        OURS: lambda: [*iter_tokens(model, prompt, new_tokens, seed=0)],  # Ctrl-C ends it as it ends the other
        PLAIN: partial(plain.generate, prompt, new_tokens),
    }
    _, step_times = take_turns(steps, SECONDS, rounds)
    _, writing_times = take_turns(writing, SECONDS, rounds)

    isa = info()["cpu"]["chosen_isa"]
    lines = [
        f"The model of {run} ({model.num_parameters():,} weights), {torch.get_num_threads()} threads, {isa}:",
        "",
        f"{'':<26}{OURS:<36}{PLAIN:<36}speed-up",
        _line(f"training, {inputs.size(0)} x {inputs.size(1)} tokens", "step", step_times, 1, inputs.numel()),
        _line("writing", "token", writing_times, new_tokens, 1),
        "",
        f"Medians of {len(step_times[OURS])} and {len(writing_times[OURS])} rounds, in which the two take turns.",
        "Both have the same weights, the same text and, but for rounding, the same logits. Plain PyTorch uses its own",
        "layer_norm, scaled_dot_product_attention, linear and cross_entropy. Clipping and AdamW, each side's own, are",
        f"in the times. Each writes {new_tokens} tokens after a prompt of {prompt.size(1)} read in that time,",
        "and keeps keys and values in a cache, if the model is causal.",
    ]
    return "\n".join(lines)


def _line(name: str, unit: str, times: dict[str, list[float]], units_per_call: int, tokens_per_unit: int) -> str:
    """Return a line of the table: a call makes `units_per_call` units, whose time is shown, of so many tokens each."""
    medians = {path: median(seconds) / units_per_call for path, seconds in times.items()}
    cells = [
        f"{f'{format_time(s)} a {unit},':<18} {f'{tokens_per_unit / s:,.0f} tokens/s':<17}" for s in medians.values()
    ]
    return f"{name:<26}{cells[0]}{cells[1]}{medians[PLAIN] / medians[OURS]:.2f}x"


def _training_step(model: SimpleLLM, config: TrainConfig, inputs: Tensor, targets: Tensor) -> Callable[[], object]:
    """Return a step as `tinyllm train` does it, on a model of its own; plain PyTorch's has PyTorch's optimizer."""
    optimizer = (adamw if isinstance(model, SimpleLLM) else torchs_adamw)(model.train(), config)
    parameters = list(model.parameters())

    def step() -> None:
        loss = model.loss(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_and_step(optimizer, parameters, config.grad_clip)

    return step


@torch.no_grad()
def _check_same(model: SimpleLLM, plain: PlainLLM, inputs: Tensor) -> None:
    """Raise ValueError unless both give the same logits, but for rounding: half of float32's digits."""
    logits = model(inputs)
    error = relative_error([logits], [plain(inputs).double()])
    limit = torch.finfo(logits.dtype).eps ** 0.5
    if not error <= limit:
        raise ValueError(f"the two paths disagree: the logits differ by {error:.1e} of their size, allowed {limit:.1e}")


if __name__ == "__main__":
    sys.exit(main())
