"""Stopping at any moment, and going on: bit for bit, on other devices, and not at all if something is amiss."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import RUN, TEXT, history, small, tokens
from tinyllm.config import files
from tinyllm.config.saved import read_config
from tinyllm.config.training import RESUMABLE, TrainConfig
from tinyllm.data.batches import TokenDataset
from tinyllm.runs.folder import best_step, checkpoint_path, checkpoints
from tinyllm.runs.load import load_model, load_run
from tinyllm.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that has a state: dropout, averages, a schedule, a mean over steps that a checkpoint cuts in two.
STATEFUL: dict[str, Any] = {"preset": "tiny", "optimizer": "adamw", "lr": 2e-3, "dropout": 0.1, "ema": 0.9, "steps": 24}
STATEFUL |= {"eval_interval": 8, "checkpoint_interval": 3, "log_interval": 5, "keep_checkpoints": 99}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small(**STATEFUL), out, [text], progress=False)
    return out


def stopped(whole: Path, out: Path, step: int) -> Path:
    """Train as before, and leave what a kill some time after the checkpoint of `step` would leave."""
    shutil.copytree(whole, out)
    for later, path in checkpoints(out).items():
        if later > step:
            shutil.rmtree(path)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "split": "tr')
    leftover = checkpoint_path(out, step + 1).with_name(f".step-{step + 1:08d}.tmp")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    return out


def assert_same(out: Path, whole: Path) -> None:
    assert history(out) == history(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("model.safetensors", *(f"checkpoints/step-00000024/{file}" for file in ("optimizer.safetensors",))):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    states = [json.loads((run / "checkpoints/step-00000024/state.json").read_text()) for run in (out, whole)]
    assert states[0] == states[1]


@pytest.mark.parametrize("step", [3, 6, 8, 21])
def test_a_resumed_training_is_bit_for_bit_the_same(step: int, whole: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", step)
    said: list[str] = []
    result = resume(out, progress=False, say=said.append)
    assert f"Resuming {out} after step {step}" in said
    assert result.steps == 24
    assert_same(out, whole)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 2, "precision": "bf16-true", "preset": "tutorial"},
        {"optimizer": "muon", "micro_batches": 2},
        {"optimizer": "muon", "precision": "bf16-true"},
    ],
)
def test_other_ways_of_training_resume_too(changes: dict[str, Any], text: Path, tmp_path: Path) -> None:
    options = {**STATEFUL, **changes}
    train(small(**options), tmp_path / "whole", [text], progress=False)
    out = stopped(tmp_path / "whole", tmp_path / "run", 9)
    resume(out, progress=False)
    assert_same(out, tmp_path / "whole")


def test_a_run_that_names_no_optimizer_is_adamws(whole: Path, tmp_path: Path) -> None:
    """Older versions had no other."""
    out = stopped(whole, tmp_path / "run", 9)
    saved = json.loads((out / "config.json").read_text())
    assert saved["training"].pop("optimizer") == "adamw"
    (out / "config.json").write_text(json.dumps(saved))
    assert files.load(out / "config.json")["optimizer"] == "adamw"
    resume(out, progress=False)
    assert_same(out, whole)
    with pytest.raises(ValueError, match=r"optimizer is 'muon', but the training in .* has 'adamw'"):
        resume(out, progress=False, optimizer="muon")


def test_without_a_checkpoint_it_starts_anew(whole: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 0)
    with pytest.raises(ValueError, match="has weights but no checkpoint to go on from"):
        resume(out, progress=False)
    (out / "model.safetensors").unlink()
    said: list[str] = []
    resume(out, progress=False, say=said.append)
    assert any("from the start" in line for line in said)
    assert_same(out, whole)


def test_a_signal_and_a_resume(whole: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    from tinyllm.model import SimpleLLM

    real, calls = SimpleLLM.loss, []

    def loss(self, *args, **options):
        calls.append(self.training)
        if sum(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(SimpleLLM, "loss", loss)
    out = tmp_path / "run"
    assert train(small(**STATEFUL), out, [text], progress=False).steps == 13
    assert max(checkpoints(out)) == 13
    resume(out, progress=False)
    # The stop wrote a line of metrics of its own, so only the weights can be compared.
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def _go_on(text: Path, out: Path) -> None:
    torch.set_num_threads(1)
    if (out / "config.json").exists():
        resume(out, progress=False)
    else:
        train(small(**STATEFUL), out, [text], overwrite=True, progress=False)


def test_sigkill_at_any_moment_loses_nothing(whole: Path, text: Path, tmp_path: Path) -> None:
    """Killed 20 times: what has a checkpoint's name is whole each time, and the end is bit for bit the same."""
    out = tmp_path / "run"
    draw = random.Random(0)
    fork = multiprocessing.get_context("fork")
    kills = 0
    last = 0
    while kills < 20:
        process = fork.Process(target=_go_on, args=(text, out))
        process.start()
        process.join(draw.uniform(0.05, 0.6))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        there = checkpoints(out)
        assert max(there, default=0) >= last  # none is lost
        last = max(there, default=0)
        for path in there.values():
            names = {"model.safetensors", "averages.safetensors", "optimizer.safetensors", "state.json"}
            assert {file.name for file in path.iterdir()} == names
        if there:
            load_run(out)
        if last == 24:  # done already: begin again, until it has been killed often enough
            shutil.rmtree(out)
            last = 0
    process = fork.Process(target=_go_on, args=(text, out))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_same(out, whole)


# Checkpoints


def test_the_last_ones_and_the_best_one_stay(text: Path, tmp_path: Path, monkeypatch) -> None:
    from tinyllm.training import loop

    found = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(loop, "evaluate", lambda *args: (next(found), 1))
    out = tmp_path / "out"
    train(small(steps=10, eval_interval=2, checkpoint_interval=1), out, [text], progress=False)
    assert list(checkpoints(out)) == [4, 9, 10]
    assert best_step(out) == 4
    weights = {which: load_model(out, checkpoint=which).output.weight for which in ("best", 4, 9, 10, "last")}
    assert torch.equal(weights["best"], weights[4])
    assert torch.equal(weights["last"], weights[10])
    assert not torch.equal(weights[4], weights[9])
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; those there are of the steps 4, 9, 10"):
        load_model(out, checkpoint=5)


def test_the_runs_weights_are_no_second_copy(whole: Path) -> None:
    assert os.path.samefile(whole / "model.safetensors", checkpoint_path(whole, 24) / "averages.safetensors")


# What does not fit


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preset": "small"}, "preset is 'small', but the training in .*run has 'tiny'; a resumed training may change"),
        ({"seq_len": 9}, "seq_len is 9, but"),
        ({"lr": 1.0}, "lr is 1.0, but"),
        ({"ema": 0.5}, "ema is 0.5, but"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"strategy": "pipeline"}, "strategy is 'pipeline'; allowed are 'auto', 'ddp', 'fsdp', 'deepspeed'"),
    ],
)
def test_changes_that_would_make_it_another_training(changes: dict[str, Any], reason: str, whole: Path) -> None:
    before = read_config(whole)
    with pytest.raises(ValueError, match=reason):
        resume(whole, progress=False, **changes)
    assert read_config(whole) == before


def test_what_may_change_may(whole: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 21)
    result = resume(out, progress=False, steps=26, sample_tokens=1, lr=2e-3, preset="tiny", eval_interval=None)
    assert result.steps == 26
    assert read_config(out)["training"]["steps"] == 26
    assert set(TrainConfig.__dataclass_fields__) >= RESUMABLE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimizer.safetensors", "optimizer.safetensors cannot be read, or is truncated"),
        ("model.safetensors", "model.safetensors cannot be read, or is truncated"),
        ("state.json", "state.json cannot be read, or is not the state of a training"),
    ],
)
def test_a_damaged_checkpoint_is_named(name: str, reason: str, whole: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 21)
    path = checkpoint_path(out, 21) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=reason):
        resume(out, progress=False)


def test_a_checkpoint_of_another_model(whole: Path, text: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 21)
    train(small(steps=21), tmp_path / "other", [text], progress=False)
    shutil.rmtree(checkpoint_path(out, 21))
    shutil.copytree(checkpoint_path(tmp_path / "other", 21), checkpoint_path(out, 21))
    with pytest.raises(ValueError, match=r"step-00000021.*(has no|is \[)"):
        resume(out, progress=False)


def test_no_run_and_no_data(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        resume(tmp_path / "nowhere", progress=False)
    out = stopped(whole, tmp_path / "run", 21)
    tokens(out).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*train-00000-head\.bin"):
        resume(out, progress=False)
    shutil.rmtree(out / "data")
    with pytest.raises(FileNotFoundError, match=r"data holds no prepared data"):
        resume(out, progress=False)


def test_overwriting_a_run_removes_its_checkpoints(whole: Path, text: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 21)
    train(small(steps=2), out, [text], overwrite=True, progress=False)
    assert list(checkpoints(out)) == [2]
    assert set(os.listdir(out)) == RUN
    assert len(TokenDataset(tokens(out), load_run(out).tokenizer.vocab_size, 8)) > 0


def test_time_goes_on(whole: Path, tmp_path: Path) -> None:
    out = stopped(whole, tmp_path / "run", 21)
    time.sleep(0.01)
    resume(out, progress=False)
    elapsed = [json.loads(line)["elapsed_s"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert elapsed == sorted(elapsed)
