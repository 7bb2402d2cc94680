"""The benchmark of models before and after optimize: its rows, and the command."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, optimizing, report

from .made_up import FACTS


def test_rows_have_the_ratios_to_the_model_before() -> None:
    times = {optimizing.PLAIN: 0.4, "tinyllm": 0.1, "tinyllm, int8": 0.05}

    def fails() -> float:
        raise RuntimeError("no compiler\nwhich has more to say")

    case = optimizing.Case(
        "A model writes",
        {**{name: lambda name=name: times[name] for name in times}, optimizing.COMPILED: fails},  # type: ignore[misc]
        ("float32", "int8"),
    )
    rows = optimizing.rows_of(case, 3)
    assert [(row["benchmark"], row["provider"]) for row in rows] == [
        (f"A model writes, {weights} weights", provider)
        for weights in ("float32", "int8")
        for provider in ("tinyllm", optimizing.PLAIN, optimizing.COMPILED)
    ]
    assert [row["ratios"] for row in rows if "ratios" in row] == [{"transformers": 4.0}, {"transformers": 8.0}]
    assert [row["failed"] for row in rows if "failed" in row] == ["RuntimeError: no compiler"] * 2
    assert all(row["median_s"] > 0 for row in rows if "failed" not in row)


@pytest.mark.parametrize("kind", ["training", "reading", "writing"])
def test_cases_compare_the_same_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_head=2, n_layer=1, n_positions=40, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    monkeypatch.setattr(optimizing, "NEW", 3)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    ids = torch.randint(60, (2, 9))
    if kind == "training":
        case = optimizing.training("trains", model.train(), ids)
    elif kind == "reading":
        case = optimizing.inference("reads", model.eval(), {"input_ids": ids})
    else:
        case = optimizing.writing("writes", model.eval(), ids)
        del case.sides[optimizing.COMPILED]
    rows = optimizing.rows_of(case, 2)
    assert sum(row["provider"] == "tinyllm" for row in rows) == len(case.weights)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_computes_something_else_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="an optimized model differs by 1"):
        optimizing.check(torch.ones(3), 2 * torch.ones(3))


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = optimizing.Case("BERT reads", {optimizing.PLAIN: lambda: 0.3, "tinyllm": lambda: 0.2})
    monkeypatch.setattr(optimizing, "cases", lambda: [case])
    assert optimizing.main(["--here", "--quick"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    statuses = [3, 0]

    def run(command: list[str], **options: Any) -> Any:
        assert options["env"]["OMP_NUM_THREADS"] == str(optimizing.usable_cpus())
        return subprocess.CompletedProcess(command, statuses.pop(), json.dumps(rows))

    monkeypatch.setattr(machine, "describe", lambda: copy.deepcopy(FACTS))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IN_REPOSITORY", False)
    monkeypatch.setattr(subprocess, "run", run)
    assert optimizing.main([]) == 0
    stored = json.loads((tmp_path / "optimize" / "abacus.json").read_text(encoding="utf-8"))
    assert report.kind_of(stored) == "optimize"
    assert "| BERT reads | 200 ms ±0% | 300 ms ±0%, **1.50x** |" in capsys.readouterr().out
    assert "| BERT reads | 1.50x |" in report.render_optimize()
    assert optimizing.main([]) == 2
    assert "error: the process that measures has ended with 3" in capsys.readouterr().err
