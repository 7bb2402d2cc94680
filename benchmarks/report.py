"""From measurements to what people read: results/cpu.json, the README's tables, the pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm._internal.files import replacing, write_text

from .harness import BYTES, OURS
from .machine import DISTURBED
from .timing import format_digits, format_time

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# Of an installed package: the same folder below the one it is run in.
RESULTS = (ROOT if (ROOT / "pyproject.toml").exists() else Path()) / "benchmarks" / "results"
DEMO = README.parent / "docs" / "demo.txt"  # what `make demo` printed
SECTIONS = {
    "embedding": "Embedding",
    "layer_norm": "Layer normalisation",
    "attention": "Attention",
    "linear": "Linear layers",
    "losses": "Losses",
    "model": "The whole model",
}
MARK = "(!)"  # of disturbed rows
COLORS = {
    "embedding": "#c9a227",
    "layer_norm": "#2a9d8f",
    "attention": "#2f6fb0",
    "linear": "#b5485d",
    "losses": "#d1793b",
    "model": "#8a5fb5",
    "decode": "#6c8ebf",
    "launch": "#7f7f7f",
}


# ---- The results


def make_results(
    facts: Mapping[str, Any],
    ceilings: Mapping[str, Any] | None,
    benchmarks: Iterable[Any],
    one_thread: Iterable[Any] = (),
) -> dict[str, Any]:
    """The content of cpu.json, or gpu.json.

    Args:
        facts: machine, versions, ..., see `benchmarks.machine.describe`.
        ceilings: see `benchmarks.machine.ceilings`; None if they are not known.
        benchmarks: the "benchmarks" of pytest-benchmark's JSON; some may have "failed" among their facts, which says
            why there are no statistics.
        one_thread: the same of rows measured on one thread.
    """
    rows = _rows(benchmarks)
    for row in rows:
        if ceilings is not None and is_measured(row):
            row["fraction_of_ceiling"] = row["rate"] / ceiling_of(row, ceilings)
    return _rounded({**facts, "ceilings": ceilings, "rows": rows, "one_thread": _rows(one_thread)})


def _rows(benchmarks: Iterable[Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        info = dict(benchmark["extra_info"])
        if "failed" in info:
            rows.append(info)
            continue
        stats = benchmark["stats"]
        rows.append(
            {
                **info,
                "rounds": stats["rounds"],
                "median_s": stats["median"],
                "iqr_s": stats["iqr"],
                "rate": info["work"] / stats["median"] / 1e9,
            }
        )
    measured = [row for row in rows if is_measured(row)]
    for row in measured:
        peers = [other for other in measured if other["benchmark"] == row["benchmark"] and other is not row]
        row["ratios"] = {peer["provider"]: peer["median_s"] / row["median_s"] for peer in peers}
    return rows


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether it has a time, and does not say why not."""
    return "failed" not in row


def ceiling_of(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> float:
    """The ceiling, in the row's unit, that its rate is a fraction of."""
    return float(ceilings["copy_gb_per_s"] if row["unit"] == BYTES else ceilings["gemm_gflops"][row["dtype"]])


def _rounded(value: Any) -> Any:
    """Floats to five significant digits: more are noise, and make every diff longer."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def is_disturbed(row: Mapping[str, Any]) -> bool:
    """Whether other programs used the processor while the row was measured."""
    return bool((row["other_load_cores"] or 0.0) >= DISTURBED)


def best_peer(row: Mapping[str, Any]) -> float:
    """The time of the fastest other provider, as a multiple of this one's."""
    return float(min(row["ratios"].values()))


def save(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write cpu.json and the pictures; where they are."""
    write_text(directory / "cpu.json", json.dumps(results, indent=1) + "\n")
    return [directory / "cpu.json", *draw_pictures(results, directory)]


def load(directory: Path = RESULTS) -> dict[str, Any]:
    """The content of `directory`/cpu.json."""
    results: dict[str, Any] = json.loads((directory / "cpu.json").read_text(encoding="utf-8"))
    return results


# ---- The tables


def render_table(results: Mapping[str, Any], headline: bool = False) -> str:
    """Markdown: who was faster, by how much, and how near to the ceiling. With `headline` a few rows in one table."""
    if headline:
        rows, one = [row for row in results["rows"] if row["headline"]], results["one_thread"]
        return "\n".join(
            [
                *section_table(rows, short=True),
                *(["", "The same on one thread:", "", *section_table(one, short=True)] if one else []),
                "",
                f"{machine_line(results)}. {_disturbance(results, [*rows, *one])}Medians ± half the interquartile",
                "range; the factor is how many times as long as tinyllm a peer takes.",
            ]
        )
    lines = [_notes(results)]
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines += ["", f"**{title}**", "", *section_table(rows, short=False)]
    return "\n".join(lines)


def section_table(rows: Sequence[Mapping[str, Any]], short: bool) -> list[str]:
    """Lines of a Markdown table: a row for each benchmark, a column for each provider."""
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    header = ["", OURS, *([] if short else ["rate", "of ceiling"]), *peers]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name in names:
        found = {row["provider"]: row for row in rows if row["benchmark"] == name}
        ours = found[OURS]
        cells = [f"{name} {MARK}" if is_disturbed(ours) else name, time_cell(ours)]
        if not short:
            cells += _rate_cells(ours)
        ratios = ours.get("ratios", {})
        for peer in peers:
            cell = time_cell(found[peer]) if peer in found else ""
            if peer in ratios:
                shown = f"{ratios[peer]:.2f}x"
                cell += ", " + (f"**{shown}**" if ratios[peer] == min(ratios.values()) else shown)
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rate_cells(row: Mapping[str, Any]) -> list[str]:
    """The rate and its fraction of the ceiling, as far as there is one."""
    fraction = row.get("fraction_of_ceiling")
    return [rate_cell(row), "" if fraction is None else f"{fraction:.0%}"]


def rate_cell(row: Mapping[str, Any]) -> str:
    """The rate with its unit; empty without one."""
    if not row.get("rate"):
        return ""
    rate, unit = row["rate"], row["unit"]
    if rate >= 10_000:  # a GPU's
        rate, unit = rate / 1000, unit.replace("G", "T", 1)
    return f"{format_digits(rate)} {unit}"


def _notes(results: Mapping[str, Any]) -> str:
    gemm, copy = results["ceilings"]["gemm_gflops"], results["ceilings"]["copy_gb_per_s"]
    ceilings = f"{gemm['float32']:.0f} GFLOP/s in float32 and {gemm['bfloat16']:.0f} in bfloat16; copy {copy:.1f} GB/s,"
    return "\n".join(
        [
            f"{machine_line(results)}; commit {results['commit'] or 'unknown'}, {results['date'][:10]}.",
            f"{_disturbance(results, results['rows'])}{_allocator_line(results['allocator'])}",
            "",
            "- Times are medians of a call ± half the interquartile range. The factor behind a peer's time is how many",
            "  times as long as tinyllm it takes (above 1: tinyllm is faster), in bold for the best peer.",
            "- Rates count useful work only: matrix products, of attention those of visible query-key pairs; or every",
            "  tensor moved once.",
            f"- Ceilings, measured with plain PyTorch in the same run: matrix product {ceilings}",
            "  read and written. Tensors that fit in the caches move faster than that.",
        ]
    )


def machine_line(results: Mapping[str, Any]) -> str:
    """The machine and the versions, in a line."""
    machine, versions = results["machine"], results["versions"]
    if results.get("gpu"):
        gpu = results["gpu"]
        return (
            f"{gpu['name']} ({gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']:.0f} GiB); "
            f"CUDA {gpu['cuda']}, torch {versions['torch']}, triton {gpu['triton']}, Python {versions['python']}"
        )
    memory = f", {machine['memory_gib']:.0f} GiB" if machine["memory_gib"] else ""
    return (
        f"{machine['processor']} ({machine['isa']}), {machine['cores']} cores, {machine['threads']} threads{memory}; "
        f"torch {versions['torch']}, Python {versions['python']}"
    )


def _disturbance(results: Mapping[str, Any], shown: Iterable[Mapping[str, Any]]) -> str:
    """What stands against trusting the rows shown; empty if nothing does."""
    quick = "A quick run: a first impression. " if results["quick"] else ""
    rows = any(map(is_disturbed, shown))
    return quick + (f"Rows with {MARK} were disturbed: other programs used the processor meanwhile. " if rows else "")


def _allocator_line(allocator: Mapping[str, str]) -> str:
    if not allocator:
        return "Allocator settings: the system's defaults."
    settings = ", ".join(f"{name}={value}" for name, value in allocator.items())
    return f"Allocator settings, the same for all: {settings}."


def time_cell(row: Mapping[str, Any]) -> str:
    """Time, spread and memory, or why there are none."""
    if not is_measured(row):
        reason = " ".join(row["failed"].replace("|", "/").split())
        return reason if len(reason) <= 60 else f"{reason[:57]}..."
    memory = f", {row['peak_bytes'] / 2**30:.2f} GiB" if row.get("shows_memory") and row["peak_bytes"] else ""
    spread = row["iqr_s"] / 2 / row["median_s"]
    return f"{format_time(row['median_s'])} ±{spread:.0%}{memory}"


# ---- The README


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between `<!-- benchmarks:NAME -->` and its closing marker; unchanged if it has neither."""
    start, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
    counts = text.count(start), text.count(end)
    if counts == (0, 0):
        return text
    if counts != (1, 1) or text.index(start) > text.index(end):
        raise ValueError(f"{start} and {end} must each be there once, in this order")
    return re.sub(f"(?s){re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text)


def render_demo() -> str:
    """What `make demo` printed, as a block of Markdown."""
    return f"```console\n{DEMO.read_text(encoding='utf-8')}```"


def update_readme(results: Mapping[str, Any], path: Path = README) -> None:
    """Put both tables and the demo's output between their markers."""
    blocks = {
        "cpu": render_table(results),
        "headline": render_table(results, headline=True),
        "demo": render_demo(),
    }
    replace_blocks(path, blocks)


def replace_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """`replace_block` for a file and several blocks."""
    text = new = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        new = replace_block(new, name, content)
    if new != text:
        write_text(path, new)


# ---- The pictures


def draw_pictures(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """cpu.png, and cpu_attention_length.png if the results have its rows."""
    paths = []
    if any(row["section"] in SECTIONS for row in results["rows"]):
        paths.append(directory / "cpu.png")
        draw_chart(results, paths[-1])
    if any(row["section"] == "length" for row in results["rows"]):
        paths.append(directory / "cpu_attention_length.png")
        draw_lengths(results, paths[-1])
    return paths


def draw_chart(
    results: Mapping[str, Any],
    path: Path,
    sections: Mapping[str, str] = SECTIONS,
    title: str = "tinyllm against PyTorch on the CPU",
    peers: str = "the faster of eager PyTorch and torch.compile",
) -> None:
    """Speed-up over the best peer, a bar for each row; `sections`: key -> what the legend calls it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [
        row
        for section in sections
        for row in results["rows"]
        if (row["section"], row["provider"]) == (section, OURS) and row.get("ratios")
    ]
    shown = [section for section in sections if any(row["section"] == section for row in rows)]
    places, labels, place = [], [], 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        place += 1.0 if before is None or before["section"] == row["section"] else 1.8
        places.append(place)
        labels.append(f"{row['benchmark']} {MARK}" if is_disturbed(row) else row["benchmark"])
    speedups = [best_peer(row) for row in rows]
    colors = [COLORS[row["section"]] for row in rows]

    figure = Figure(figsize=(10, 1.6 + 0.27 * place), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = axes.barh(places, speedups, height=0.72, color=colors)
    for bar, place_of_bar, speedup, row in zip(bars, places, speedups, rows, strict=True):
        if speedup < 1:  # slower than the best peer: seen at a glance
            bar.set_alpha(0.45)
        axes.annotate(
            f"{speedup:.2f}x   {format_time(row['median_s'])}",
            (speedup, place_of_bar),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(1.0, color="#333333", linewidth=1)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(place + 0.8, 0.2)
    axes.set_xlim(0, max(1.2, *speedups) * 1.18)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel(f"speed-up over {peers} (right of 1x: tinyllm is faster)", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    set_title(axes, title, results)
    handles = [Patch(color=COLORS[section], label=sections[section]) for section in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_lengths(results: Mapping[str, Any], path: Path) -> None:
    """Time of causal attention over the length of the sequence, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["section"] == "length"]
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = sorted({row["seq_len"] for row in rows})
    for direction, line in (("backward", "--"), ("forward", "-")):
        for provider, color in ((OURS, COLORS["attention"]), ("torch", COLORS["losses"])):
            found = [row for row in rows if (row["direction"], row["provider"]) == (direction, provider)]
            if not found:
                continue
            found.sort(key=lambda row: row["seq_len"])
            axes.plot(
                [row["seq_len"] for row in found],
                [row["median_s"] for row in found],
                line,
                marker="o",
                markersize=4,
                color=color,
                label=f"{provider}, {direction}",
            )
    for row in rows:  # below our line: how many times as long PyTorch takes
        if row["provider"] == OURS and row["direction"] == "forward":
            axes.annotate(
                f"{best_peer(row):.2f}x",
                (row["seq_len"], row["median_s"]),
                xytext=(5, -11),
                textcoords="offset points",
                fontsize=8,
                color=COLORS["attention"],
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda seconds, _: format_time(seconds).replace(".00", "").replace(".0", ""))
    axes.set_xlabel("T, queries and keys of a sequence (numbers: torch's forward time / tinyllm's)", fontsize=9)
    axes.set_ylabel("time of a call", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    set_title(axes, "Causal attention over T (12 heads of 64)", results)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def set_title(axes: Any, title: str, results: Mapping[str, Any]) -> None:
    """The title, and below it where and when the figures were measured."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.annotate(
        f"{machine_line(results)}; {results['date'][:10]}",
        (0, 1),
        xytext=(0, 9),
        textcoords="offset points",
        xycoords="axes fraction",
        fontsize=9,
        color="#555555",
    )
