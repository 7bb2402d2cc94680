"""The README's chapter on scaling up: its first block runs as it stands, and the others are commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from tests.helpers.runs import ROOT, environment
from tinyllm.cli import app

CHAPTER = (ROOT / "README.md").read_text(encoding="utf-8").split("## Scale up")[1].split("\n## ")[0]
FIRST, SECOND = re.findall(r"```console\n(.*?)```", CHAPTER, re.DOTALL)


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ") and not line.startswith("$ #")]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_the_first_block_runs_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "tinyllm"  # the command, also where the package is not installed
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinyllm "$@"\n')
    script.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands(FIRST))],
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


@pytest.mark.parametrize("line", commands(SECOND))
def test_the_others_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    start = words.index("tinyllm") + 1
    command, *arguments = words[start:]
    group = typer.main.get_command(app)
    context = group.get_command(None, command).make_context(command, arguments)  # type: ignore[attr-defined]
    assert context.params["preset"]
    batch, parts = context.params["batch_size"], context.params["micro_batches"] or 1
    assert batch % (parts * context.params["devices"] * (context.params["num_nodes"] or 1)) == 0
