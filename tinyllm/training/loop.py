"""The training loop: from a model and batches to trained weights, checkpoints and a record of how it went.

It is the field's usual recipe, and the one of GPT-2 and its successors: AdamW with decay on matrices only, or Muon for
those of the blocks, a warmup and a decay of the learning rate, gradients clipped by their global norm, next-token
cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyllm._internal.files import is_full_disk
from tinyllm._internal.interrupt import noting_signals
from tinyllm.config.training import TrainConfig
from tinyllm.data.batches import Batches, ShuffledWindows, TokenDataset, train_loader, val_loader
from tinyllm.model import SimpleLLM
from tinyllm.runs.folder import MODEL_FILE, checkpoints, publish
from tinyllm.runs.succession import settle
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.checkpoint import Progress, load_checkpoint, load_weights, prune, save_checkpoint, save_weights
from tinyllm.training.engine import Engine, TrainingModule
from tinyllm.training.optim import AveragedWeights, learning_rate, make_optimizer
from tinyllm.training.recorder import Recorder


@dataclass(frozen=True)
class Fitted:
    """Result of `fit`: steps done in all, the last validation loss, and the signal that ended it, if one did."""

    steps: int
    val_loss: float | None
    signal: int | None


def fit(
    engine: Engine,
    model: SimpleLLM,
    tokenizer: Tokenizer,
    train_set: TokenDataset,
    val_set: TokenDataset,
    config: TrainConfig,
    out: Path,
    *,
    title: str = "",
    progress_bar: bool = True,
    weights: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Fitted:
    """Train `model`, from the last checkpoint in `out` on if there is one. All processes call it.

    SIGINT and SIGTERM end it after the step that is under way, with a checkpoint. A step whose gradient is not finite
    changes nothing, and is said.

    Args:
        engine: see `launch`.
        model: with the weights to begin with, the same in all processes; moved to its device, and sharded, in place.
            On the meta device, with strategy "fsdp": see `Engine.setup`.
        tokenizer: for the samples.
        train_set, val_set: what to learn from, and to validate with.
        config: what to do.
        out: the run folder.
        title: of the picture.
        progress_bar: show one on stderr.
        weights: the file of those to begin with, in place of the model's, if there is no checkpoint.
        on_step: called in every process with the number of the step that is about to begin, from 1, before any of its
            work; for profilers and benchmarks. What it draws from the global random generators changes no step.

    Raises:
        FloatingPointError: too many steps in a row had no finite gradient; the checkpoints stay.
        OSError: a checkpoint could not be written, and `config.stop_on_save_error` is on.
        ValueError: the checkpoint to go on from is damaged, or of another model.
    """
    model.gradient_checkpointing = config.checkpointing
    end = tokenizer.end_of_text_id if config.packing else None
    module = TrainingModule(model, label_smoothing=config.label_smoothing, end_of_text_id=end)
    there = checkpoints(out)
    engine.setup(
        module,
        lambda m: make_optimizer(m, config),
        fill=None if weights is None or there else lambda: load_weights(weights, model),
        seed=config.seed,
        compiled=config.compile,
    )
    progress = Progress()
    averages = None if config.ema is None else AveragedWeights(model, config.ema)
    if there:
        progress = load_checkpoint(engine, there[max(there)], model, averages)
    batches = iter(_train_batches(engine, train_set, config, progress.step))
    val_batches = _val_batches(engine, val_set, config)
    eval_interval, save_interval = config.eval_every, config.checkpoint_every
    losses = [torch.tensor(loss, device=engine.device) for loss in progress.losses]
    norm = 0.0
    stopped = False

    def save() -> None:
        progress.losses = _mean(engine, losses).tolist() if losses else []
        progress.average_updates = 0 if averages is None else averages.updates

        def write() -> None:
            path = save_checkpoint(engine, out, model, averages, progress, keep=config.keep_checkpoints)
            engine.on_rank_zero(lambda: _stands(path, out))

        try:
            try:
                write()
            except OSError as error:
                # The best one and those before the last are luxury where the disk is full.
                if not (is_full_disk(error) and engine.on_rank_zero(lambda: prune(out, 1, None))):
                    raise
                write()
                record.note("there was no room: only the last checkpoint is kept")
        except OSError as error:
            why = error.strerror or error
            line = f"the checkpoint of step {progress.step} could not be written: {why}; {_last_good(out)}"
            if config.stop_on_save_error:
                raise OSError(line) from error
            record.note(line)
            done = progress.step == config.steps
            ending = done or stopped
            if ending or not engine.on_rank_zero(lambda: checkpoints(out) or (out / MODEL_FILE).exists()):
                saved, said = save_weights(engine, out, model, averages, step=progress.step, ending=ending, done=done)
                record.note(said)
                if saved and engine.on_rank_zero(lambda: settle(out)):
                    record.note("The run that was here before is removed; now a checkpoint may fit")
                    with suppress(OSError):
                        write()

    peak = engine.peak_flops(config.precision) if engine.rank == 0 else 0.0
    with (
        Recorder(
            engine, model.config, config, out, progress.step, title=title, shown=progress_bar, peak_flops=peak
        ) as record,
        noting_signals() as stop,
    ):
        if config.compile and progress.step < config.steps:
            record.note("Compiling the model: the first step takes longer")
        engine.module.train()
        while progress.step < config.steps:
            step = progress.step + 1
            if on_step is not None:
                on_step(step)
            seed_step(config.seed, step, engine.rank, engine.device)
            lr = learning_rate(step, config)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            parts = []
            for part in range(config.micro_batches):
                inputs, targets = record.waiting(batches)
                parts.append(engine.accumulate(inputs, targets, part=part, parts=config.micro_batches))
            norm = engine.clip_and_step(config.grad_clip)
            if math.isfinite(norm):
                losses.append(sum(parts[1:], parts[0]))
                progress.skipped_in_a_row = 0
                if averages is not None:
                    averages.update()
            else:
                progress.skipped += 1
                progress.skipped_in_a_row += 1
                record.note(f"step {step}: the loss or the gradient is not finite; the step is skipped")
            progress.step = step
            if progress.skipped_in_a_row > config.max_skipped_steps:
                raise FloatingPointError(
                    f"the loss or the gradient was not finite for {progress.skipped_in_a_row} steps in a row, up to "
                    f"step {step}: the training diverged; lr was {config.lr}, try a smaller one; {_last_good(out)}"
                )
            record.advance()

            stopped = engine.any(stop.number is not None)  # a signal may reach one process first
            evaluating = step % eval_interval == 0 or step == config.steps
            if step == 1 or step % config.log_interval == 0 or evaluating or stopped:
                mean = float(_mean(engine, losses).double().mean()) if losses else math.nan
                record.train(step, mean, lr, norm, steps=len(losses), skipped=progress.skipped)
                losses.clear()
                progress.skipped = 0
            if evaluating and not stopped:
                with averages.in_place() if averages is not None else nullcontext():
                    loss_now, tokens = evaluate(engine, val_batches)
                    record.validation(step, loss_now, lr, tokens=tokens, last=step == config.steps)
                    record.sample(step, module, tokenizer, val_set)
                progress.val_loss = loss_now
                if math.isfinite(loss_now) and (progress.best_loss is None or loss_now < progress.best_loss):
                    progress.best_loss, progress.best_step = loss_now, step
            if evaluating or step % save_interval == 0 or stopped:
                save()
                record.restart()
            if stopped:
                break
        return Fitted(progress.step, progress.val_loss, stop.number)


def _stands(path: Path, out: Path) -> None:
    """Make a checkpoint's weights the run's, and let an earlier run go."""
    settle(out)
    try:
        publish(path, out)
    except OSError:
        # Where it takes a second copy and there is no room: those of the last checkpoint count where there is none.
        (out / MODEL_FILE).unlink(missing_ok=True)


@torch.no_grad()
def evaluate(engine: Engine, batches: Batches) -> tuple[float, int]:
    """Return the mean loss per token over all batches of all processes, without dropout, and the number of tokens."""
    was_training = engine.module.training
    engine.module.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs, targets in batches:
        empty = inputs.size(0) == 0  # this process has no part in it, but a sharded model needs it
        if empty:
            inputs = targets = inputs.new_zeros(1, inputs.size(1))
        loss = engine.loss(inputs, targets)
        if not empty:  # weighted: the last batch may be smaller
            sums += torch.tensor([loss.item() * targets.numel(), targets.numel()], dtype=torch.float64)
    engine.module.train(was_training)
    total, tokens = engine.sum(sums).tolist()
    return total / tokens, int(tokens)


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make the random numbers of a step (of dropout) its own: whoever computes it later draws the same."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # Not torch.manual_seed: it would ask for a stack trace for each device that is not there.
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(state)


def _train_batches(engine: Engine, dataset: TokenDataset, config: TrainConfig, first_step: int) -> Batches:
    windows = ShuffledWindows(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=first_step,
        micro_batches=config.micro_batches,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    return train_loader(dataset, windows, workers=config.workers, pin_memory=engine.device.type == "cuda")


def _val_batches(engine: Engine, dataset: TokenDataset, config: TrainConfig) -> Batches:
    return val_loader(
        dataset,
        batch_size=max(config.batch_size // config.micro_batches, engine.world_size),
        max_batches=config.eval_batches * config.micro_batches,
        rank=engine.rank,
        world_size=engine.world_size,
        pin_memory=engine.device.type == "cuda",
    )


def _last_good(out: Path) -> str:
    there = checkpoints(out)
    return f"the last checkpoint is of step {max(there)}" if there else "there is no checkpoint yet"


def _mean(engine: Engine, losses: list[Tensor]) -> Tensor:
    """Return the mean of each step's loss over the processes."""
    return engine.sum(torch.stack(losses)) / engine.world_size
