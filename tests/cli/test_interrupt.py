"""Ctrl-C at moments at which nothing is to be left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import WORDS, command, environment
from tinyllm.runs.folder import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


# What is being imported when Ctrl-C comes.
@pytest.mark.parametrize("module", ["typer", "torch.nn", "tinyllm.training.loop"])
def test_ctrl_c_while_torch_is_imported(module: str, folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command("train", "text.txt", *WORDS, "--out", "interrupted")[1:]],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(f" {module}"):
            break
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    left = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert process.returncode in (130, -signal.SIGINT)  # the second one may end it at once
    assert left in (["tinyllm: interrupted"], [])
    assert out == ""
    assert not (folder / "interrupted").exists()


def test_a_double_ctrl_c_before_a_checkpoint_leaves_nothing(folder: Path) -> None:
    process = subprocess.Popen(
        command("train", "text.txt", *WORDS, "--steps", "100000", "--out", "twice"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "twice" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if checkpoints(folder / "twice"):  # the two came as one
        assert process.returncode == 130
    else:
        assert process.returncode == 130
        assert err.endswith("tinyllm: interrupted\n")
        assert not (folder / "twice").exists()


def test_ctrl_c_while_several_processes_start(folder: Path) -> None:
    process = subprocess.Popen(
        command("train", "text.txt", *WORDS, "--batch-size", "2", "--devices", "2", "--out", "interrupted"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():  # the second process is there, and imports
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tinyllm: interrupted\n")
    assert not (folder / "interrupted").exists()
