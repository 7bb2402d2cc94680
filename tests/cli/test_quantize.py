"""Tests of the command quantize, and of the folders that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import FOX, Here

pytestmark = pytest.mark.usefixtures("one_thread")

WRITE = ["generate", "--run", "run", "--prompt", "the fox", "--max-new-tokens", 5, "--seed", 1]


def quantised(here: Here, run: Path, out: Path, *options: object) -> dict[str, Any]:
    """Have `tinyllm quantize` write `out`; return its config.json."""
    assert here("quantize", "--run", run, "--out", out, *options)[0] == 0
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_quantised_run_writes(run: Path, here: Here, tmp_path: Path, weights: str) -> None:
    out = tmp_path / weights
    (tmp_path / "held.txt").write_text(FOX * 3)
    held_out = ["--data", tmp_path / "held.txt"]
    status, shown, err = here("quantize", "--run", run, "--weights", weights, "--out", out, *held_out)
    assert (status, err) == (0, "")
    found = re.fullmatch(r"perplexity  ([\d.]+) before, ([\d.]+) after: [-+][\d.]+ %\nweights .*\n", shown)
    assert found is not None
    assert float(found[2]) <= float(found[1]) * (1.03 if weights == "int4" else 1.001)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    by_file = here(*WRITE, "--run", out)
    by_option = here(*WRITE, "--weights", weights, cwd=tmp_path)
    assert by_file[0] == by_option[0] == 0
    assert by_file[1] == by_option[1]
    again = here("quantize", "--run", run, "--weights", weights, "--out", out)
    assert again[0] == 2
    assert "is not empty" in again[2]
    other = "int8" if weights == "int4" else "int4"
    status, _, err = here(*WRITE, "--run", out, "--weights", other)
    assert status == 2
    assert f"weights is {other!r}; {out} has them as {weights!r} already" in err


def test_a_quantised_run_that_is_damaged(run: Path, here: Here, tmp_path: Path) -> None:
    out = tmp_path / "small"
    config = quantised(here, run, out, "--weights", "int8")
    for change, reason in (
        ({"weights": "int4"}, "are stored as 'int8'; its config.json says 'int4'"),
        ({"group_size": 128}, "share a scale in groups of 64; its config.json says 128"),
        ({"model": config["model"] | {"embedding_dim": 2 * config["model"]["embedding_dim"]}}, "are not those of its"),
        ({"model": config["model"] | {"num_layers": 5}}, "are not those of its config.json"),
    ):
        (out / "config.json").write_text(json.dumps(config | change))
        status, _, err = here(*WRITE, "--run", out)
        assert status == 2
        assert reason in err
    (out / "config.json").write_text(json.dumps(config))
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    status, _, err = here(*WRITE, "--run", out)
    assert status == 2
    assert "is not a safetensors file, or is truncated" in err
    for weights in ("float32", "int3"):
        status, _, err = here("quantize", "--run", run, "--weights", weights, "--out", tmp_path / "none")
        assert status == 2
        assert f"weights is {weights!r}; allowed are bf16, int8, int4" in err
    assert not (tmp_path / "none").exists()


def test_the_config_says_what_it_was_made_from(run: Path, here: Here, tmp_path: Path) -> None:
    (run / "config.json").write_text(
        json.dumps(json.loads((run / "config.json").read_text()) | {"training": {"preset": "tiny"}})
    )
    config = quantised(here, run, tmp_path / "a", "--weights", "int4", "--checkpoint", 10)
    assert (config["weights"], config["group_size"]) == ("int4", 64)
    assert config["made_from"] == {"run": str(run), "checkpoint": 10, "preset": "tiny"}
    config = quantised(here, run, tmp_path / "b", "--weights", "bf16")
    assert (config["weights"], config["group_size"], config["made_from"]["checkpoint"]) == ("bf16", None, "last")
    for name in ("group_size", "made_from"):  # which folders of earlier versions do not have
        del config[name]
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert here(*WRITE, "--run", tmp_path / "b")[0] == 0


def test_runs_lists_it(run: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"training": {"preset": "tiny", "steps": 20}}))
    assert "weights" not in here("runs", ".", cwd=tmp_path)[1]
    quantised(here, run, tmp_path / "small", "--weights", "int8")
    status, out, err = here("runs", ".", "--sort", "name")
    assert (status, err) == (0, "")
    rows = [row.split() for row in out.splitlines()]
    assert rows[0][:4] == ["run", "preset", "weights", "parameters"]
    assert rows[1][:3] == ["run", "tiny", "float32"]
    assert rows[2][:3] + rows[2][-1:] == ["small", "tiny", "int8", "quantised"]
    assert rows[1][3] == rows[2][3]
    first, second = json.loads(here("runs", ".", "--sort", "name", "--json")[1])
    assert (first["weights"], second["weights"], second["state"], second["steps"]) == (
        "float32",
        "int8",
        "quantised",
        None,
    )
    (tmp_path / "small" / "model.safetensors").unlink()
    assert "small is broken: small has no model.safetensors" in here("runs", "small")[1]
