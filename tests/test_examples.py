"""The examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_article(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "article.py")],
        cwd=tmp_path,  # not the repository: what runs is the installed package
        capture_output=True,
        text=True,
        timeout=120,
        # Sums this short gain nothing from threads, which only wait for each other on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    rows = [re.fullmatch(r"Epoch (\d+), Loss: (\d+\.\d+(?:e-\d+)?)", line) for line in table]
    assert all(rows), done.stdout
    epochs = [int(row[1]) for row in rows if row]
    losses = [float(row[2]) for row in rows if row]
    assert epochs == list(range(0, 100, 10))
    assert losses[0] > 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05
    assert last == "Input: hello world how, Predicted: are"
