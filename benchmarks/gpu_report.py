"""From measurements on a GPU to what people read: results/gpu.json, the README's table, the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm._internal.files import replacing, write_text

from . import report
from .gpu_row import CUDA, OF_CEILING, OF_PEER, OF_TRITON, OURS_ALL, TRITON, is_part
from .harness import BYTES, FORWARD, OURS
from .report import (
    README,
    RESULTS,
    best_peer,
    draw_chart,
    is_measured,
    machine_line,
    rate_cell,
    replace_blocks,
    set_title,
    time_cell,
)
from .timing import format_time

STORED = RESULTS / "gpu.json"
SCHEMA = 2  # of what is stored; 1 had one provider of ours, "tinyllm"
SECTIONS = {
    "attention": "Attention",
    "decode": "Attention of one query",
    "layer_norm": "Norms",
    "losses": "Losses",
    "embedding": "Embedding",
    "model": "Training steps",
    "launch": "The cost of a launch",
}


def save(results: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(results, indent=1) + "\n")


def load(path: Path = STORED) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def make_results(facts: Mapping[str, Any], ceilings: Mapping[str, Any] | None, benchmarks: Iterable[Any]) -> Any:
    """As `report.make_results`, but for several providers of ours: ratios are those of peers to each of ours, and
    `of_triton` says what part of Triton's time another one of ours takes."""
    results = report.make_results({"schema": SCHEMA, **facts}, ceilings, benchmarks)
    for row in filter(is_measured, results["rows"]):
        ratios = row.pop("ratios")
        if row["provider"] in OURS_ALL:
            if row["provider"] != TRITON and TRITON in ratios:
                row[OF_TRITON] = float(f"{1 / ratios[TRITON]:.5g}")
            row["ratios"] = {name: x for name, x in ratios.items() if name not in OURS_ALL and not is_part(name)}
    return results


def render_table(results: Mapping[str, Any], headline: bool = False) -> str:
    """Markdown, a table for each section; with `headline` only what the README shows."""
    lines = [_notes(results)]
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section and (row["headline"] or not headline)]
        if rows:
            lines += ["", f"**{title}**", "", *_section_table(rows)]
    return "\n".join(lines)


def _section_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each benchmark: ours beside each other, the first one's goals, then a column for each peer with the
    factor to the faster one of ours."""
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    ours = [name for name in OURS_ALL if name in providers]
    # Parts of ours last; without a measured row there may be none of the peers.
    peers = sorted((name for name in providers if name not in ours), key=is_part)
    has_work, has_goals = any(row["work"] for row in rows), any(row.get("goals") for row in rows)
    header = [""]
    for name in ours:
        header += [name, *(["of ceiling"] if has_work else [])]
    header += [f"{ours[0]} / {TRITON}", *(["rate"] if has_work else []), *(["goal"] if has_goals else []), *peers]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for benchmark in names:
        found = {row["provider"]: row for row in rows if row["benchmark"] == benchmark}
        best = fastest([found[name] for name in ours if name in found])
        cells = [benchmark]
        for name in ours:
            row = found.get(name, {})
            cells += [_cell(row), *([_percent(row)] if has_work else [])]
        first = found.get(ours[0], {})
        cells.append(f"{first[OF_TRITON]:.2f}x" if OF_TRITON in first else "")
        cells += [rate_cell(best)] if has_work else []
        cells += [_goal_cell(first)] if has_goals else []
        ratios = best.get("ratios", {})
        for peer in peers:
            cell = _cell(found.get(peer, {}))
            if peer in ratios:
                shown = f"{ratios[peer]:.2f}x"
                cell += ", " + (f"**{shown}**" if ratios[peer] == min(ratios.values()) else shown)
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def fastest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the shortest time; an empty one if none is measured."""
    return min((row for row in rows if is_measured(row)), key=lambda row: row["median_s"], default={})


def _cell(row: Mapping[str, Any]) -> str:
    if not row:
        return ""
    busy = f", GPU {format_time(row['gpu_s'])}" if "gpu_s" in row else ""
    return time_cell(row) + busy


def _percent(row: Mapping[str, Any]) -> str:
    fraction = row.get("fraction_of_ceiling")
    return "" if fraction is None else f"{fraction:.0%}"


def _goal_cell(row: Mapping[str, Any]) -> str:
    """What is to be reached, and whether it is."""
    cells = []
    for goal, bound in row.get("goals", {}).items():
        if goal == OF_TRITON:
            text, value = f"≤ {bound:.2f}x {TRITON}", row.get(OF_TRITON)
        elif goal == OF_CEILING:
            text, value = f"≥ {bound:.0%} of {_ceiling(row)}", row.get("fraction_of_ceiling")
        else:
            assert goal == OF_PEER
            text, value = f"≥ {bound:.2f}x best peer", best_peer(row) if row.get("ratios") else None
        if value is not None:
            text += ": met" if (value <= bound if goal == OF_TRITON else value >= bound) else ": **missed**"
        cells.append(text)
    return ", ".join(cells)


def _ceiling(row: Mapping[str, Any]) -> str:
    return "copy" if row["unit"] == BYTES else "product"


def _notes(results: Mapping[str, Any]) -> str:
    if results["gpu"] is None:
        return "Not measured yet: there was no GPU."
    commit = f"commit {results['commit'] or 'unknown'}, {results['date'][:10]}"
    ceilings = results["ceilings"]
    rates = "not known"
    if ceilings is not None:
        gemm = ceilings["gemm_gflops"]
        rates = (
            f"matrix product {gemm['bfloat16'] / 1e3:.0f} TFLOP/s in bfloat16, {gemm['float32'] / 1e3:.0f} in float32; "
            f"copy {ceilings['copy_gb_per_s']:.0f} GB/s, read and written"
        )
    return "\n".join(
        [
            f"{'A quick run: a first impression. ' if results['quick'] else ''}{machine_line(results)}; {commit}.",
            f"Ceilings measured in the same run: {rates}.",
            "",
            "- Times are medians ± half the interquartile range: of operators as the GPU runs them, of training steps",
            "  and launches on the wall's clock. CUDA C++ and Triton are ours, each forced; tinyllm is what the",
            "  package chooses by itself. The factor is how many times as long as the faster one of ours a peer takes.",
            "- Rates count useful work only, of causal attention the visible pairs; that of the faster one of ours is",
            "  shown. Each result was verified before it was timed.",
        ]
    )


def update_readme() -> None:
    """Put the table of the stored results between its markers."""
    replace_blocks(README, {"gpu": render_table(load(), headline=True)})


# ---- The pictures


def draw_pictures(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """gpu.png and gpu_attention.png, as far as the results have rows for them and matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No pictures: matplotlib is not installed")
        return []
    paths = []
    ours = _as_one(results)
    if any(row.get("ratios") for row in ours["rows"]):
        paths.append(directory / "gpu.png")
        draw_chart(ours, paths[-1], SECTIONS, "tinyllm on a GPU", "the fastest peer")
    if any(is_measured(row) for row in _rows_over_length(results)):
        paths.append(directory / "gpu_attention.png")
        draw_attention(results, paths[-1])
    return paths


def _as_one(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of each benchmark the faster one of ours alone, as if there were no other."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if row["provider"] in OURS_ALL:
            found.setdefault(row["benchmark"], []).append(row)
    best = filter(None, map(fastest, found.values()))
    return {**results, "rows": [{**row, "provider": OURS} for row in best]}


def _rows_over_length(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        row
        for row in results["rows"]
        if row["section"] == "attention" and row["direction"] == FORWARD and row["causal"] and is_measured(row)
    ]


def draw_attention(results: Mapping[str, Any], path: Path) -> None:
    """Rate of causal attention's forward pass over T, a panel for each head_dim."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows_over_length(results)
    sizes = sorted({row["head_dim"] for row in rows})
    lengths = sorted({row["seq_len"] for row in rows})
    figure = Figure(figsize=(5 * len(sizes) + 2, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for axes, size in zip(panels, sizes, strict=True):
        for provider in providers:
            found = sorted(
                (row["seq_len"], row["rate"] / 1e3)
                for row in rows
                if (row["head_dim"], row["provider"]) == (size, provider)
            )
            style: dict[str, Any] = {}
            if provider in OURS_ALL:
                style = {"linewidth": 2.5, "color": "black", "linestyle": "-" if provider == CUDA else "--"}
            axes.plot(*zip(*found, strict=True), marker="o", markersize=4, label=provider, **style) if found else None
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"T, head_dim {size}", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("TFLOP/s over visible pairs", fontsize=9)
    panels[-1].legend(frameon=False, fontsize=9)
    set_title(panels[0], "Causal attention, forward, bfloat16", results)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
