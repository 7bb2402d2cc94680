"""The numbers behind the pictures of `tinyllm.runs.plot`: curves from lines of metrics, smoothing, scales."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
XAxis = Literal["step", "tokens", "time"]
Split = Literal["val", "train", "both"]

_LONG = 500  # lines of a run whose beginning is too small a part of the picture to decide its scale
_STEADY = 50  # values from which on the end of a loss is taken for a straight line


@dataclass(frozen=True)
class Curve:
    """Points in the order of the file; y is nan where it is not known or was not finite."""

    x: Array = field(default_factory=lambda: np.empty(0))
    y: Array = field(default_factory=lambda: np.empty(0))

    @property
    def finite(self) -> Curve:
        known = np.isfinite(self.y)
        return Curve(self.x[known], self.y[known])


@dataclass(frozen=True)
class Series:
    """What is drawn of a run."""

    train: Curve
    val: Curve
    rate: Curve
    speed: Curve
    skipped: Array  # where steps were skipped, or the loss was not finite
    peak_fraction: float | None  # the median
    waited: float | None  # the fraction of the time spent waiting for data
    name: str = ""

    @classmethod
    def of(cls, lines: list[dict[str, Any]], axis: Callable[[dict[str, Any]], float | None], name: str = "") -> Series:
        def curve(split: str, key: str) -> Curve:
            points = [(axis(line), line.get(key)) for line in lines if line["split"] == split]
            known = [(x, math.nan if y is None else float(y)) for x, y in points if x is not None]
            return Curve(*np.array(known, dtype=np.float64).reshape(-1, 2).T)

        train = [line for line in lines if line["split"] == "train"]
        lost = [axis(line) for line in train if line.get("skipped") or line["loss"] is None]
        fractions = [line["peak_fraction"] for line in train if line.get("peak_fraction") is not None]
        waits = [line["wait_s"] for line in train if line.get("wait_s") is not None]
        elapsed = max((line.get("elapsed_s") or 0.0 for line in train), default=0.0)
        return cls(
            curve("train", "loss"),
            curve("val", "loss"),
            curve("train", "lr"),
            curve("train", "tokens_per_s"),
            np.array([x for x in lost if x is not None], dtype=np.float64),
            float(np.median(fractions)) if fractions else None,
            min(1.0, sum(waits) / elapsed) if waits and elapsed > 0 else None,
            name,
        )

    def validates(self, split: Split) -> bool:
        """Whether a comparison shows this run's validation loss."""
        return split != "train" and len(self.val.finite.x) > 0

    def compared(self, split: Split) -> Curve:
        """The line that a comparison shows of this run."""
        train = self.train.finite
        return self.val.finite if self.validates(split) else Curve(train.x, smooth(train.y))


def x_axis(x: str, per_step: int | None, run: str | os.PathLike[str]) -> Callable[[dict[str, Any]], float | None]:
    """Where on the x axis a line of metrics belongs; None if it does not say."""
    if x == "step":
        return lambda line: float(line["step"])
    if x == "time":
        return lambda line: line.get("elapsed_s")
    if x != "tokens":
        raise ValueError(f"x is {x!r}; allowed are 'step', 'tokens' and 'time'")
    if per_step is None:
        raise ValueError(f"x is 'tokens', but how many tokens a step of {os.fspath(run)} has is not known; try 'step'")
    return lambda line: float(line["step"] * per_step)


def smooth(values: Array) -> Array:
    """The mean of each finite value and its neighbours, without the spikes.

    Spikes: a median of five comes first. Towards the start, where a loss falls steeply, fewer neighbours count, so
    that the mean does not lag. At the end of a long run, where it is flat, a straight line through the neighbours on
    the left takes the place of the mean, as the last values alone would be noise; in a short one fewer of them count.
    """
    count = len(values)
    if count < 5:
        return values
    padded = np.pad(values, 2, mode="edge")
    calm = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=-1)
    reach = max(3, count // 25)
    index = np.arange(count)
    left = np.minimum(index // 3, reach)
    right = np.minimum(left, count - 1 - index)
    if count < _STEADY:
        left = right
    sums = np.concatenate([[0.0], np.cumsum(calm)])
    smooth = (sums[index + right + 1] - sums[index - left]) / (left + right + 1)
    if count < _STEADY:
        return smooth
    places = index[-3 * reach :]
    slope, start = np.polyfit(places, calm[-3 * reach :], 1)
    ending = index >= count - reach
    smooth[ending] = start + slope * index[ending]
    return smooth


def steady(values: Array) -> Array:
    """The median of each finite value and its neighbours: noise goes, and a lasting change stays as sudden."""
    reach = min(15, len(values) // 25)
    if reach < 1:
        return values
    padded = np.pad(values, reach, mode="edge")
    middle: Array = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=-1)
    return middle


def limits(train: Array, val: Array) -> tuple[float, float]:
    """A scale for finite losses without rare spikes, and without a long run's first fall.

    Those would press all that is of interest into one line.
    """
    everything = np.concatenate([train, val])
    if not len(everything):
        return 0.0, 1.0
    late = train[len(train) // 100 if len(train) >= _LONG else 0 :]
    calm = np.concatenate([smooth(late), late[:1], val])
    low = min(float(calm.min()), float(np.quantile(everything, 0.01)))
    usual = float(np.quantile(everything, 0.95))
    high = min(max(float(calm.max()), usual), low + 1.5 * (max(float(calm[0]), usual) - low))
    height = high - low
    if everything.max() < high + 0.3 * height:  # for so little nothing needs to be cut
        high = float(everything.max())
    if everything.min() > low - 0.3 * height:
        low = float(everything.min())
    return _padded(low, high)


def compared_limits(runs: list[Series], split: Split) -> tuple[float, float]:
    """A scale for what is compared: all of each run, but of one that diverged only the beginning."""
    spans, faint = [], []
    for run in runs:
        values, train = run.compared(split).y, run.compared("train").y
        if len(values):
            late = values if run.validates(split) else values[len(values) // 20 :]  # the first fall says little
            if split == "both" and len(values) == 1:  # a dot: what led to it is seen in the training
                late = np.concatenate([late, train[len(train) // 20 :]])
            spans.append((float(late.min()), float(late.max())))
        if len(train):
            faint.append(float(train.min()))
    if not spans:
        return 0.0, 1.0
    lows, highs = np.array(spans).T
    low, high = float(lows.min()), float(highs.max())
    usual = float(np.median(highs)) - low
    if high > low + 2 * usual:
        high = low + 1.3 * usual
    high = max(high, float(lows.max()) + 0.1 * (float(lows.max()) - low))  # the best of every run is seen
    if split == "both" and faint:  # far below validation, as when it learns by heart, training may leave the picture
        low = min(low, max(min(faint), low - (high - low)))
    return _padded(low, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.5
    return low - margin, high + margin
