"""benchmarks/gpu_check.sh where there is no GPU: it reaches its tables, and survives a stage that fails."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script measures, for minutes")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.sh"


def run(out: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(out), "--quick", "--only-bench"],
        cwd=out.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHON": python, "TINYLLM_COMMIT": "c0ffee"},
        check=False,
    )


def test_every_row_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run(tmp_path / "out", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "machine.json", "tests.txt"}
    results = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert results["gpu"] is None
    assert results["rows"]
    assert {row["failed"] for row in results["rows"]} == {"not measured: no GPU"}
    assert not any("median_s" in row for row in results["rows"])
    machine = json.loads((tmp_path / "out" / "machine.json").read_text(encoding="utf-8"))
    assert machine["commit"] == results["commit"] == "c0ffee"
    assert machine["versions"]["torch"]
    assert done.stdout.count("not measured: no GPU") == sum(row["headline"] for row in results["rows"])


def test_a_stage_that_fails_is_noted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *benchmarks.gpu*) echo a reason; exit 3;; esac\nexec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = run(tmp_path / "out", str(python))
    assert done.returncode == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"machine.json", "tests.txt"}
    machine = json.loads((tmp_path / "out" / "machine.json").read_text(encoding="utf-8"))
    assert machine["stages"][-1].startswith("bench: failed with status 3")
    assert "a reason" in (tmp_path / "out" / "tests.txt").read_text(encoding="utf-8")
