"""The first block of docs/training.md runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import commands
from tests.helpers.runs import ROOT, environment
from tinyllm._internal.cpus import usable_cpus

FIRST = commands((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("```console")[1].split("```")[0])


@pytest.mark.skipif(usable_cpus() < 2, reason="needs two cores")
def test_the_first_block_runs_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "tinyllm"  # the command, also where the package is not installed
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinyllm "$@"\n')
    script.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(FIRST)],
        cwd=folder,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming runs/two after step 60" in done.stdout
    assert "bits per byte" in done.stdout
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert re.search(r"averaged .*finished", done.stdout)
