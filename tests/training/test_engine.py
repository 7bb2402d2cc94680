"""Several processes: the same losses as one, whatever shares the work; and what is said when they cannot start."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.runs import TEXT, command, environment, losses, small, tinyllm
from tinyllm._internal.cpus import usable_cpus
from tinyllm.config.training import TrainConfig
from tinyllm.runs.folder import checkpoint_path, checkpoints
from tinyllm.runs.load import load_run
from tinyllm.training import engine
from tinyllm.training.engine import deepspeed_config, launch
from tinyllm.training.trainer import resume

pytestmark = pytest.mark.skipif(usable_cpus() < 2, reason="needs two cores")

SETTINGS = ["--tokenizer", "bpe", "--vocab-size", 300, "--steps", 8, "--seq-len", 16, "--batch-size", 8, "--ema", 0.9]
SETTINGS += ["--eval-interval", 4, "--sample-tokens", 3, "--lr", 2e-3, "--optimizer", "adamw"]
MUON = [*SETTINGS[:-1], "muon"]
TWO = ["--devices", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine")
    (path / "text.txt").write_text(TEXT)
    tinyllm("train", "text.txt", *SETTINGS, "--out", "one", cwd=path)
    return path


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> Path:
    """Train with FSDP on two processes that torchrun starts, in micro-batches, so that gradients accumulate."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tinyllm"]
    arguments = ["train", "text.txt", *SETTINGS, *TWO, "--strategy", "fsdp", "--micro-batches", 2, "--out", "two"]
    done = subprocess.run(
        [*launcher, *map(str, arguments)], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 processes, cpu" in done.stdout
    assert done.stdout.count("Tokenizer:") == 1  # one speaks for all
    assert done.stdout.count("A sample") == 1
    return folder / "two"


def assert_same_losses(out: Path, one: Path) -> None:
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    assert losses(out, "val") == pytest.approx(losses(one, "val"), rel=1e-5)
    weights, expected = (load_file(checkpoint_path(run, 8) / "model.safetensors") for run in (out, one))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, of which Adam makes steps
            torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-4)


def test_fsdp_is_one_process(folder: Path, fsdp: Path) -> None:
    assert_same_losses(fsdp, folder / "one")
    states = [load_file(checkpoint_path(run, 8) / "optimizer.safetensors") for run in (fsdp, folder / "one")]
    assert {name: value.shape for name, value in states[0].items()} == {
        name: value.shape for name, value in states[1].items()
    }
    texts = [[json.loads(line)["text"] for line in (run / "samples.jsonl").open()] for run in (fsdp, folder / "one")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("origin", "options"), [("fsdp", []), ("one", [*TWO, "--strategy", "fsdp"])])
def test_a_training_goes_on_with_other_devices(
    origin: str, options: list[object], folder: Path, fsdp: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(fsdp if origin == "fsdp" else folder / "one", out)
    shutil.rmtree(checkpoint_path(out, 8))
    if options:
        tinyllm("train", "--resume", out, *options, cwd=tmp_path)
    else:
        result = resume(out, progress=False, devices=1, strategy="auto", micro_batches=1)
        assert result.steps == 8
    assert_same_losses(out, folder / "one")
    assert load_run(out).model.num_parameters() > 0


@pytest.fixture(scope="module")
def muon(folder: Path) -> Path:
    tinyllm("train", "text.txt", *MUON, "--out", "muon", cwd=folder)
    return folder / "muon"


@pytest.mark.parametrize("options", [["--strategy", "ddp"], ["--strategy", "fsdp", "--micro-batches", 2]])
def test_muon_on_two_processes_is_one(options: list[object], folder: Path, muon: Path, tmp_path: Path) -> None:
    tinyllm("train", "text.txt", *MUON, *TWO, *options, "--out", tmp_path / "two", cwd=folder)
    assert_same_losses(tmp_path / "two", muon)
    names = [load_file(checkpoint_path(run, 8) / "optimizer.safetensors") for run in (tmp_path / "two", muon)]
    assert {name: value.shape for name, value in names[0].items()} == {
        name: value.shape for name, value in names[1].items()
    }
    shutil.rmtree(checkpoint_path(tmp_path / "two", 8))
    resume(tmp_path / "two", progress=False, devices=1, strategy="auto", micro_batches=1)
    assert_same_losses(tmp_path / "two", muon)


def test_ddp_on_two_nodes_is_one_process(folder: Path) -> None:
    """Each machine runs the same command, and is told its number and where the first one is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = command("train", "text.txt", *SETTINGS, "--num-nodes", 2, "--out", "nodes")
    nodes = [
        subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[1][0] == f"Node 1 of 2: waiting for 1 other node at 127.0.0.1:{port}\n"  # one speaks for all else
    assert_same_losses(folder / "nodes", folder / "one")


def test_the_connection_is_closed_before_a_process_exits(folder: Path, tmp_path: Path) -> None:
    """Threads of gloo that run while Python takes itself down have crashed a training that was done."""
    script = f"""
import atexit
import torch.distributed as dist
from tinyllm import TrainConfig, train

atexit.register(lambda: print("open" if dist.is_initialized() else "closed"))  # the last one to be called
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = TrainConfig.from_preset("tutorial", tokenizer="char", steps=1, seq_len=8, batch_size=1, device="cpu")
train(config, {str(tmp_path / "run")!r}, ["text.txt"], progress=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "closed"


def test_sigterm_to_the_first_process_stops_all(folder: Path) -> None:
    out = folder / "stopped"
    process = subprocess.Popen(
        command("train", "text.txt", *SETTINGS, "--steps", 100_000, *TWO, "--out", out),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not checkpoints(out) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)  # both hold the pipe: it ends when both have
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "Interrupted: the model is saved" in stdout
    assert max(checkpoints(out)) == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_an_error_in_the_first_process_is_said_once(folder: Path) -> None:
    done = tinyllm("train", "nowhere.txt", *TWO, "--batch-size", 2, cwd=folder, status=2)
    assert done.stderr.count("tinyllm: error: there is no file or directory nowhere.txt") == 1
    assert done.stderr.count("\n") == 1


# What cannot start


@pytest.mark.parametrize(
    ("changes", "variables", "reason"),
    [
        ({"devices": 999, "batch_size": 999}, {}, r"devices is 999, but this machine has \d+ cores"),
        ({"devices": 2, "batch_size": 3}, {}, "batch_size is 3; it must be divisible by .* 1 x 2 x 1"),
        ({"strategy": "pipeline"}, {}, "strategy is 'pipeline'; allowed are 'auto', 'ddp', 'fsdp', 'deepspeed'"),
        (
            {"strategy": "deepspeed", "optimizer": "muon"},
            {},
            "optimizer is 'muon', .* take 'adamw', or .* 'ddp' and 'fsdp'",
        ),
        ({"precision": "8"}, {}, "precision is '8'; allowed are '32-true', 'bf16-mixed', 'bf16-true'"),
        ({"devices": 1}, {"WORLD_SIZE": "2"}, "devices x num_nodes is 1 x 1, but the launcher started 2 processes"),
        ({"device": "cuda:99"}, {}, "device is 'cuda:99', but torch sees"),
        ({"num_nodes": 0}, {}, "num_nodes is 0; it must be at least 1"),
    ],
)
def test_what_cannot_start_says_why(
    changes: dict[str, Any], variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        launch(small(**changes))


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="devices is 4, but this machine has 2 CUDA devices"):
        launch(small(device="cuda", devices=4))
    with pytest.raises(ValueError, match="devices is 2, but device names one, 'cuda:1'"):
        launch(small(device="cuda:1", devices=2))


@pytest.mark.parametrize(("installed", "reason"), [(False, r"tinyllm\[deepspeed\]"), (True, "CUDA devices only")])
def test_deepspeed_where_it_cannot_run(installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ValueError, match=reason):
        launch(small(strategy="deepspeed"))


def test_deepspeeds_own_settings() -> None:
    config = TrainConfig(strategy="deepspeed", batch_size=48, devices=4, micro_batches=3, grad_clip=0.5)
    settings = deepspeed_config(config)
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2


# Lightning and DeepSpeed run on a CPU, but Lightning does not let them: the checks that forbid it are taken away.
ON_CPU = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.comm.torch
import torch
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import deepspeed
from tinyllm.training import engine
from tinyllm.__main__ import main

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # faster sums between processes, built for a minute
deepspeed.CUDAAccelerator = CPUAccelerator
deepspeed._validate_device_index_selection = lambda devices: None
deepspeed.DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", self.local_rank))
engine._check_devices = lambda config, device: None
main()
"""


def test_deepspeed_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    program = tmp_path / "program.py"
    program.write_text(ON_CPU)
    first = ["train", "text.txt", *SETTINGS, *TWO, "--strategy", "deepspeed", "--micro-batches", 2, "--out", "deep"]
    out = folder / "deep"
    for arguments in (first, ["train", "--resume", out]):
        done = subprocess.run(
            [sys.executable, str(program), *map(str, arguments)],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert_same_losses(out, folder / "one")
        assert (checkpoint_path(out, 8) / "deepspeed").is_dir()
        if arguments is first:
            shutil.rmtree(checkpoint_path(out, 8))
    with pytest.raises(ValueError, match="was written by strategy 'deepspeed', and has to be taken up by it"):
        resume(out, progress=False, strategy="auto", devices=1, micro_batches=1)
