"""metrics.jsonl: writing it, reading it, and drawing it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from tinyllm._files import replacing


class MetricsWriter:
    """metrics.jsonl, each line on the disk when it is known, and the clock for its speeds."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8", newline="\n")
        self._start = self._mark = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def restart(self) -> None:
        """Count the time for the next line's speed from now on."""
        self._mark = time.perf_counter()

    def write(self, step: int, split: str, loss: float, lr: float, *, tokens: int) -> float:
        """Write a line about the `tokens` tokens since the last one; returns tokens per second."""
        now = time.perf_counter()
        speed = tokens / max(now - self._mark, 1e-9)
        line = {
            "step": step,
            "split": split,
            "loss": loss,
            "lr": lr,
            "tokens_per_s": round(speed, 1),
            "elapsed_s": round(now - self._start, 3),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._mark = now
        return speed


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. Raises ValueError, naming the line, if one is not JSON."""
    lines = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return lines


def plot_loss(metrics: str | os.PathLike[str], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw the training and validation loss of a metrics.jsonl over the steps, as a PNG.

    Does not touch pyplot, so neither a display nor the caller's figures are involved.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    lines = read_metrics(metrics)
    train = [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]
    val = [(line["step"], line["loss"]) for line in lines if line["split"] == "val"]

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    blue, orange = "#2f6fb0", "#d9601a"
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=blue, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=blue, linewidth=1.8, label="training (smoothed)")
    if val:
        steps, losses = zip(*val, strict=True)
        axes.plot(steps, losses, color=orange, linewidth=1.8, marker="o", markersize=5, label="validation")
        axes.annotate(
            f"{losses[-1]:.2f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            color=orange,
            fontweight="bold",
        )
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _smooth(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and its neighbours; narrower towards the ends, so that it never lags."""
    reach = max(1, len(values) // 40)
    smoothed = []
    for index in range(len(values)):
        width = min(index, len(values) - 1 - index, reach)
        near = values[index - width : index + width + 1]
        smoothed.append(sum(near) / len(near))
    return smoothed
