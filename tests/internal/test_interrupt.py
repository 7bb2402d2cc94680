"""Tests of `tinyllm._internal.interrupt`: signals that come before a command, or while a training is at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import environment

STUCK = """
import hashlib
from tinyllm._internal import interrupt
interrupt._PATIENCE = 0.2
with interrupt.noting_signals():
    print("at work", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000_000)  # comes back to Python in a quarter of an hour
"""

SOON = """
import signal, time
from tinyllm._internal import interrupt
interrupt._PATIENCE = 60
try:
    with interrupt.noting_signals() as stop:
        print("at work", flush=True)
        while stop.number is None:
            time.sleep(0.01)
        print("noted", stop.number, flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_end_a_step_that_takes_very_long(number: signal.Signals) -> None:
    process = start(STUCK)
    process.send_signal(number)
    time.sleep(0.2)  # of two at once the system delivers one
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    # Where the first one came before the step, the second one acts as ever.
    assert (process.returncode, err) in [(128 + number, "tinyllm: interrupted\n"), (-number, "")]


def test_a_second_ctrl_c_acts_as_ever() -> None:
    process = start(SOON)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "noted 2\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "cleaned up\n", "")


FORKED = """
import os, signal, time
from tinyllm._internal import interrupt
interrupt._PATIENCE = 0.2
with interrupt.noting_signals() as stop:
    print("at work", flush=True)
    child = os.fork()
    if child == 0:
        time.sleep(60)
    while stop.number is None:
        time.sleep(0.01)
    time.sleep(1)  # as a checkpoint takes
    os.kill(child, signal.SIGKILL)
    print("saved", flush=True)
"""


def test_a_signal_that_others_get_too_counts_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKED],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "saved\n", "")
