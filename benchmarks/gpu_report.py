"""From measurements on a GPU to what people read: results/gpu.json, the README's table, the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllm._files import replacing, write_text

from .harness import FORWARD, OURS
from .report import (
    README,
    RESULTS,
    draw_chart,
    is_measured,
    machine_line,
    replace_blocks,
    section_table,
    set_title,
)

STORED = RESULTS / "gpu.json"
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


def render_table(results: Mapping[str, Any], headline: bool = False) -> str:
    """Markdown, a table for each section; with `headline` only what the README shows."""
    lines = [_notes(results)]
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section and (row["headline"] or not headline)]
        if rows:
            lines += ["", f"**{title}**", "", *section_table(rows, short=False)]
    return "\n".join(lines)


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
            "  and launches on the wall's clock. The factor is how many times as long as tinyllm a peer takes.",
            "- Rates count useful work only; of causal attention the visible pairs. Each result was verified before.",
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
    if any(row.get("ratios") for row in results["rows"] if row["provider"] == OURS):
        paths.append(directory / "gpu.png")
        draw_chart(results, paths[-1], SECTIONS, "tinyllm on a GPU", "the fastest peer")
    if any(is_measured(row) for row in _rows_over_length(results)):
        paths.append(directory / "gpu_attention.png")
        draw_attention(results, paths[-1])
    return paths


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
            style: dict[str, Any] = {"linewidth": 2.5, "color": "black"} if provider == OURS else {}
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
