"""The pictures of the results: the speed-up in every row, attention over the length of the sequence, and writing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllm._internal.files import replacing

from .generation_tables import WRITING
from .report import SECTIONS, Results, factor, machine_line, ours_by_benchmark
from .row import OURS_ALL
from .written_models import BITS


def draw(kind: str, found: Mapping[str, Results], folder: Path) -> list[Path]:
    """Draw KIND-speedups.png, of generation KIND-writing.png, and for each family whose results have lengths
    KIND-FAMILY-attention.png.

    Args:
        kind: a key of `report.KINDS`; trainings have no pictures.
        found: family -> results.
        folder: where the pictures go.

    Returns:
        Where they are; none without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No pictures: matplotlib is not installed")
        return []
    paths = []
    if kind != "training" and any(map(ours_by_benchmark, found.values())):
        paths.append(folder / f"{kind}-speedups.png")
        draw_speedups(found, paths[-1])
    if kind == "generation" and any(map(_written, found.values())):
        paths.append(folder / f"{kind}-writing.png")
        draw_writing(found, paths[-1])
    for family, results in found.items():
        if _over_length(results):
            paths.append(folder / f"{kind}-{family}-attention.png")
            draw_lengths(results, paths[-1])
    return paths


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def digest(shown: Mapping[str, Any]) -> str:
    """Return what a picture says of the results that it shows, so that a test can tell whether it is theirs."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def save_figure(figure: Any, path: Path, shown: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None, "Source": digest(shown)})


def draw_speedups(found: Mapping[str, Results], path: Path) -> None:
    """Draw the speed-up over the fastest peer: a line for each row, a dot for each family."""
    by_family = {family: ours_by_benchmark(results) for family, results in found.items()}
    sections = list(SECTIONS)
    rows = {name: row["section"] for each in by_family.values() for name, row in each.items()}
    names = sorted(rows, key=lambda name: sections.index(rows[name]))
    places, place = {}, 0.0
    for before, name in zip([None, *names], names, strict=False):
        place += 1.0 if before is None or rows[before] == rows[name] else 1.6
        places[name] = place
    figure = figure_of(10, 1.6 + 0.2 * place)
    axes = figure.add_subplot()
    for i, (family, each) in enumerate(by_family.items()):
        speedups = [factor(row) for row in each.values()]
        heights = [places[name] for name in each]
        axes.plot(speedups, heights, "o", color=f"C{i}", label=f"{family}: {machine_line(found[family])}")
    axes.axvline(1.0, color="#333333", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    axes.set_ylim(place + 0.8, 0.2)
    axes.set_xlabel("speed-up over the fastest peer (right of 1x: tinyllm is faster)", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    save_figure(figure, path, found)


def _written(results: Results) -> list[Mapping[str, Any]]:
    """Return the rows of the case that the README shows, those with weights of the fewest bits last."""
    shown = next((row for row in results["rows"] if row["section"] == WRITING and row["headline"]), None)
    if shown is None:
        return []
    case = ("section", "model", "batch", "prompt")
    rows = [row for row in results["rows"] if "median_s" in row and all(row[key] == shown[key] for key in case)]
    return sorted(rows, key=lambda row: -BITS[row["weights"]])


def draw_writing(found: Mapping[str, Results], path: Path) -> None:
    """Draw how many tokens a second each engine writes, a panel for each family and a bar for each kind of weights."""
    panels = {family: rows for family, results in found.items() if (rows := _written(results))}
    figure = figure_of(10, 1.2 + 0.28 * sum(1.5 + len(rows) for rows in panels.values()))
    heights = [1.5 + len(rows) for rows in panels.values()]
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (family, rows) in zip(grid, panels.items(), strict=True):
        names = [f"{row['provider']}, {row['weights']}" for row in rows]
        rates = [row["tokens"] / row["median_s"] for row in rows]
        bars = axes.barh(names, rates, color=["C0" if row["provider"] in OURS_ALL else "#bbbbbb" for row in rows])
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title(f"{machine_line(found[family])}; {found[family]['date'][:10]}", fontsize=8, color="#555555")
        model, prompt, new = rows[0]["model"], rows[0]["prompt"], rows[0]["new_tokens"]
    grid[-1].set_xlabel(f"tokens a second that {model} writes, {new} after a prompt of {prompt}", fontsize=9)
    save_figure(figure, path, found)


def _over_length(results: Results) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """Return the rows of causal attention at three lengths or more: (direction, head_dim) -> rows."""
    sections = {row["section"] for row in results["rows"]}
    wanted = "length" if "length" in sections else "attention"
    panels: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if row["section"] == wanted and "seq_len" in row and row.get("causal", True) and "median_s" in row:
            panels.setdefault((row["direction"], row.get("head_dim", 64)), []).append(row)
    return {key: rows for key, rows in panels.items() if len({row["seq_len"] for row in rows}) >= 3}


def draw_lengths(results: Results, path: Path) -> None:
    """Draw the rate of causal attention over T, a panel for each direction and head_dim."""
    panels = _over_length(results)
    figure = figure_of(4.5 * len(panels) + 1, 4.2)
    for axes, ((direction, size), rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        lengths = sorted({row["seq_len"] for row in rows})
        for provider in dict.fromkeys(row["provider"] for row in rows):
            line = sorted((row["seq_len"], row["rate"]) for row in rows if row["provider"] == provider)
            style = {"linewidth": 2.5} if provider in OURS_ALL else {}
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=provider, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in lengths], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(f"causal attention {direction}, head_dim {size}", fontsize=10)
        axes.set_xlabel("T, queries and keys of a sequence", fontsize=9)
        axes.set_ylabel("GFLOP/s over visible pairs", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{machine_line(results)}; {results['date'][:10]}", fontsize=8, color="#555555")
    save_figure(figure, path, results)
