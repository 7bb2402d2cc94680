"""Write what people read of measurements: results/KIND/FAMILY.json, docs/benchmarks.md and the README's table.

    python -m benchmarks.report                   write page, pictures and table anew from the stored results
    python -m benchmarks.report --adopt FILE      first take over what was measured elsewhere, with --out

KIND is cpu, gpu, training, generation, guesses or optimize; FAMILY names the processor's family or the chip. The page
shows whatever is stored, the families beside each other.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tinyllm._internal.files import write_text

from . import generation_tables
from .machine import DISTURBED, slug
from .page_text import INTRO, KIND_NOTES
from .row import BYTES, OURS, OURS_ALL
from .tables import MARK, format_digits, format_reason, format_time, markdown

ROOT = Path(__file__).parents[1]
IN_REPOSITORY = (ROOT / "pyproject.toml").exists()
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PICTURES = PAGE.with_suffix("")
# Of an installed package: the same folder below the one it is run in.
RESULTS = (ROOT if IN_REPOSITORY else Path()) / "benchmarks" / "results"
KINDS = {
    "cpu": "On a CPU",
    "training": "Whole trainings",
    "generation": "Writing",
    "guesses": "Writing with guesses",
    "optimize": "Models of transformers",
    "gpu": "On a GPU",
}
SECTIONS = {
    "embedding": "Embedding",
    "layer_norm": "Norms",
    "attention": "Attention",
    "decode": "Attention of one query",
    "linear": "Linear layers",
    "losses": "Losses",
    "optimizer": "The optimizer",
    "model": "The whole model",
    "launch": "The cost of a launch",
    "char": "A character model: `tinyllm train` and a GPT in plain PyTorch",
    "goal": "A character model until it has a loss: `tinyllm train`, and plain PyTorch by nanoGPT's recipe",
    "gpt2": "GPT-2's size: SimpleLLM and Hugging Face's model",
    "engine": "What `tinyllm train` costs beside a loop with nothing around the model",
    "optimize": "Before and after `tinyllm.optimize`",
    generation_tables.READING: "Reading a prompt",
    generation_tables.WRITING: "Writing a token",
}
MOST_SLOWER = 2  # rows in which a peer is faster that the README shows

Results = Mapping[str, Any]
RowFacts = Mapping[str, Any]


# ---- The results


def make_results(
    facts: Results, ceilings: Results | None, rows: Iterable[dict[str, Any]], one_thread: Iterable[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return the content of a file of results.

    Args:
        facts: machine, versions, ..., see `machine.describe`.
        ceilings: see `machine.ceilings`; None if they are not known.
        rows: a dict for each row and provider: the row's facts and the provider's times, or why it "failed".
        one_thread: the same of rows measured on one thread.
    """
    return rounded(
        {**facts, "ceilings": ceilings, "rows": _rated(rows, ceilings), "one_thread": _rated(one_thread, None)}
    )


def _rated(rows: Iterable[dict[str, Any]], ceilings: Results | None) -> list[dict[str, Any]]:
    """Return the rows with rates, their fractions of the ceiling, and the ratios of each peer's time to ours."""
    found = [dict(row) for row in rows]
    for row in filter(is_measured, found):
        row["rate"] = row["work"] / row["median_s"] / 1e9
        if ceilings is not None:
            copied = row["unit"] == BYTES
            ceiling = ceilings["copy_gb_per_s"] if copied else ceilings["gemm_gflops"][row["dtype"]]
            row["fraction_of_ceiling"] = row["rate"] / ceiling
        if row["provider"] in OURS_ALL:
            row["ratios"] = {
                other["provider"]: other["median_s"] / row["median_s"]
                for other in filter(is_measured, found)
                if other["benchmark"] == row["benchmark"] and is_peer(other["provider"])
            }
    return found


def rounded(value: Any) -> Any:
    """Round floats to five significant digits: more are noise, and make every diff longer."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def is_measured(row: RowFacts) -> bool:
    """Return whether a row has a time."""
    return "failed" not in row


def is_peer(provider: str) -> bool:
    """Return whether a provider is not ours, nor a part of one of ours ("Triton, its launch")."""
    return provider.split(", ")[0] not in OURS_ALL


def is_disturbed(row: RowFacts) -> bool:
    """Return whether other programs used the processor while the row was measured."""
    return (row["other_load_cores"] or 0.0) >= DISTURBED


def kind_of(results: Results) -> str:
    """Return the key of KINDS under which results are stored."""
    kinds = {
        "details": "training",
        "generation": "generation",
        "guesses": "guesses",
        "optimize": "optimize",
        "gpu": "gpu",
    }
    return next((kind for key, kind in kinds.items() if key in results), "cpu")


def family_of(results: Results) -> str:
    """Return the name of the processor's family, or of the chip."""
    return slug(results["gpu"]["name"]) if kind_of(results) == "gpu" else results["machine"]["family"]


def stored(kind: str) -> dict[str, dict[str, Any]]:
    """Return the stored results of a kind: family -> results."""
    paths = sorted((RESULTS / kind).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def publish(results: Results, out: Path | None) -> None:
    """Write results and their pictures to `out`. Without it, store those of a whole run, and write anew what shows them
    in a repository."""
    if out is None and (results["quick"] or results.get("only")):
        return
    path = save(results, out)
    print(f"Written: {path}")
    if out is None and IN_REPOSITORY:
        render()
    else:
        from .pictures import draw

        draw(kind_of(results), {path.stem: results}, path.parent)


def save(results: Results, out: Path | None) -> Path:
    """Write results to a folder, or where they are stored; return the file."""
    kind = kind_of(results)
    path = RESULTS / kind / f"{family_of(results)}.json" if out is None else out / f"{kind}.json"
    write_text(path, json.dumps(results, indent=1) + "\n")
    return path


def adopt(path: Path) -> None:
    """Store results that were measured elsewhere; raise ValueError where they are not those of a whole run."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["quick"] or results.get("only") or (kind_of(results) == "gpu" and results["gpu"] is None):
        raise ValueError(f"{path} does not hold a whole run, and what it holds is not stored")
    publish(results, None)


# ---- Tables


def fastest(rows: Iterable[RowFacts]) -> RowFacts:
    """Return the row with the shortest time; an empty one if none is measured."""
    return min(filter(is_measured, rows), key=lambda row: row["median_s"], default={})


def ours_by_benchmark(results: Results) -> dict[str, RowFacts]:
    """Return for each benchmark of a table the fastest row of ours that has been compared with a peer."""
    ours: dict[str, list[RowFacts]] = {}
    for row in results["rows"]:
        if row["section"] in SECTIONS and row["provider"] in OURS_ALL:
            ours.setdefault(row["benchmark"], []).append(row)
    found = {name: fastest(rows) for name, rows in ours.items()}
    return {name: row for name, row in found.items() if row.get("ratios")}


def factor(row: RowFacts) -> float:
    """Return the time of the fastest peer as a multiple of ours."""
    return float(min(row["ratios"].values()))


def side_by_side(found: Mapping[str, Results], names: Iterable[str] | None = None) -> list[str]:
    """Return the lines of a Markdown table: our time and the factor to the fastest peer in each family, and where there
    are several, each row's worst and best factor.

    Args:
        found: family -> results.
        names: the benchmarks to show; all of them by default.
    """
    by_family = {family: ours_by_benchmark(results) for family, results in found.items()}
    measured = [name for rows in by_family.values() for name in rows]
    several = len(set(measured)) < len(measured)  # some rows in more than one family
    table = [["", *found, *(["worst", "best"] if several else [])]]
    for name in dict.fromkeys(measured if names is None else names):
        rows = {family: by_family[family][name] for family in found if name in by_family[family]}
        factors = [factor(row) for row in rows.values()]
        cells = [f"{format_time(rows[f]['median_s'])}, {factor(rows[f]):.2f}x" if f in rows else "" for f in found]
        table.append([name, *cells, *([f"{min(factors):.2f}x", f"{max(factors):.2f}x"] if several else [])])
    return markdown(table)


def section_table(rows: Sequence[RowFacts]) -> list[str]:
    """Return the lines of a Markdown table: a row for each benchmark, a column for each provider."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    ours = [name for name in OURS_ALL if name in providers]
    peers = sorted((name for name in providers if name not in ours), key=lambda name: not is_peer(name))
    has_rate, has_fraction = any(row.get("rate") for row in rows), any("fraction_of_ceiling" in row for row in rows)
    table = [["", *ours, *["rate"] * has_rate, *["of ceiling"] * has_fraction, *peers]]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        found = {row["provider"]: row for row in rows if row["benchmark"] == name}
        best = fastest(found[who] for who in ours if who in found)
        ratios = {who: ratio for who, ratio in best.get("ratios", {}).items() if is_peer(who)}
        cells = [f"{name} {MARK}" if any(map(is_disturbed, found.values())) else name]
        cells += [_time_cell(found.get(who, {})) for who in ours]
        cells += [_rate_cell(best)] * has_rate
        cells += [f"{best['fraction_of_ceiling']:.0%}" if "fraction_of_ceiling" in best else ""] * has_fraction
        for who in peers:
            ratio = f", {ratios[who]:.2f}x" if who in ratios else ""
            bold = "**" if ratio and ratios[who] == min(ratios.values()) else ""
            cells.append(_time_cell(found.get(who, {})) + ratio.replace(" ", f" {bold}") + bold)
        table.append(cells)
    return markdown(table)


def _time_cell(row: RowFacts) -> str:
    """Return time, spread and memory, or why there are none."""
    if not row:
        return ""
    if not is_measured(row):
        return format_reason(row["failed"])
    memory = f", {row['peak_bytes'] / 2**30:.2f} GiB" if row.get("shows_memory") and row["peak_bytes"] else ""
    busy = f", GPU {format_time(row['gpu_s'])}" if "gpu_s" in row else ""
    return f"{format_time(row['median_s'])} ±{row['iqr_s'] / 2 / row['median_s']:.0%}{memory}{busy}"


def _rate_cell(row: RowFacts) -> str:
    if not row.get("rate"):
        return ""
    rate, unit = row["rate"], row["unit"]
    if rate >= 10_000:  # a GPU's
        rate, unit = rate / 1000, unit.replace("G", "T", 1)
    return f"{format_digits(rate)} {unit}"


def render_tables(results: Results) -> str:
    """Return Markdown of one file of results: who was faster, by how much, and how near to the ceiling."""
    lines = [_facts(results)]
    if kind_of(results) == "generation":
        return "\n".join([*lines, *generation_tables.render(results)])
    if kind_of(results) == "guesses":
        return "\n".join([*lines, "", *generation_tables.render_guesses(results)])
    for section, title in SECTIONS.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines += ["", f"**{title}**", "", *section_table(rows)]
            lines += ["", *_training_notes(section, rows, results["details"][section])] if "details" in results else []
    if results.get("one_thread"):
        lines += ["", "**On one thread**", "", *section_table(results["one_thread"])]
    return "\n".join(lines)


def machine_line(results: Results) -> str:
    """Return the machine and the versions, in a line."""
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


def _facts(results: Results) -> str:
    """Return what was measured on and when, the ceilings, and what stands against trusting the rows."""
    lines = [f"{machine_line(results)}; commit {results['commit'] or 'unknown'}, {results['date'][:10]}."]
    if results["quick"]:
        lines.append("A quick run: a first impression.")
    if any(is_disturbed(row) for row in results["rows"]):
        lines.append(f"Rows with {MARK} were disturbed: other programs used the processor meanwhile.")
    if results["ceilings"] is not None:
        gemm, copy = results["ceilings"]["gemm_gflops"], results["ceilings"]["copy_gb_per_s"]
        products = f"{gemm['float32']:.0f} GFLOP/s in float32 and {gemm['bfloat16']:.0f} in bfloat16"
        lines.append(f"Ceilings: matrix product {products}; copy {copy:.1f} GB/s.")
    allocator = ", ".join(f"{name}={value}" for name, value in results["allocator"].items())
    lines.append(f"Allocator settings, the same for all: {allocator or 'the defaults of the system'}.")
    return "\n".join(lines)


def _training_notes(section: str, rows: Sequence[RowFacts], details: Results) -> list[str]:
    """Return what a table of trainings does not say."""
    gone = next((row["rounds_left_out"] for row in rows if is_measured(row)), 0)
    left_out = [f"{gone} rounds are left out, as other programs ran meanwhile."] if gone else []
    if section == "engine":
        cost, wait = format_time(details["cost_s"]), format_time(details["wait_s"])
        share = details["cost_s"] / next(row["median_s"] for row in rows if row["provider"] != OURS)
        return [
            *left_out,
            f"The median difference is {cost} a step, {share:.1%} of the loop's, with the same",
            f"losses to the bit. Waiting for data takes {wait}, {details['wait_fraction']:.2%}.",
        ]
    if section == "goal":
        ends = [f"{name} {details['val_loss'][name]:.3f} after {n:,} steps" for name, n in details["steps"].items()]
        return [*left_out, f"Validation loss at the end: {', '.join(ends)}."]
    speeds = [f"{row['provider']} {row['tokens'] / row['median_s']:,.0f}" for row in rows if is_measured(row)]
    lines = [*left_out, f"Tokens a second: {', '.join(speeds)}."]
    if section == "gpt2":
        losses = ", ".join(f"{name} {value:.4f}" for name, value in details["loss"].items())
        return [*lines, f"Loss after the same steps from the same weights: {losses}."]
    losses = ", ".join(f"{name} {fmean(values):.3f}" for name, values in details["val_loss"].items())
    seeds = f"mean of {details['seeds']} seeds" if details["seeds"] > 1 else "one seed"
    lines.append(f"Validation loss after {details['steps']} steps from the same first weights, {seeds}: {losses}.")
    return [*lines, f"Each has {details['parameters'][OURS]:,} weights."]


# ---- The page and the README


def render_page() -> str:
    """Return the text of docs/benchmarks.md."""
    lines = [INTRO]
    for kind, title in KINDS.items():
        found = stored(kind)
        lines += [f"## {title}", "", KIND_NOTES[kind], ""]
        if not found:
            lines += ["No results are stored yet.", ""]
        picture = PICTURES / f"{kind}-speedups.png"
        if picture.exists():
            lines += [f"![Speed-up over the fastest peer]({picture.relative_to(PAGE.parent)})", ""]
        picture = PICTURES / f"{kind}-writing.png"
        if picture.exists():
            lines += [f"![Tokens a second of each engine]({picture.relative_to(PAGE.parent)})", ""]
        if len(found) > 1:
            lines += ["### Side by side", "", "Our time, and the factor to the fastest peer.", "", *side_by_side(found)]
            lines += [""]
        for family, results in found.items():
            lines += [f"### {title}: {family}", "", render_tables(results), ""]
            picture = PICTURES / f"{kind}-{family}-attention.png"
            if picture.exists():
                lines += [f"![Attention over the length]({picture.relative_to(PAGE.parent)})", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def render_headline() -> str:
    """Return the README's table: the headline's rows, and those in which a peer is faster."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("cpu", "training", "generation"):
        for family, results in stored(kind).items():
            whole = found.setdefault(family, {**results, "rows": []})
            whole["rows"] = [*whole["rows"], *results["rows"]]
    tables = [_headline_table(found)] if found else []
    tables += [_headline_table(gpus)] if (gpus := stored("gpu")) else []
    return "\n\n".join(tables)


def render_optimize() -> str:
    """Return the README's table of models of transformers: a line for each model and what it does."""
    found = stored("optimize")
    if not found:
        return ""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for family, results in found.items():
        for row in results["rows"]:
            if row["provider"] == OURS:
                name = row["benchmark"].removesuffix(f", {row['weights']} weights")
                cells.setdefault(name, {}).setdefault(row["weights"], {})[family] = f"{factor(row):.2f}x"
    kinds = list(dict.fromkeys(kind for kept in cells.values() for kind in kept))
    table = [["", *(f"{kind} weights" for kind in kinds)]]
    for name, kept in cells.items():
        table.append(
            [name, *(", ".join(kept[kind].get(f, "-") for f in found) if kind in kept else "" for kind in kinds)]
        )
    machines = "; ".join(
        f"{family}: {machine_line(results)}; {results['date'][:10]}" for family, results in found.items()
    )
    return "\n".join(
        [
            *markdown(table),
            "",
            "How many times as long the model takes before `optimize`, with float32 weights, by itself or by",
            f"torch.compile, whichever is faster: on {' and on '.join(found)}. {machines}",
        ]
    )


def _headline_table(found: Mapping[str, Results]) -> str:
    slowest: dict[str, float] = {}
    shown: list[str] = []
    for results in found.values():
        for name, row in ours_by_benchmark(results).items():
            if row["section"] == "engine":  # our own model beside itself
                continue
            slowest[name] = min(slowest.get(name, factor(row)), factor(row))
            if row.get("headline") or row["section"] in ("goal", "gpt2"):
                shown.append(name)
    slower = sorted((name for name in slowest if slowest[name] < 1), key=slowest.__getitem__)
    lines = side_by_side(found, [*shown, *slower[:MOST_SLOWER]])
    which = f"The {MOST_SLOWER} slowest" if len(slower) > MOST_SLOWER else "They"
    lines += [
        "",
        "Our time, and how many times as long the fastest of PyTorch, torch.compile and Hugging Face takes. Below 1,",
    ]
    lines += [
        f"that one is faster: in {len(slower)} of the {len(slowest)} rows measured. {which} close the table.",
        "B sequences of T tokens, H heads of D columns; a model: width/feed-forward width/layers, V tokens known.",
    ]
    if any(row["section"] == generation_tables.WRITING for results in found.values() for row in results["rows"]):
        lines.append("Writing is compared with CTranslate2 and llama.cpp too, with weights as wide as ours or wider.")
    lines.append("")
    lines += [f"- {family}: {machine_line(results)}; {results['date'][:10]}" for family, results in found.items()]
    return "\n".join(lines)


def replace_block(text: str, name: str, content: str) -> str:
    """Return `text` with `content` between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; ValueError if these are not
    there once, in this order."""
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise ValueError(f"{start} and {end} must each be there once, in this order")
    return re.sub(f"(?s){re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text)


def render() -> None:
    """Write the page, its pictures, the README's table and what `tinyllm info` tells of GPUs from what is stored."""
    from .pictures import draw
    from .proven import write

    for kind in KINDS:
        draw(kind, stored(kind), PICTURES)
    write_text(PAGE, render_page())
    readme = replace_block(README.read_text(encoding="utf-8"), "headline", render_headline())
    write_text(README, replace_block(readme, "optimize", render_optimize()))
    write(stored("gpu").values())


def parser_of(command: str, text: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command that measures, with the options that all of them have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="give a first impression")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results and pictures there, and store nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adopt", type=Path, nargs="+", default=[], metavar="FILE", help="results to store first")
    options = parser.parse_args(arguments)
    try:
        for path in options.adopt:
            adopt(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
