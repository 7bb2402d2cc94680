"""Checks every backend that says it serves an operator, each in a process of its own: `tinyllm check`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import torch

from tinyllm import ops
from tinyllm._internal.cpus import usable_cpus
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cpp

PASSED, FAILED, HUNG, NOT_HERE = "passed", "FAILED", "HUNG", "not here"
QUICK_CALLS, FULL_CALLS = 6, 60  # in each dtype
LIMIT_S = 90.0  # for a call: on a GPU Triton compiles its kernels first


@dataclass(frozen=True)
class Check:
    """One operator on one backend.

    Attributes:
        isa: the instruction set of the CPU kernels, where it is not the one in use.
        not_here: why the backend does not serve the operator on this machine.
    """

    operator: str
    backend: str
    device: str
    isa: str | None = None
    not_here: str | None = None

    @property
    def where(self) -> str:
        return f"{self.backend} {self.isa}" if self.isa else self.backend


@dataclass(frozen=True)
class Outcome:
    """Outcome of a check: PASSED, FAILED, HUNG or NOT_HERE, and the details."""

    check: Check
    result: str
    text: str


def plan(device: str | None = None, full: bool = False) -> list[Check]:
    """Return the checks of a device type, by default of both.

    Args:
        device: "cpu" or "cuda". Emulated CUDA C++ kernels and interpreted Triton kernels count as the CPU's.
        full: the CPU kernels with every instruction set that this processor has, not only with the one in use.

    Raises:
        ValueError: device is neither, or "cuda" where there is no GPU.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; cpu or cuda is needed")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here")
    return [
        check
        for device_type in ("cpu", "cuda")
        if device in (None, device_type)
        for backend in dispatch.BACKENDS
        if backend != "reference"  # which the others are compared with
        for operator in dispatch.OPERATORS
        for check in _checks(operator, backend, device_type, full)
    ]


def _checks(operator: str, backend: str, device: str, full: bool) -> Iterator[Check]:
    with ops.backend(backend):  # what an emulation serves, it serves where it is forced
        not_here = dispatch.unavailable(backend, operator, device)
    if not_here is not None and not_here.startswith("it serves ") and " tensors" in not_here:
        return  # a backend of another device
    if device == "cuda" and not torch.cuda.is_available():
        not_here = "there is no GPU"
    isas: list[str | None] = [None]
    if backend == "cpp" and cpp.library is not None:
        isas = list(cpp.library.usable_isas()) if full else [cpp.library.cpu_isa()]
    for isa in isas:
        yield Check(operator, backend, device, isa, not_here)


def run(checks: list[Check], full: bool = False, limit_s: float = LIMIT_S) -> Iterator[Outcome]:
    """Yield the outcome of each check, in their order.

    Args:
        limit_s: seconds after which a call counts as hung and its process is ended; as long may the process take to
            start.
    """
    calls, running = FULL_CALLS if full else QUICK_CALLS, set[subprocess.Popen[bytes]]()
    # On a GPU one process after the other: where one hangs, the others would wait with it.
    for device, at_once in (("cpu", max(1, min(8, usable_cpus()))), ("cuda", 1)):
        with ThreadPoolExecutor(at_once) as pool:
            chosen = [check for check in checks if check.device == device]
            try:
                yield from pool.map(lambda check: _outcome(check, calls, limit_s, running), chosen)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    _end(process)
                raise


def _outcome(check: Check, calls: int, limit_s: float, running: set[subprocess.Popen[bytes]]) -> Outcome:
    if check.not_here is not None:
        return Outcome(check, NOT_HERE, check.not_here)
    command = [sys.executable, "-m", "tinyllm.check.worker", check.operator, check.backend, check.device, str(calls)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if check.device == "cpu":  # two threads, for what may go wrong between threads
        environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    if check.isa is not None:
        environment["TINYLLM_CPU_ISA"] = check.isa
    # Into files: a process that a kernel holds may not end when it is killed, and nobody must wait for its pipes.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        running.add(process)
        status = _wait(process, out, limit_s)
        running.discard(process)
        if status is None:
            _end(process)
        said, errors = _said(out), [line for line in _text(err).splitlines() if line.strip()]
    last = said[-1] if said else {}
    at = f" in {last['call']}" if "call" in last else ""
    if status is None:
        return Outcome(check, HUNG, f"not done after {limit_s:g} s, ended{at}")
    if status == 0 and "worst" in last:
        return Outcome(check, PASSED, f"{last['calls']} calls, largest error {last['worst']:.0%} of what is allowed")
    if "wrong" in last:
        return Outcome(check, FAILED, last["wrong"])
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return Outcome(check, FAILED, f"{how}{at}{': ' + errors[-1] if errors else ''}")


def _wait(process: subprocess.Popen[bytes], out: IO[str], limit_s: float) -> int | None:
    """Return the exit status, or None once the process has written nothing for `limit_s` seconds."""
    size, since = 0, time.monotonic()
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            now = os.fstat(out.fileno()).st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > limit_s:
                return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and the compilers that it started."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)  # not for ever: a driver may hold it


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _said(file: IO[str]) -> list[dict[str, Any]]:
    """Return the worker's lines, of which the last may be incomplete."""
    lines: list[dict[str, Any]] = []
    for line in _text(file).splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
