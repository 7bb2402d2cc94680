"""The charts of `benchmarks.html_report`: from rows of results to figures of Plotly, as dictionaries.

A color in a figure is the name of a property in CSS, such as "--series-1": the page's script puts in the value that it
has in the color scheme in use.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tinyllm._internal.words import size

from .report import RowFacts, fastest
from .row import COMPILED, CUDA, EAGER, OURS, OURS_ALL, TRITON
from .tables import format_digits

Figure = dict[str, Any]

PITCH = 40  # pixels from one line of a chart to the next: its label, and the marks below it
MORE, AFTER = 15, 14  # for a second line of a label, and after the last marks
HEAD, FOOT = 4, 52  # pixels above the marks, and for the axis below them
LABEL = 52  # characters of a label in one line, for which a phone has room
SWEEP_HEIGHT = 480
MOST_TICKS = 6  # which a phone has room for
SYMBOLS = {  # in Plotly's name, and as corners between -1 and 1 for the legend; a circle has none
    "circle": (),
    "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle-up": ((0, -0.9), (1, 0.8), (-1, 0.8)),
    "triangle-down": ((0, 0.9), (1, -0.8), (-1, -0.8)),
    "hourglass": ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9)),
    "bowtie": ((-0.9, -0.9), (0.9, 0.9), (0.9, -0.9), (-0.9, 0.9)),
    "pentagon": ((0, -1), (0.95, -0.31), (0.59, 0.81), (-0.59, 0.81), (-0.95, -0.31)),
}
# Providers that do the same thing look the same. Another one has the hue of the first name here that begins its own.
LOOKS = {
    OURS: (1, "circle"),
    CUDA: (1, "square"),
    TRITON: (1, "triangle-up"),
    "torch.compile of it": (3, "square"),
    COMPILED: (3, "square"),
    "transformers, compiled": (3, "pentagon"),
    EAGER: (2, "diamond"),
    "plain PyTorch": (2, "diamond"),
    "bare loop": (2, "triangle-down"),
    "transformers": (4, "triangle-up"),
    "Hugging Face": (4, "triangle-up"),
    "CTranslate2": (5, "triangle-down"),
    "llama.cpp": (6, "hourglass"),
    "SDPA": (7, "bowtie"),
}
OTHER_HUE = 8
# Where the sizes stand in a row's shape, by its section: T tokens of a sequence, C columns, V tokens known.
SIZES = {
    "embedding": r"\d+x(?P<T>\d+) V(?P<V>\d+) D(?P<C>\d+)",
    "layer_norm": r"\d+x(?P<C>\d+)$",
    "launch": r"\d+x(?P<C>\d+)$",
    "linear": r"\d+x(?P<C>\d+)->",
    "losses": r"\d+x(?:(?P<C>\d+)x)?(?P<V>\d+)$",
    **dict.fromkeys(("model", "char", "goal", "gpt2", "engine"), r"(?P<C>\d+)/\S+ .*?T(?P<T>\d+) V(?P<V>\d+)"),
    **dict.fromkeys(("attention", "decode", "length"), r".*\bT(?P<T>\d+)"),
}
WORDS_OF_SIZES = {"T": "sequence length T", "C": "width C", "V": "vocabulary V"}


@dataclass(frozen=True)
class Look:
    """How a provider is drawn, everywhere on the page."""

    color: str
    symbol: str


@dataclass(frozen=True)
class Axis:
    """The quantity that the marks of a chart stand for.

    Attributes:
        title: with the unit.
        suffix: of the numbers at its ticks.
        ratio: whether 1 is a border, at which ours and a peer take the same time.
    """

    title: str
    suffix: str = ""
    ratio: bool = False


RATIO = Axis("a peer's time as a multiple of tinyllm's", "×", ratio=True)
TOKENS = Axis("tokens a second (more is faster)")
MEMORY = Axis("memory in MB (less is better)")


@dataclass(frozen=True)
class Point:
    """A mark in a chart.

    Attributes:
        line: the label of the line that it is on.
        series: its name in the legend.
        value: its place along the axis.
        look: its color and symbol.
        text: what is shown when a pointer is over it.
        one_thread: whether it was measured on one thread, and is drawn hollow.
    """

    line: str
    series: str
    value: float
    look: Look
    text: str
    one_thread: bool = False


def looks_of(providers: Iterable[str]) -> dict[str, Look]:
    """Return the look of each provider. Those of one hue differ in their symbols, as far as there are enough."""
    looks: dict[str, Look] = {}
    for provider in dict.fromkeys([OURS, *sorted(providers, key=lambda name: name not in LOOKS)]):
        if provider in LOOKS:
            hue, symbol = LOOKS[provider]
        else:
            hue = next((LOOKS[name][0] for name in LOOKS if provider.startswith(name)), OTHER_HUE)
            used = [look.symbol for look in looks.values() if look.color == f"--series-{hue}"]
            symbol = min(SYMBOLS, key=used.count)
        looks[provider] = Look(f"--series-{hue}", symbol)
    return looks


def machine_looks(families: Iterable[str]) -> dict[str, Look]:
    """Return the look of each machine: a symbol without a hue, since hues are providers'."""
    return {family: Look("--text", symbol) for family, symbol in zip(families, itertools.cycle(SYMBOLS))}


# ---- Rows


def best_of_ours(rows: Iterable[RowFacts]) -> list[RowFacts]:
    """Return for each benchmark, on all threads and on one, the fastest row of ours that was compared with a peer."""
    ours: dict[tuple[str, bool], list[RowFacts]] = {}
    for row in rows:
        if row["provider"] in OURS_ALL and row.get("ratios") and "median_s" in row:
            ours.setdefault((row["benchmark"], row["one_thread"]), []).append(row)
    return [fastest(found) for found in ours.values()]


def sizes_of(row: RowFacts) -> dict[str, int]:
    """Return a row's T, C and V, as far as its shape has them."""
    return {letter: int(row["shape"][slice(*span)]) for letter, span in _spans(row).items()}


def _spans(row: RowFacts) -> dict[str, tuple[int, int]]:
    match = re.match(SIZES.get(row["section"], ""), row.get("shape", ""))
    found = match.groupdict() if match else {}
    return {letter: match.span(letter) for letter in WORDS_OF_SIZES if match and found.get(letter)}


def sweeps_of(rows: Iterable[RowFacts]) -> dict[tuple[str, str], list[RowFacts]]:
    """Return rows that differ in one of T, C and V only, and have three of its values or more.

    Returns:
        (what is the same, the letter) -> the rows on all threads, by increasing size.
    """
    found: dict[tuple[str, str], list[RowFacts]] = {}
    for row in rows:
        if row["one_thread"] or not row.get("rate"):
            continue
        for letter, (start, end) in _spans(row).items():
            same = row["shape"][:start] + "…" + row["shape"][end:]
            name = f"{row['operation']} {row['direction']} {same} {row['dtype']}"
            found.setdefault((name, letter), []).append(row)
    return {
        (name, letter): sorted(each, key=lambda row: sizes_of(row)[letter])
        for (name, letter), each in found.items()
        if len({sizes_of(row)[letter] for row in each}) >= 3
    }


def exact(row: RowFacts) -> str:
    """Return the numbers of a row as they are stored, for its mark."""
    parts = [f"{row['median_s']} s ± {row['iqr_s'] / 2 / row['median_s']:.1%}"] if row.get("median_s") else []
    parts += [f"{row['rate']} {row['unit']}"] if row.get("rate") else []
    parts += [f"{row['tokens_per_s']} tokens/s"] if row.get("tokens_per_s") else []
    return "<br>".join(parts)


def ratio_points(rows: Sequence[RowFacts], looks: Mapping[str, Look]) -> list[Point]:
    """Return a point for each peer of each benchmark, at the ratio of its time to ours."""
    peers = {(row["benchmark"], row["one_thread"], row["provider"]): row for row in rows}
    points = []
    for ours in best_of_ours(rows):
        for peer, ratio in ours["ratios"].items():
            theirs = peers.get((ours["benchmark"], ours["one_thread"], peer), {})
            text = f"<b>{escape(peer)}: {ratio}×</b><br>{exact(theirs)}<br>{escape(ours['provider'])}: {exact(ours)}"
            look = looks.get(peer) or looks_of([peer])[peer]
            points.append(Point(ours["benchmark"], peer, ratio, look, text, ours["one_thread"]))
    return points


def token_points(rows: Iterable[RowFacts], looks: Mapping[str, Look]) -> list[Point]:
    """Return a point for each engine and case, at the tokens that it reads or writes in a second."""
    return [
        Point(
            row["benchmark"], row["provider"], row["tokens_per_s"], looks[row["provider"]],
            f"<b>{escape(row['provider'])}</b><br>{exact(row)}", row["one_thread"],
        )
        for row in rows
        if row.get("tokens_per_s")
    ]  # fmt: skip


def memory_points(rows: Iterable[RowFacts], looks: Mapping[str, Look]) -> list[Point]:
    """Return a point for each row whose memory is stored."""
    return [
        Point(
            row["benchmark"], row["provider"], row["peak_bytes"] / 1e6, looks[row["provider"]],
            f"<b>{escape(row['provider'])}</b><br>{row['peak_bytes']} bytes, {size(row['peak_bytes'])}",
            row["one_thread"],
        )
        for row in rows
        if row.get("peak_bytes")
    ]  # fmt: skip


# ---- Figures


def dots(points: Sequence[Point], axis: Axis) -> Figure:
    """Return a chart with a line for each label, and on it the points of all series."""
    labels = {line: textwrap.wrap(line, LABEL) for line in dict.fromkeys(point.line for point in points)}
    heights = [PITCH + MORE * (len(label) - 1) for label in labels.values()]
    lines = dict(zip(labels, itertools.accumulate(heights), strict=True))  # in pixels from the top
    traces: dict[str, Figure] = {}
    for point in points:
        name = f"{point.series}, 1 thread" if point.one_thread else point.series
        trace = traces.setdefault(name, _trace(name, point.look, hollow=point.one_thread, mode="markers"))
        trace["x"].append(point.value)
        trace["y"].append(lines[point.line])
        trace["hovertext"].append(f"{escape(point.line)}<br>{point.text}")
    layout = _layout(HEAD + sum(heights) + AFTER + FOOT)
    layout["xaxis"] = {
        **_log_axis([point.value for point in points], axis),
        "title": {"text": axis.title, "standoff": 8},
    }
    layout["yaxis"] = {
        "range": [sum(heights) + AFTER, 0],
        "tickvals": list(lines.values()),
        "showticklabels": False,
        "gridcolor": "--rule",
        "zeroline": False,
        "fixedrange": True,
    }
    layout["annotations"] = [
        {
            "xref": "paper", "x": 0, "xanchor": "left", "y": place, "yanchor": "bottom", "yshift": 7, "align": "left",
            "text": "<br>".join(escape(part, quote=False) for part in labels[line]),
            "showarrow": False, "borderpad": 0, "bgcolor": "--page", "font": {"size": 12, "color": "--text"},
        }
        for line, place in lines.items()
    ]  # fmt: skip
    layout["shapes"] = [_border("x")] if axis.ratio else []
    return {"data": sorted(traces.values(), key=lambda trace: trace["name"] not in OURS_ALL), "layout": layout}


def sweep(rows: Sequence[RowFacts], letter: str, looks: Mapping[str, Look]) -> Figure:
    """Return a chart of rates, and below them of the ratios of peers' times to ours, over a size.

    Args:
        rows: as `sweeps_of` gives them.
        letter: of the size.
        looks: provider -> look.
    """
    traces: dict[tuple[str, str], Figure] = {}
    for row in rows:
        trace = traces.setdefault(("", row["provider"]), _trace(row["provider"], looks[row["provider"]]))
        _add(trace, sizes_of(row)[letter], row["rate"], f"<b>{escape(row['provider'])}</b><br>{exact(row)}")
    places = {row["benchmark"]: sizes_of(row)[letter] for row in rows}
    for point in ratio_points(rows, looks):
        trace = traces.setdefault(("2", point.series), _trace(point.series, point.look) | {"yaxis": "y2"})
        _add(trace, places[point.line], point.value, point.text)
    values = sorted(set(places.values()))
    layout = _layout(SWEEP_HEIGHT)
    layout["xaxis"] = {
        "type": "log",
        "tickvals": values,
        "ticktext": [str(n) if n < 1024 or n % 1024 else f"{n // 1024}k" for n in values],
        "title": {"text": WORDS_OF_SIZES[letter], "standoff": 8},
        "anchor": "y2",
        "gridcolor": "--rule",
        "fixedrange": True,
    }
    rates = {"rangemode": "tozero", "gridcolor": "--rule", "zerolinecolor": "--rule", "fixedrange": True}
    layout["yaxis"] = {**rates, "domain": [0.5, 1.0], "title": {"text": rows[0]["unit"]}}
    ratios = [value for (panel, _), trace in traces.items() if panel for value in trace["y"]]
    layout["yaxis2"] = {**_log_axis(ratios or [1.0], RATIO), "domain": [0.0, 0.42], "title": {"text": "peer / tinyllm"}}
    layout["shapes"] = [_border("y")]
    layout["margin"]["l"] = 62
    return {"data": sorted(traces.values(), key=lambda trace: trace["name"] not in OURS_ALL), "layout": layout}


def legend(figure: Figure) -> list[tuple[str, str]]:
    """Return each series of a figure: its symbol as SVG, and its name."""
    shown = {trace["name"]: trace["marker"] for trace in figure["data"]}
    return [(_svg(marker), name) for name, marker in shown.items()]


def _svg(marker: Figure) -> str:
    corners = SYMBOLS[marker["symbol"].removesuffix("-open")]
    points = " ".join(f"{x},{y}" for x, y in corners)
    shape = f'<polygon points="{points}"/>' if corners else '<circle r="0.9"/>'
    fill = "none" if marker["symbol"].endswith("-open") else "currentColor"
    return (
        f'<svg viewBox="-1.2 -1.2 2.4 2.4" aria-hidden="true" style="color: var({marker["color"]})" '
        f'fill="{fill}" stroke="currentColor" stroke-width="0.3">{shape}</svg>'
    )


def _trace(name: str, look: Look, hollow: bool = False, mode: str = "lines+markers") -> Figure:
    symbol = f"{look.symbol}-open" if hollow else look.symbol
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [],
        "y": [],
        "hovertext": [],
        "hoverinfo": "text",
        "marker": {"symbol": symbol, "color": look.color, "size": 11, "line": {"width": 2 if hollow else 0}},
        "line": {"color": look.color, "width": 2},
    }


def _add(trace: Figure, x: float, y: float, text: str) -> None:
    trace["x"].append(x)
    trace["y"].append(y)
    trace["hovertext"].append(text)


def _layout(height: int) -> Figure:
    return {
        "height": height,
        "margin": {"l": 8, "r": 14, "t": HEAD, "b": FOOT},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--text", "size": 12},
        "showlegend": False,  # the page has one, which takes its own room
        "hoverlabel": {"bgcolor": "--panel", "bordercolor": "--text", "font": {"color": "--text"}, "align": "left"},
        "hovermode": "closest",
        "dragmode": False,
    }


def _border(axis: str) -> Figure:
    """Return the line at 1, at which ours and a peer take the same time."""
    across, along = ("x", "y") if axis == "x" else ("y", "x")
    return {
        "type": "line", f"{across}0": 1, f"{across}1": 1, f"{along}0": 0, f"{along}1": 1, f"{along}ref": "paper",
        f"{across}ref": "x" if axis == "x" else "y2", "layer": "below", "line": {"color": "--text", "width": 2},
    }  # fmt: skip


def _log_axis(values: Sequence[float], axis: Axis) -> Figure:
    low, high = min(values), max(values)
    if axis.ratio:  # both sides of 1 can be seen
        low, high = min(low, 0.8), max(high, 1.25)
    margin = max(0.05 * math.log10(high / low), 0.02)
    ends = [math.log10(low) - margin, math.log10(high) + margin]
    ticks = _ticks(10 ** ends[0], 10 ** ends[1], axis.ratio)
    return {
        "type": "log",
        "range": ends,
        "tickvals": ticks,
        "ticktext": [f"{format_digits(tick) if tick >= 1e6 else f'{tick:g}'}{axis.suffix}" for tick in ticks],
        "gridcolor": "--rule",
        "zeroline": False,
        "fixedrange": True,
    }


def _ticks(low: float, high: float, ratio: bool) -> list[float]:
    """Return the finest round numbers between two that are few enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    octaves = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    fine = [[n / step for n in range(1, 50)] for step in ((10, 5, 2) if ratio else ())]
    powers = [[2.0**n for n in octaves if n % step == 0] for step in ((1, 2, 3) if ratio else ())]
    rounded = [[m * 10.0**n for n in decades for m in some] for some in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))]
    sparse = [[10.0**n for n in decades if n % step == 0] for step in (2, 3, 4)]
    chosen: list[float] = []
    for candidates in [*fine, *powers, *rounded, *sparse]:
        chosen = [tick for tick in candidates if low <= tick <= high]
        if len(chosen) <= MOST_TICKS:
            break
    return chosen
