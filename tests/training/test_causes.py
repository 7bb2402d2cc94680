"""Errors of the libraries below a training, in the words of those who can mend their causes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.runs import small
from tinyllm._internal.locks import LOCK_FILE, owned
from tinyllm.runs.folder import NEW, new_run_folder
from tinyllm.training import engine, trainer


def raise_in_a_training(error: Exception, world_size: int) -> None:
    fabric: Any = SimpleNamespace(device=torch.device("cpu"), world_size=world_size)
    with trainer._naming_causes(small(), 16, fabric):
        raise error


@pytest.mark.parametrize(
    "words",
    [
        "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5534: Connection reset by peer. This is ...",
        "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2",
        "NCCL Error 6: remote process exited or there was a network error",
    ],
)
def test_another_process_that_has_gone(words: str) -> None:
    with pytest.raises(ConnectionError, match="another process of this training has ended"):
        raise_in_a_training(RuntimeError(words), world_size=2)
    with pytest.raises(RuntimeError, match=r"peer|remote"):
        raise_in_a_training(RuntimeError(words), world_size=1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("aoti_torch_empty_strided(...) API call failed at csrc/cpu/tensors.h, line 26"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_memory_that_has_run_out(error: Exception) -> None:
    with pytest.raises(MemoryError, match=r"memory has run out on cpu: training tutorial takes about .* is free now"):
        raise_in_a_training(error, world_size=1)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        raise_in_a_training(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), world_size=2)


def test_a_process_that_dies_before_the_training_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    engine._Launched.listen()
    engine._Launched.listen()  # the second time changes nothing
    logger = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
    logger.info("[rank: 1] Child process with PID 123 terminated with code -9. Forcefully terminating all other ...")
    assert capsys.readouterr().err == "\ntinyllm: error: process 123 of this training has ended (SIGKILL): all do\n"


def test_a_folder_that_a_kill_left_without_a_run_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = tmp_path / "runs" / "tiny-1"
    (left / NEW).mkdir(parents=True)
    (left / NEW / "tokenizer.json").touch()
    (left / LOCK_FILE).touch()
    with owned(left, "trained"), new_run_folder("tiny") as folder:  # somebody is at work there
        assert folder == Path("runs/tiny-2")
    (left / LOCK_FILE).touch()
    with new_run_folder("tiny") as folder:
        assert folder == Path("runs/tiny-1")
        assert not any(folder.iterdir())
