"""Show and write the course of a training: the progress bar, metrics, a picture, samples."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from tqdm import tqdm

from tinyllm._internal.files import write_text
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.training import TrainConfig
from tinyllm.data.batches import TokenDataset
from tinyllm.generation import iter_tokens
from tinyllm.runs.folder import CURVE_FILE, METRICS_FILE, SAMPLES_FILE, TABLE_FILE, TENSORBOARD
from tinyllm.runs.metrics import keep_metrics, read_metrics
from tinyllm.runs.plot import plot_run
from tinyllm.tokenizer import Tokenizer
from tinyllm.training.engine import Engine, TrainingModule
from tinyllm.training.estimate import estimate

_PROMPT_TOKENS = 8
_PICTURE_SHARE = 0.01  # of the time, that drawing may take
_SAMPLE_TEMPERATURE = 0.7


class MetricsLogger(Logger):
    """metrics.jsonl, which `tinyllm.runs.metrics` describes: each line is on the disk when it is known.

    Args:
        path: the file. Its folder must exist.
        resume_step: None starts a new file. A number goes on with a run that stopped, see `keep_metrics`; `elapsed_s`
            counts on from the last line kept.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the file to go on with is not a metrics.jsonl. It is left as it was.
    """

    name = METRICS_FILE
    version = None

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        before = 0.0 if resume_step is None else keep_metrics(path, resume_step)
        self._file = path.open("w" if resume_step is None else "a", encoding="utf-8", newline="\n")
        self._start = time.perf_counter() - before

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a line; the names of the metrics begin with their split, as in "train/loss"."""
        (split,) = {name.partition("/")[0] for name in metrics}
        values = {name.partition("/")[2]: value for name, value in metrics.items()}
        first = {name: values.pop(name) for name in ("loss", "lr", "tokens_per_s")}
        elapsed = round(time.perf_counter() - self._start, 3)
        line = {"step": step, "split": split, **first, "elapsed_s": elapsed, **values}
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no word for it
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        """Do nothing: config.json has them."""

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._file.close()


class Recorder:
    """Write on rank 0 what a training logs; other ranks take part in what all must do together.

    What cannot be written, on a full disk, is said once, and does not end the training.

    Args:
        engine: see `launch`.
        model: what trains.
        config: how.
        out: the run folder.
        first_step: the steps done before; lines of later ones, which will come again, are removed.
        title: of the picture.
        shown: whether there is a progress bar.
        peak_flops: floating-point operations a second that all devices together can do; rank 0 needs it.
    """

    def __init__(
        self,
        engine: Engine,
        model: SimpleLLMConfig,
        config: TrainConfig,
        out: Path,
        first_step: int,
        *,
        title: str,
        shown: bool,
        peak_flops: float,
    ) -> None:
        self._engine, self._config, self._out, self._title = engine, config, out, title
        self._step_tokens = config.batch_size * config.seq_len
        self._writes = engine.rank == 0
        self._shown = shown and self._writes
        self._waited = self._drawn = 0.0
        self._start = self._mark = time.perf_counter()
        self._failed = False
        if not self._writes:
            return
        self._loggers = _loggers(out, first_step, config.tensorboard)
        _keep_samples(out / SAMPLES_FILE, first_step)
        self._peak = peak_flops
        self._token_flops = estimate(model, seq_len=config.seq_len).flops_per_token
        self._bar = tqdm(
            total=config.steps,
            initial=first_step,
            desc="Training",
            disable=not self._shown,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every state of the bar
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix} [{remaining} left]",
        )
        self.restart()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._bar.close()
            for logger in self._loggers:
                self._try(partial(logger.finalize, "success" if exception[0] is None else "failed"))

    def restart(self) -> None:
        """Count the time for the next line's speed from now on."""
        self._mark = time.perf_counter()

    def waiting(self, batches: Iterator[Any]) -> Any:
        """Return the next batch; the time that it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def advance(self) -> None:
        """Count a step."""
        if self._writes:
            self._bar.update()

    def note(self, line: str) -> None:
        """Say a line without disturbing the bar."""
        if self._shown:
            self._bar.write(line, file=sys.stderr)

    def train(self, step: int, loss: float, lr: float, norm: float, *, steps: int, skipped: int) -> None:
        """Log a line about the steps since the last one: `steps` of them counted, `skipped` did not."""
        if not self._writes:
            return
        tokens = (steps + skipped) * self._step_tokens
        waited, self._waited = round(self._waited, 6), 0.0
        speed = self._write(step, "train", loss, lr, tokens, grad_norm=norm, wait_s=waited, skipped=skipped)
        peak = f"{self._peak_fraction(speed):.0%} of peak"
        self._bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, {peak}", refresh=False)

    def validation(self, step: int, loss: float, lr: float, *, tokens: int, last: bool) -> None:
        """Log a line about a validation, and draw the picture anew, unless drawing has taken too much of the time."""
        if not self._writes:
            return
        self._write(step, "val", loss, lr, tokens)
        self.note(f"step {step}: validation loss {loss:.3f}")
        begun = time.perf_counter()
        if last or self._drawn <= _PICTURE_SHARE * (begun - self._start):
            self.draw()
            self._drawn += time.perf_counter() - begun

    def draw(self) -> None:
        """Draw what is known so far."""
        self._try(lambda: plot_run(self._out / METRICS_FILE, self._out / CURVE_FILE, title=self._title))

    def sample(self, step: int, module: TrainingModule, tokenizer: Tokenizer, text: TokenDataset) -> None:
        """Let the model go on from the beginning of `text`; all processes of a sharded model take part."""
        if self._config.sample_tokens == 0 or not (self._writes or self._config.strategy == "fsdp"):
            return
        prompt = text[0][0][:_PROMPT_TOKENS]
        tokens = iter_tokens(  # which an interruption ends as it ends a step
            module,  # type: ignore[arg-type]
            prompt.to(self._engine.device),
            self._config.sample_tokens,
            _SAMPLE_TEMPERATURE,
            seed=self._config.seed,
            suppress_id=tokenizer.unknown_id,
        )
        new = [int(token) for token in tokens]
        line = {"step": step, "prompt": tokenizer.decode(prompt.tolist()), "text": tokenizer.decode(new)}
        if self._writes:
            self._try(lambda: _append(self._out / SAMPLES_FILE, json.dumps(line, ensure_ascii=False)))

    def _write(self, step: int, split: str, loss: float, lr: float, tokens: int, **extra: float) -> float:
        """Log a line about the `tokens` tokens since the last one, and return how many there were a second."""
        now = time.perf_counter()
        speed = tokens / max(now - self._mark, 1e-9)
        self._mark = now
        values = {"loss": loss, "lr": lr, "tokens_per_s": round(speed, 1), **extra}
        if split == "train":
            values["peak_fraction"] = round(self._peak_fraction(speed), 4)
        for logger in self._loggers:
            self._try(partial(logger.log_metrics, {f"{split}/{name}": value for name, value in values.items()}, step))
            self._try(logger.save)
        return speed

    def _peak_fraction(self, tokens_per_s: float) -> float:
        """Return the fraction of what all devices can do, which is at least what they have done: another program may
        have had a part of them when the peak was measured."""
        flops = tokens_per_s * self._token_flops
        self._peak = max(self._peak, flops)
        return flops / self._peak

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._failed:
                self._failed = True
                self.note(f"not everything about this training can be written: {error}")


def _loggers(out: Path, first_step: int, tensorboard: bool) -> list[Logger]:
    """Return those of metrics.jsonl, of the same as a table, and TensorBoard's. A table begins with what is known."""
    metrics = MetricsLogger(out / METRICS_FILE, first_step or None)
    (out / TABLE_FILE).unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder is not empty
        table = CSVLogger(out, name="", version="")
        for line in read_metrics(out / METRICS_FILE):
            step, split = line.pop("step"), line.pop("split")
            line.pop("elapsed_s", None)
            table.log_metrics({f"{split}/{name}": value for name, value in line.items()}, step)
        table.save()
    if not tensorboard:
        return [metrics, table]
    return [metrics, table, TensorBoardLogger(out, name=TENSORBOARD, version="")]


def _keep_samples(path: Path, last_step: int) -> None:
    """Remove the samples of later steps, which will come again, and what a kill left of a line."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if last_step else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not the samples of a training") from error
    write_text(path, "".join(kept))


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
