"""The benchmark of guesses: it writes the given text, and counts what that takes."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import guesses, machine, report
from tests.helpers.needs import needs_extension
from tinyllm.model import SimpleLLM

from .made_up import FACTS


@needs_extension
def test_guesses_are_right_as_often_as_the_text_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "PROMPT", 12)
    monkeypatch.setattr(guesses, "NEW", 10)
    monkeypatch.setattr(guesses, "MOST", (0, 4))
    torch.manual_seed(0)
    model = SimpleLLM(50, 16, 32, 1, num_heads=2, causal=True, max_seq_len=40).eval()
    repeated, other = [1, 2, 3] * 9, [*range(27)]
    rows = guesses.rows_of(model, "float32", {"repeated": [repeated, repeated], "other": [other]})
    assert [(row["text"], row["guesses"]) for row in rows] == [(None, 0), ("repeated", 4), ("other", 4)]
    assert all(row["tokens_per_s"] > 0 and row["weights"] == "float32" for row in rows)
    assert [row.get("tokens_a_pass") for row in rows] == [None, 4.5, 1.0]  # 5 tokens and 4; one at a time


def test_texts_are_long_enough_and_edited_code_repeats_itself() -> None:
    found = guesses.texts()
    assert [len(texts) for texts in found.values()] == [guesses.EXCERPTS] * 3
    assert all(len(text) > 3000 for texts in found.values() for text in texts)
    for text in found["edited code"]:
        before, after = text[: len(text) // 2 - 1], text[len(text) // 2 + 1 :]
        assert before != after == before.replace("self", "this")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": None, "weights": "int8", "guesses": 0, "tokens_per_s": 50.0},
        {"text": "code", "weights": "int8", "guesses": 3, "tokens_per_s": 60.0, "tokens_a_pass": 1.25},
    ]
    rows = [{"section": "guesses", "provider": "tinyllm", **row} for row in rows]
    made: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        assert options["env"]["OMP_NUM_THREADS"] == str(guesses.usable_cpus())
        return subprocess.CompletedProcess(command, statuses.pop(), json.dumps(rows))

    monkeypatch.setattr(machine, "describe", lambda: copy.deepcopy(FACTS))
    monkeypatch.setattr(guesses, "make_model", lambda model, folder: made.append("model"))
    monkeypatch.setattr(guesses, "convert_tinyllm", lambda folder, weights: made.append(weights))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IN_REPOSITORY", False)
    monkeypatch.setattr(subprocess, "run", run)
    statuses = [3, 0]
    assert guesses.main([]) == 0
    assert made == ["model", "float32", "bf16", "int8", "int4"]
    stored = json.loads((tmp_path / "guesses" / "abacus.json").read_text(encoding="utf-8"))
    assert report.kind_of(stored) == "guesses"
    said = capsys.readouterr().out
    assert "|  | none | at most 3 |" in said
    assert "| code, int8 | 50.0 | 60.0, 1.25 tokens a pass, **1.20x** |" in said
    assert report.render_tables(stored) in said
    assert guesses.main([]) == 2
    assert "error: the process that measures has ended with 3" in capsys.readouterr().err
