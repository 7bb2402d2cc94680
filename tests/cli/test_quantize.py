"""Tests of the command quantize, and of the folders that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.runs import FOX, Here

pytestmark = pytest.mark.usefixtures("one_thread")

WRITE = ["generate", "--run", "run", "--prompt", "the fox", "--max-new-tokens", 5, "--seed", 1]


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
    assert here("quantize", "--run", run, "--weights", "int8", "--out", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    for change, reason in (
        ({"weights": "int4"}, "are stored as 'int8'; its config.json says 'int4'"),
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
