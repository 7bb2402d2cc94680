"""Train by several recipes, and show in docs/training.md how low a loss each reaches in what time.

    python -m benchmarks.recipes                    write the page's block and its picture from what is stored
    python -m benchmarks.recipes --run demo small   first train by the recipes of these tables; some minutes each

The runs are stored in results/recipes.json. A time is that of the steps alone, by their median speed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tinyllm import tune_allocator
from tinyllm._internal.files import write_text
from tinyllm.config.training import OPTIMIZERS, TrainConfig
from tinyllm.runs.metrics import read_metrics
from tinyllm.training.trainer import train

from .machine import describe
from .pictures import figure_of, save_figure
from .report import PAGE, RESULTS, machine_line, replace_block
from .tables import format_time, markdown

STORED = RESULTS / "recipes.json"
TRAINING = PAGE.with_name("training.md")
PICTURE = TRAINING.with_name("recipes.png")
CURVE_POINTS = 10

# Table -> its text and model, the settings that all of its recipes have, and those in which they differ. Runs that are
# compared take about the same time, but for nanoGPT's recipe, which has its 2,000 steps, and for small.
TABLES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "demo": (
        "BPE of 4,096 tokens",
        {"preset": "tiny"},
        [
            {"optimizer": "adamw", "steps": 800},
            {"optimizer": "adamw", "steps": 800, "lr": 6e-3},
            {"steps": 380},
            {"steps": 380, "lr": 1e-2},
            {"steps": 380, "lr": 4e-2},
            {"steps": 220, "batch_size": 48},
        ],
    ),
    "char": (
        "65 characters",
        {"preset": "tiny", "tokenizer": "char", "vocab_size": 65},
        [
            {"optimizer": "adamw", "steps": 2000, "lr": 1e-3, "warmup_steps": 100, "beta2": 0.99},
            {"optimizer": "adamw", "steps": 650},
            {"steps": 280},
            {"steps": 280, "lr": 1e-2},
        ],
    ),
    "small": (
        "the first steps of small",
        {"preset": "small", "steps": 40, "warmup_steps": 4, "batch_size": 4, "eval_batches": 5},
        [
            {"optimizer": "adamw"},
            {"optimizer": "adamw", "lr": 2e-3},
            {"optimizer": "muon", "lr": 3e-3},
        ],
    ),
}
SHOWN = ("optimizer", "batch_size", "seq_len", "steps", "lr", "warmup", "beta2")


def config_of(table: str, recipe: Mapping[str, Any]) -> TrainConfig:
    """Return what a recipe of a table trains."""
    settings = {**TABLES[table][1], **recipe}
    interval = -(-settings["steps"] // CURVE_POINTS)
    return TrainConfig.from_preset(**settings, eval_interval=interval, sample_tokens=0, device="cpu")


def run(table: str, folder: Path) -> list[dict[str, Any]]:
    """Train by a table's recipes, and return a dict for each: what is shown of it, and its curve."""
    found: list[dict[str, Any]] = []
    data = None
    for recipe in TABLES[table][2]:
        config, out = config_of(table, recipe), folder / str(len(found))
        train(config, out, data, progress=False)
        data = data or out / "data"  # tokenized once
        lines = read_metrics(out / "metrics.jsonl")
        speed = median(line["tokens_per_s"] for line in lines if line["split"] == "train")
        validations = [line for line in lines if line["split"] == "val"]
        found.append(
            {name: getattr(config, name) for name in SHOWN}
            | {"step_s": float(f"{config.batch_size * config.seq_len / speed:.4g}")}
            | {"at": [line["step"] for line in validations], "loss": [round(line["loss"], 4) for line in validations]}
        )
        print(found[-1], flush=True)
    return found


def name_of(recipe: Mapping[str, Any]) -> str:
    """Return a recipe in words."""
    tokens = f"{recipe['batch_size']} x {recipe['seq_len']} tokens"
    return f"{OPTIMIZERS[recipe['optimizer']]}, {tokens}, lr {recipe['lr']:g}"


def render_block(stored: Mapping[str, Any]) -> str:
    """Return the tables of docs/training.md."""
    lines = []
    for table, recipes in stored["tables"].items():
        cells = [[TABLES[table][0], "steps", "a step", "all steps", "validation loss"]]
        best = min(recipe["loss"][-1] for recipe in recipes)
        for recipe in recipes:
            loss, step = recipe["loss"][-1], recipe["step_s"]
            shown = f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"
            times = format_time(step), format_time(recipe["steps"] * step)
            cells.append([name_of(recipe), f"{recipe['steps']:,}", *times, shown])
        lines += [*markdown(cells), ""]
    lines += [f"![Validation loss over the time]({PICTURE.name})", ""]
    return "\n".join([*lines, f"{machine_line(stored)}; {stored['date'][:10]}."])


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Draw the validation loss over the time, a panel for each table."""
    figure = figure_of(4.5 * len(stored["tables"]), 5)
    panels = figure.subplots(1, len(stored["tables"]), squeeze=False)[0]
    for axes, (table, recipes) in zip(panels, stored["tables"].items(), strict=True):
        for recipe in recipes:
            style = "--" if recipe["optimizer"] == "adamw" else "-"
            times = [step * recipe["step_s"] for step in recipe["at"]]
            axes.plot(times, recipe["loss"], style, marker=".", label=name_of(recipe))
        axes.set_title(TABLES[table][0], fontsize=10)
        axes.set_xlabel("seconds of training", fontsize=9)
        axes.set_ylabel("validation loss, nats a token", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6)
    save_figure(figure, path, stored)


def render() -> None:
    """Write the page's block and its picture from what is stored."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    write_text(TRAINING, replace_block(TRAINING.read_text(encoding="utf-8"), "recipes", render_block(stored)))
    draw(stored, PICTURE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", default=[], choices=TABLES, help="the tables to train for")
    options = parser.parse_args(arguments)
    tune_allocator()  # as the command line does
    for table in options.run:
        with tempfile.TemporaryDirectory() as folder:
            found = run(table, Path(folder))
        before = json.loads(STORED.read_text(encoding="utf-8"))["tables"] if STORED.exists() else {}
        tables = {name: found if name == table else before[name] for name in TABLES if name == table or name in before}
        text = json.dumps({**describe(), "tables": tables}, indent=1)
        write_text(STORED, re.sub(r"\[[^][{}]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n")
    render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
