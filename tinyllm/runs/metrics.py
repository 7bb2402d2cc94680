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
import os
from pathlib import Path
from typing import Any

from tinyllm._internal.files import write_text


def keep_metrics(path: str | os.PathLike[str], last_step: int) -> float:
    """Drop the lines of later steps, which will come again, and half a line that a kill may have left at the end.

    Returns:
        `elapsed_s` of the last line kept, or 0.

    Raises:
        ValueError: the file is not a metrics.jsonl. It is left as it was.
    """
    if not Path(path).exists():
        return 0.0
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return max((line.get("elapsed_s") or 0.0 for line in kept), default=0.0)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, also of one that is being written.

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
    """Return what keeps `line` from being a line of metrics, or None."""
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
