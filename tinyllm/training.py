"""Training: from text to a run folder. `train` is all of it; `fit` is the loop.

The loop is the field's usual recipe, and the one of GPT-2 and its successors: AdamW with decay on
matrices only (Loshchilov and Hutter 2019), a linear warmup and a cosine decay of the learning rate,
gradients clipped by their global norm, next-token cross-entropy.
"""

from __future__ import annotations

import math
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinyllm import checkpoint
from tinyllm.data import (
    Batches,
    Corpus,
    TokenDataset,
    TokenFiles,
    find_files,
    standard_library,
    train_loader,
    val_loader,
    write_tokens,
)
from tinyllm.metrics import MetricsWriter, plot_loss
from tinyllm.model import SimpleLLM, init_gpt2_weights
from tinyllm.presets import PRESETS, Preset, TrainConfig
from tinyllm.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "PRESETS",
    "Preset",
    "TrainConfig",
    "TrainResult",
    "adamw",
    "choose_device",
    "evaluate",
    "fit",
    "learning_rate",
    "next_token_loss",
    "train",
]


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        out: the run folder.
        model: in eval mode.
        tokenizer: built from the text.
        steps: steps taken: fewer than asked for if it was interrupted.
        val_loss: the last validation loss in nats per token, None if none was reached.
        interrupted: whether SIGINT (Ctrl-C) ended it.
    """

    out: Path
    model: SimpleLLM
    tokenizer: Tokenizer
    steps: int
    val_loss: float | None
    interrupted: bool


def train(
    config: TrainConfig,
    out: str | PathLike[str],
    data: Sequence[str | PathLike[str]] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train a model on text files and leave all in `out`; `tinyllm.checkpoint` lists its files.

    The weights are saved at each validation, so a kill loses little; SIGINT (Ctrl-C) ends the
    training after the step that is under way and saves them, too. The global random state is as
    before.

    Args:
        config: what to train and how.
        out: the run folder; made if missing. An earlier run's files in it are replaced, with
            `overwrite`, once the new text has been read and tokenized; other files stay.
        data: files and directories, see `find_files`; None: Python's standard library.
        overwrite: whether `out` may hold something already.
        progress: show a progress bar on stderr.
        say: called with a line of news at each stage.

    Raises:
        FileExistsError, NotADirectoryError: `out` is taken.
        FileNotFoundError: a path of `data` does not exist.
        ValueError: the text is not text, or too little; the device is not there.
        FloatingPointError: the loss is no longer a number.
    """
    out = checkpoint.check_out(out, overwrite=overwrite)
    device = choose_device(config.device)
    corpus = standard_library() if data is None else find_files(data)
    say(f"Text: {corpus.name}, {_count(len(corpus.files), 'file')}, {corpus.num_bytes / 1e6:.1f} MB")
    if corpus.skipped:
        say(f"Skipped {_count(len(corpus.skipped), 'binary file')}, such as {corpus.skipped[0]}")
    tokenizer = train_tokenizer(config.tokenizer, corpus.texts(config.seed), config.vocab_size)
    say(f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} tokens")

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = SimpleLLM.from_config(config.model_config(tokenizer.vocab_size))
        if PRESETS[config.preset].modern:  # the article's model keeps the article's first weights
            init_gpt2_weights(model)
        model.to(device)
        say(f"Model: {config.preset}, {model.num_parameters():,} weights, on {device}")

        # Up to here nothing is written. write_tokens puts its files in place when both are whole;
        # from then on `out` is the new run's.
        tokens = write_tokens(corpus.texts(config.seed), tokenizer, out, seq_len=config.seq_len)
        say(f"Tokens: {tokens.train_tokens:,} to train on, {tokens.val_tokens:,} to validate with")
        checkpoint.remove_run_files(out, keep=(tokens.train, tokens.val))
        tokenizer.save(out / checkpoint.TOKENIZER_FILE)
        checkpoint.save_config(_run_config(config, model, corpus, tokens), out)

        train_set = TokenDataset(tokens.train, tokenizer.vocab_size, config.seq_len)
        # Of a small corpus the validation part may be shorter than a sequence.
        val_seq_len = min(config.seq_len, tokens.val_tokens - 1)
        val_set = TokenDataset(tokens.val, tokenizer.vocab_size, val_seq_len)
        steps, val_loss, interrupted = fit(model, train_set, val_set, config, out, progress=progress)

    title = f"{config.preset} on {corpus.name}"
    plot_loss(out / checkpoint.METRICS_FILE, out / checkpoint.CURVE_FILE, title=title)
    return TrainResult(out, model.eval(), tokenizer, steps, val_loss, interrupted)


def fit(
    model: SimpleLLM,
    train_set: TokenDataset,
    val_set: TokenDataset,
    config: TrainConfig,
    out: Path,
    *,
    progress: bool = True,
) -> tuple[int, float | None, bool]:
    """Train `model` in place, on the device where it lies; write its metrics and weights to `out`.

    Returns:
        The steps taken, the last validation loss (None if there was none), and whether SIGINT ended
        it.

    Raises:
        FloatingPointError: the loss is no longer a number; the weights last saved stay.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    optimizer = adamw(model, config)
    batches = train_loader(
        train_set,
        batch_size=config.batch_size,
        steps=config.steps,
        seed=config.seed,
        pin_memory=on_gpu,
    )
    val_batches = val_loader(val_set, batch_size=config.batch_size, max_batches=config.eval_batches, pin_memory=on_gpu)
    eval_interval = config.eval_interval or max(100, config.steps // 10)
    losses: list[Tensor] = []  # since the last line of metrics; read together, as each read waits for a GPU
    val_loss: float | None = None
    step = 0
    model.train()

    with (
        MetricsWriter(out / checkpoint.METRICS_FILE) as metrics,
        _Bar(config, progress) as bar,
        _sigint() as stop,
    ):
        for step, (inputs, targets) in enumerate(batches, start=1):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = next_token_loss(model, inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            losses.append(loss.detach())
            bar.advance()

            last = step == config.steps or stop.is_set()
            evaluating = step % eval_interval == 0 or last
            if step == 1 or step % config.log_interval == 0 or evaluating:
                mean = _finite(torch.stack(losses).double().mean().item(), step, config)
                speed = metrics.write(step, "train", mean, lr, tokens=len(losses) * inputs.numel())
                losses.clear()
                bar.show(mean, speed)
            if stop.is_set():
                checkpoint.save_model(model, out)  # at once: whoever pressed Ctrl-C does not want to wait
                break
            if evaluating:
                metrics.restart()
                val_loss, tokens = evaluate(model, val_batches)
                _finite(val_loss, step, config)  # before the weights are saved over better ones
                metrics.write(step, "val", val_loss, lr, tokens=tokens)
                checkpoint.save_model(model, out)
                bar.note(f"step {step}: validation loss {val_loss:.3f}")
                metrics.restart()
        return step, val_loss, stop.is_set()


def next_token_loss(model: SimpleLLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `model(inputs)` and `targets`, both int64 (B, T): a scalar, in nats."""
    return model.loss(inputs, targets)


@torch.no_grad()
def evaluate(model: SimpleLLM, batches: Batches) -> tuple[float, int]:
    """The mean loss per token over all batches, without dropout, and the number of tokens."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for inputs, targets in batches:
        loss = next_token_loss(model, inputs.to(device), targets.to(device))
        total += loss.item() * targets.numel()  # weighted: the last batch may be smaller
        tokens += targets.numel()
    model.train(was_training)
    return total / tokens, tokens


def adamw(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups: weight decay for matrices, none for biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1 .. steps: linear warmup to `lr`, then a cosine to `min_lr_ratio * lr`."""
    warmup = min(500, config.steps // 20) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def _finite(loss: float, step: int, config: TrainConfig) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}: the training diverged; lr was {config.lr}, try a smaller one"
        )
    return loss


class _Bar:
    """The progress bar: steps done, loss, speed, time left."""

    def __init__(self, config: TrainConfig, shown: bool) -> None:
        self._shown = shown
        self._bar = tqdm(
            total=config.steps,
            desc="Training",
            disable=not shown,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every state of the bar
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix} [{remaining} left]",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def show(self, loss: float, tokens_per_s: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)

    def note(self, line: str) -> None:
        if self._shown:
            self._bar.write(line, file=sys.stderr)


@contextmanager
def _sigint() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets; a second one raises KeyboardInterrupt, as ever.

    Only the main thread may take signals; in another one the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _run_config(config: TrainConfig, model: SimpleLLM, corpus: Corpus, tokens: TokenFiles) -> dict[str, Any]:
    return {
        "model": model.config.to_dict(),
        "training": asdict(config),
        "data": {
            "name": corpus.name,
            "files": len(corpus.files),
            "train_tokens": tokens.train_tokens,
            "val_tokens": tokens.val_tokens,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("tinyllm", "torch", "tokenizers", "numpy", "safetensors")},
        },
    }


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the sources, not installed
        return None


def choose_device(name: str) -> torch.device:
    """The device of that name; `"auto"` is a GPU if there is one. ValueError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; allowed are 'cpu', 'cuda', 'cuda:N' and 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed are 'cpu', 'cuda', 'cuda:N' and 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device
