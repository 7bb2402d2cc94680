"""From measurements of training to what people read: results/training.json and the README's table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from tinyllm._internal.files import write_text

from .harness import OURS
from .report import README, RESULTS, is_disturbed, is_measured, machine_line, replace_blocks, section_table
from .timing import format_time

NAME = "training.json"
TITLES = {
    "char": "A character model: `tinyllm train` and a GPT in plain PyTorch",
    "gpt2": "GPT-2's size: SimpleLLM and Hugging Face's model",
    "engine": "What `tinyllm train` costs: beside a loop with nothing around the model",
}


def versions() -> dict[str, str | None]:
    """Of what takes part besides torch."""
    found: dict[str, str | None] = {}
    for package in ("lightning-fabric", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def save(results: Mapping[str, Any], folder: Path) -> Path:
    """Where it is."""
    write_text(folder / NAME, json.dumps(results, indent=1) + "\n")
    return folder / NAME


def load(folder: Path = RESULTS) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return results


def update_readme(results: Mapping[str, Any], path: Path = README) -> None:
    """Put the table between its markers."""
    replace_blocks(path, {"training": render_table(results)})


def render_table(results: Mapping[str, Any]) -> str:
    """Markdown: a table for each section, and below it what its times do not say."""
    quick = "A quick run: a first impression. " if results["quick"] else ""
    measured = [row for row in results["rows"] if is_measured(row)]
    disturbed = any(map(is_disturbed, measured))
    warning = "Rows with (!) were disturbed: other programs used the processor meanwhile. " if disturbed else ""
    kept, gone = (sum({row["section"]: row[key] for row in measured}.values()) for key in ("rounds", "rounds_left_out"))
    left_out = f"{gone} of {kept + gone} rounds are left out, as other programs ran meanwhile." if gone else ""
    lines = [
        f"{machine_line(results)}; commit {results['commit'] or 'unknown'}, {results['date'][:10]}.",
        f"{quick}{warning}A step is everything: data, forward, backward, clipping, optimizer, bookkeeping;",
        "at GPT-2's size, where data and bookkeeping are lost in seconds, all have the same short loop and one batch.",
        "They take turns in one process, whose allocator is tuned. Medians ± half the interquartile range; the factor",
        "is how many times as long as tinyllm another one takes." + (f" {left_out}" if left_out else ""),
    ]
    for section, title in TITLES.items():
        rows = [row for row in results["rows"] if row["section"] == section]
        if rows:
            lines += ["", f"**{title}**", "", *section_table(rows, short=False), ""]
            lines += _NOTES[section](rows, results["details"][section])
    return "\n".join(lines)


def _char_notes(rows: list[dict[str, Any]], details: Mapping[str, Any]) -> list[str]:
    losses = ", ".join(f"{name} {fmean(values):.3f}" for name, values in details["val_loss"].items())
    seeds = f"mean of {details['seeds']} seeds" if details["seeds"] > 1 else "one seed"
    return [
        _speeds(rows),
        f"Validation loss after {details['steps']} steps from the same first weights, {seeds}: {losses}.",
        f"Each has {details['parameters'][OURS]:,} weights.",
    ]


def _gpt2_notes(rows: list[dict[str, Any]], details: Mapping[str, Any]) -> list[str]:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in details["loss"].items())
    return [_speeds(rows), f"Loss after the same steps from the same weights: {losses}."]


def _engine_notes(rows: list[dict[str, Any]], details: Mapping[str, Any]) -> list[str]:
    share = details["cost_s"] / next(row["median_s"] for row in rows if row["provider"] != OURS)
    return [
        f"The median difference is {format_time(details['cost_s'])} a step, {share:.1%} of the loop's, with the same",
        f"losses to the bit. Waiting for data takes {format_time(details['wait_s'])}, {details['wait_fraction']:.2%}.",
    ]


def _speeds(rows: list[dict[str, Any]]) -> str:
    """Tokens a second of everyone who was measured."""
    speeds = [f"{row['provider']} {row['tokens'] / row['median_s']:,.0f}" for row in rows if is_measured(row)]
    return f"Tokens a second: {', '.join(speeds)}."


_NOTES = {"char": _char_notes, "gpt2": _gpt2_notes, "engine": _engine_notes}


def rounded(value: Any) -> Any:
    """Floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
