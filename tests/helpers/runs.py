"""Small trainings, for the tests that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import save_config
from tinyllm.data.shards import Split, open_shards
from tinyllm.model import SimpleLLM
from tinyllm.runs.folder import CHECKPOINTS, DATA, OLD_TOKENS, RUN_FILES
from tinyllm.runs.load import save_model
from tinyllm.runs.metrics import read_metrics
from tinyllm.tokenizer import train_tokenizer
from tinyllm.training.trainer import TrainConfig

TEXT = "the cat sat on the mat and the dog sat on the cat .\n" * 60
FOX = "the quick brown fox jumps over the lazy dog\n"
ROOT = Path(__file__).parents[2]
RUN = {*RUN_FILES, CHECKPOINTS, DATA} - {*OLD_TOKENS.values()}  # the names in a run folder

# Options of the article's model on words.
WORDS = ["--preset", "tutorial", "--tokenizer", "word", "--seq-len", "8", "--sample-tokens", "3", "--device", "cpu"]

Here = Callable[..., tuple[int, str, str]]  # what the fixture `here` gives


def small(**changes: Any) -> TrainConfig:
    """Return the config of the article's model on words, which learns TEXT in some dozen steps."""
    values = {"preset": "tutorial", "tokenizer": "word", "steps": 40, "seq_len": 8, "lr": 1e-2, "sample_tokens": 3}
    values["device"] = "cpu"  # where there is a GPU, too
    return TrainConfig.from_preset(**{**values, **changes})


def untrained_run(folder: Path, kind: str) -> Path:
    """Make the folder of a causal model on FOX that was never trained, with two checkpoints."""
    tokenizer = train_tokenizer(kind, [FOX], 300 if kind == "bpe" else None)
    torch.manual_seed(0)
    config = SimpleLLMConfig(tokenizer.vocab_size, 8, 16, 1, causal=True, max_seq_len=16)
    model = SimpleLLM.from_config(config)
    for step in (10, 20):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_model(model, checkpoint)
        (checkpoint / "state.json").write_text(json.dumps({"best_step": 10}))
    save_config({"model": config.to_dict(), "training": {}}, folder)
    tokenizer.save(folder / "tokenizer.json")
    save_model(model, folder)
    metrics = {"step": 1, "split": "train", "loss": 10.0, "lr": 1e-3, "tokens_per_s": 1000.0, "elapsed_s": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": "a", "text": "b"}) + "\n")
    return folder


def losses(out: Path, split: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if line["split"] == split]


def tokens(out: Path, split: Split = "train") -> Path:
    """Return the file of tokens that a run learns from."""
    (path,) = getattr(open_shards(out / DATA), split)
    return Path(path)


def history(out: Path) -> list[tuple[Any, ...]]:
    """All of the metrics but the times."""
    keys = ("step", "split", "loss", "lr", "grad_norm", "skipped")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(out / "metrics.jsonl")]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds the package where this one does."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tinyllm", *map(str, arguments)]


def tinyllm(*arguments: object, cwd: Path, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which others may be started from."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**more), capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def error(done: tuple[int, str, str]) -> str:
    """Return the one line of a refusal, which may follow a progress bar."""
    status, _, err = done
    assert status == 2, err
    (line,) = [line for line in err.splitlines() if line and not line.startswith("tokenizing: ")]
    assert line.startswith("tinyllm: error: ")
    return line
