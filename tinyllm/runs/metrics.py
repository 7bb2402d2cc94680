"""metrics.jsonl: a training's numbers, a JSON object a line, as they become known.

    step           the step just done, from 1
    split          "train": the mean since the last such line; "val": a validation
    loss           nats per token; null if it was not a finite number, for which JSON has no word
    lr             the learning rate of that step
    tokens_per_s   of the tokens since the clock was last started
    elapsed_s      since the training began; a resumed run counts on from its last line

Lines of "train" may have more; runs of older versions, and lines that could not know, lack them:

    grad_norm      the gradient's norm before clipping
    wait_s         seconds spent waiting for data since the last line
    peak_fraction  floating-point operations per second, as a fraction of the machine's peak: the best product
                   measured, or what training reached, where that is more
    skipped        steps since the last line that changed nothing, as their gradient was not finite
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from tinyllm._internal.files import write_text


class MetricsWriter:
    """metrics.jsonl, each line on the disk when it is known, and the clock for its speeds.

    Args:
        path: the file. Its folder must exist.
        resume_step: None starts a new file. A number goes on with a run that stopped: lines of later steps, which
            will come again, are dropped, and so is half a line that a kill may have left at the end; `elapsed_s`
            counts on from the last line kept. If there is no file, a new one starts.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: `resume_step` is negative; or the file to go on with is not a metrics.jsonl. It is left as it was.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        path = Path(path)
        before = 0.0
        if resume_step is None:
            self._file: TextIO = path.open("w", encoding="utf-8", newline="\n")
        else:
            if resume_step < 0:
                raise ValueError(f"resume_step is {resume_step}; it must be at least 0, or None for a new file")
            if path.exists():
                kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
                before = max((line.get("elapsed_s") or 0.0 for line in kept), default=0.0)
            self._file = path.open("a", encoding="utf-8", newline="\n")
        self._mark = time.perf_counter()
        self._start = self._mark - before

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def restart(self) -> None:
        """Count the time for the next line's speed from now on."""
        self._mark = time.perf_counter()

    def speed(self, tokens: int) -> float:
        """Tokens per second, if there were so many since the last line, or since `restart`."""
        return tokens / max(time.perf_counter() - self._mark, 1e-9)

    def write(self, step: int, split: str, loss: float, lr: float, *, tokens: int, **extra: float | None) -> float:
        """Write a line about the `tokens` tokens since the last one.

        Args:
            step: the step just done, from 1.
            split: "train" or "val".
            loss: mean of those tokens, in nats; written as null if it is not finite.
            lr: the learning rate of the step.
            tokens: how many there were since the last line, or since `restart`.
            extra: more of the line's keys, such as `grad_norm`; those that are None are left out.

        Returns:
            Tokens per second.
        """
        speed = self.speed(tokens)
        now = time.perf_counter()
        line = {
            "step": step,
            "split": split,
            "loss": loss,
            "lr": lr,
            "tokens_per_s": round(speed, 1),
            "elapsed_s": round(now - self._start, 3),
            **{name: value for name, value in extra.items() if value is not None},
        }
        self._file.write(json.dumps({name: _json(value) for name, value in line.items()}, allow_nan=False) + "\n")
        self._file.flush()
        self._mark = now
        return speed


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, also of one that is being written.

    A last line without its end, which a run under way or killed may leave, is not counted.

    Returns:
        A dict for each line. "step" is an int, "split" "train" or "val", "loss" a float, or None if it was not finite;
        every other key may be missing or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not one of metrics; the message names it.
    """
    lines: list[dict[str, Any]] = []
    *whole, rest = Path(path).read_bytes().split(b"\n")
    for number, raw in enumerate([*whole, rest], start=1):
        try:  # other programs may have written NaN or Infinity
            line = json.loads(raw.decode("utf-8"), parse_constant=lambda name: None)
        except ValueError as error:
            if number > len(whole):
                break  # nothing, or half a line, after the last newline
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        wrong = _wrong(line)
        if wrong:
            raise ValueError(f"{path}, line {number}, is not a line of metrics: {wrong}")
        lines.append(line)
    return lines


def _wrong(line: Any) -> str | None:
    """What keeps `line` from being a line of metrics."""
    if not isinstance(line, dict):
        return f"it is {json.dumps(line)[:40]}, not an object"
    for name in ("step", "split", "loss"):
        if name not in line:
            return f'it has no "{name}"'
    if type(line["step"]) is not int:
        return f'"step" is {line["step"]!r}, not a whole number'
    if line["split"] not in ("train", "val"):
        return f'"split" is {line["split"]!r}; allowed are "train" and "val"'
    for name in ("loss", "lr", "tokens_per_s", "elapsed_s"):
        value = line.get(name)
        if value is not None and type(value) not in (int, float):
            return f'"{name}" is {value!r}, not a number'
    return None


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
