"""Tests of the commands train and resume: refusals, full disks, damaged files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import RUN, WORDS, Here, command, environment, history, losses, small, tokens
from tinyllm._internal import memory
from tinyllm._internal.locks import LOCK_FILE
from tinyllm.data.prepare import prepare
from tinyllm.data.shards import SPLITS, Split, file_sha256
from tinyllm.runs.folder import checkpoint_path, checkpoints
from tinyllm.runs.load import load_run
from tinyllm.training import estimate, loop
from tinyllm.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here_with_run(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(result: tuple[int, str, str]) -> str:
    """Return the one line of a command that was refused."""
    status, _, err = result
    assert status == 2, err
    assert err.startswith("tinyllm: error: "), err
    assert err.count("\n") == 1
    return err


# A. Nothing lost, nothing wrong in silence


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--packing"], "packing is on, but the tokenizer has no end-of-text token"),
        (["--preset", "gpt3"], "training gpt3 takes"),
        (["--seq-len", "100000"], "the corpus is too short"),
        (["nowhere.txt"], "there is no file or directory nowhere.txt"),
    ],
)
def test_overwrite_leaves_a_run_alone_when_the_new_one_is_refused(
    options: list[str], problem: str, here: Here, here_with_run: Path
) -> None:
    before = sums(here_with_run / "run")
    err = refused(here("train", "text.txt", *WORDS, "--out", "run", "--overwrite", *options, cwd=here_with_run))
    assert problem in err
    assert sums(here_with_run / "run") == before


def test_overwrite_keeps_a_run_until_the_new_one_has_a_checkpoint(
    here_with_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = here_with_run / "run"
    before = sums(out)
    seen = []

    def evaluate(*arguments: Any) -> tuple[float, int]:
        seen.append(sums(out / ".tinyllm-replaced"))
        raise FloatingPointError("diverged")

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(FloatingPointError):
        train(small(steps=4, seed=5), out, [here_with_run / "text.txt"], overwrite=True, progress=False)
    assert seen == [before]
    assert sums(out) == before
    monkeypatch.undo()
    train(small(steps=4, seed=5), out, [here_with_run / "text.txt"], overwrite=True, progress=False)
    assert list(checkpoints(out)) == [4]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


# Two of these train into, and resume, the same folders at the same time, as often as they are told to.
RACER = """
import json, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.helpers.runs import small
from tinyllm.training import recorder
from tinyllm import resume, train
recorder.plot_run = lambda *arguments, **options: None  # most of the time of so small a training
seed, text = int(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for line in sys.stdin:
    task, out = line.split()
    try:
        if task == "train":
            done = train(small(steps=30, eval_interval=10, seed=seed), out, [text], progress=False)
        else:
            done = resume(out, steps=45, progress=False)
        print("done", done.val_loss, flush=True)
    except (OSError, ValueError) as error:
        print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def racers(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    text = str(folder / "text.txt")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, seed, text],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    yield started
    for racer in started:
        racer.kill()
        racer.wait()


def test_of_two_trainings_in_one_folder_one_is_refused(racers: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    def answers() -> list[str]:
        return [racer.stdout.readline().strip() for racer in racers]  # type: ignore[union-attr]

    def tell(task: str, out: Path) -> list[str]:
        for racer in racers:
            racer.stdin.write(f"{task} {out}\n")  # type: ignore[union-attr]
            racer.stdin.flush()  # type: ignore[union-attr]
        return answers()

    assert answers() == ["ready", "ready"]
    for number in range(20):
        out = tmp_path / f"race-{number}"
        found = tell("train", out)
        winner = next(index for index, answer in enumerate(found) if answer.startswith("done"))
        loser = found[1 - winner]
        if loser.startswith("BlockingIOError"):  # else there were files already when it came
            assert loser == f"BlockingIOError {out} is being trained by process {racers[winner].pid}"
        else:
            assert loser.startswith("FileExistsError")
        assert json.loads((out / "config.json").read_text())["training"]["seed"] == winner + 1
        by_step = dict(zip((10, 20, 30), losses(out, "val"), strict=True))
        for step, checkpoint in checkpoints(out).items():
            assert json.loads((checkpoint / "state.json").read_text())["val_loss"] == by_step[step]
        assert found[winner] == f"done {by_step[30]}"
        if number % 4:
            continue
        found = tell("resume", out)
        for answer in found:  # one may come when the other one is done
            assert re.match("done|BlockingIOError .* is being trained|ValueError .* has just been changed", answer)
        assert any(answer.startswith("done") for answer in found)
        assert max(checkpoints(out)) == 45
        assert len({answer for answer in found if answer.startswith("done")}) == 1
        load_run(out)


def unpack(run: Path) -> None:
    """Make of a run what older versions left: the tokens of each split in a file of its own, beside the weights."""
    config = json.loads((run / "config.json").read_text())
    for key in ("prepared", "fingerprint"):
        del config["data"][key]
    for split, path in {split: tokens(run, split) for split in SPLITS}.items():
        config["data"][f"{split}_sha256"] = file_sha256(path.rename(run / f"{split}.bin"))
    (run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(run / "data")


@pytest.mark.parametrize(
    ("damage", "problem", "problem_of_older"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), " bytes, not the ", "is damaged: it has "),
        (
            lambda path: path.write_bytes(b"\7" + path.read_bytes()[1:]),
            "is damaged: its SHA-256 is ",
            "has changed since the training began",
        ),
        (lambda path: path.unlink(), "there is no ", "the tokens that its training learns from"),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_a_resume_notices_damaged_tokens(
    split: Split, damage: Callable[[Path], Any], problem: str, problem_of_older: str, here: Here, here_with_run: Path
) -> None:
    run = here_with_run / "run"
    shutil.copytree(run, here_with_run / "older")
    unpack(here_with_run / "older")
    for path, reason in ((tokens(run, split), problem), (here_with_run / "older" / f"{split}.bin", problem_of_older)):
        damage(path)
        before = sums(here_with_run)
        name = path.relative_to(here_with_run)
        err = refused(here("train", "--resume", name.parts[0], "--steps", "9", cwd=here_with_run))
        assert reason in err
        assert path.name in err
        assert sums(here_with_run) == before


def test_a_run_of_an_older_version_goes_on(folder: Path, here_with_run: Path) -> None:
    run = here_with_run / "run"
    before = history(run)
    unpack(run)
    assert load_run(run).model.config == load_run(folder / "run").model.config
    shutil.rmtree(checkpoint_path(run, 8))
    (run / "model.safetensors").unlink()
    assert resume(run, progress=False).val_file == run / "val.bin"
    assert history(run) == before
    train(small(steps=2), run, [here_with_run / "text.txt"], overwrite=True, progress=False)
    assert set(os.listdir(run)) == RUN


def test_a_data_folder_that_is_not_the_runs_is_not_replaced(here_with_run: Path) -> None:
    run, text = here_with_run / "run", here_with_run / "text.txt"
    unpack(run)
    shutil.copytree(here_with_run, here_with_run / "more", ignore=lambda *_: ["run"])
    (here_with_run / "more").rename(run / "data")
    before = sums(run)
    with pytest.raises(FileExistsError, match="has a data that no training wrote; choose another directory"):
        train(small(steps=2), run, [run / "data"], overwrite=True, progress=False)
    assert sums(run) == before
    shutil.rmtree(run / "data")
    prepare([text], run / "data", tokenizer="char", workers=1, say=lambda line: None)
    before = sums(run / "data")
    train(small(steps=2), run, [run / "data"], overwrite=True, progress=False)  # which writes none of its own
    assert sums(run / "data") == before


@pytest.mark.parametrize("data", ["null", "[]", '"x"'])
def test_a_config_whose_data_is_no_object(data: str, here_with_run: Path) -> None:
    run = here_with_run / "run"
    config = json.loads((run / "config.json").read_text())
    shutil.rmtree(run / "data")
    (run / "config.json").write_text(json.dumps({**config, "data": json.loads(data)}))
    train(small(steps=2), run, [here_with_run / "text.txt"], overwrite=True, progress=False)
    assert losses(run)


# B. Failures that are handled well


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Mount a disk with room for as many kilobytes as the parameter says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk can only be mounted by root, outside of most containers")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# The model below has 0.21 MB of weights, and a checkpoint of it 0.64 MB.
WIDE = {
    "optimizer": "adamw",
    "steps": 8,
    "eval_interval": 2,
    "embedding_dim": 64,
    "hidden_dim": 256,
    "num_layers": 1,
    "num_heads": 4,
}


@pytest.mark.parametrize(
    ("small_disk", "kept", "weights_of", "said"),
    [
        (150, None, None, "the trained weights alone take"),
        (500, [], 8, "only the weights can be saved"),
        (800, [], 8, "only one fits"),
        (1100, [2], 8, "only one fits"),  # and the last weights beside it
        (2000, [6, 8], 8, None),
    ],
    indirect=["small_disk"],
)
def test_a_full_disk_costs_the_least(
    small_disk: Path,
    kept: list[int] | None,
    weights_of: int | None,
    said: str | None,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(preset="tiny", seq_len=8, **WIDE)
    news: list[str] = []
    if kept is None:
        with pytest.raises(OSError, match=said):
            train(config, small_disk / "r", [folder / "text.txt"], say=news.append)
        assert os.listdir(small_disk) == []
        return
    done = train(config, small_disk / "r", [folder / "text.txt"], say=news.append)
    assert list(checkpoints(small_disk / "r")) == kept
    reference = train(config, tmp_path / "reference", [folder / "text.txt"], progress=False)
    for (name, ours), theirs in zip(
        done.model.state_dict().items(), reference.model.state_dict().values(), strict=True
    ):
        assert ours.equal(theirs), name  # those of the last step
    assert (said is None) or any(said in line for line in news)
    shown = capsys.readouterr().err
    if said is not None:
        assert f"the weights of step {weights_of} alone are saved" in shown
        assert "No space left on device" in shown
        assert "serializ" not in shown  # no library's words
    if kept:
        assert resume(small_disk / "r", steps=8, progress=False).steps == 8
    else:
        with pytest.raises(ValueError, match="has weights but no checkpoint to go on from: no room was left for one"):
            resume(small_disk / "r", steps=9)
    assert not [path for path in (small_disk / "r").rglob("*") if path.name.startswith(".")]


def test_nodes_that_are_not_told_where_to_meet(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    err = refused(here("train", "text.txt", *WORDS, "--num-nodes", 2, "--batch-size", 2, "--out", "n", cwd=folder))
    assert "the environment has no MASTER_ADDR, MASTER_PORT, NODE_RANK" in err
    assert not (folder / "n").exists()


def test_who_is_waited_for_is_said(folder: Path) -> None:
    process = subprocess.Popen(
        command("train", "text.txt", *WORDS, "--num-nodes", "2", "--batch-size", "2", "--out", "n"),
        cwd=folder,
        env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", NODE_RANK="0", PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "Node 0 of 2: waiting for 1 other node at 127.0.0.1:29511\n"
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_model_that_does_not_fit_in_memory(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "memory", lambda device: memory.Room(900, 1000))
    err = refused(here("train", "text.txt", *WORDS, "--out", "big", cwd=folder))
    assert re.search(r"training tutorial takes .* kB of memory: weights .*; cpu has 1.0 kB, 900 bytes of it free", err)
    assert "tinyllm estimate --preset tutorial" in err
    assert not (folder / "big").exists()


def test_memory_that_runs_out_while_training(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop, "evaluate", fail)
    status, _, err = here("train", "text.txt", *WORDS, "--steps", 2, "--out", "big", cwd=folder)
    assert status == 2
    assert "tinyllm: error: memory has run out on cpu: training tutorial takes about" in err
    assert not (folder / "big").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"foo": 1}, "run/config.json does not describe a model: a config has no field 'foo'"),
        ({"embedding_dim": 10**9}, "run/config.json describes another model than its training has: embedding_dim is"),
    ],
)
def test_a_resume_reads_the_model_before_it_trains(
    change: dict[str, Any], problem: str, here: Here, here_with_run: Path
) -> None:
    path = here_with_run / "run" / "config.json"
    config = json.loads(path.read_text())
    config["model"].update(change)
    path.write_text(json.dumps(config))
    before = sums(here_with_run / "run")
    assert problem in refused(here("train", "--resume", "run", "--steps", "9", cwd=here_with_run))
    assert sums(here_with_run / "run") == before


def test_fewer_steps_than_are_done(here: Here, here_with_run: Path) -> None:
    before = sums(here_with_run / "run")
    err = refused(here("train", "--resume", "run", "--steps", "7", cwd=here_with_run))
    assert "7, but the training in run has done 8" in err
    assert sums(here_with_run / "run") == before


def test_a_refused_training_leaves_no_folder(here: Here, folder: Path) -> None:
    (folder / "one.txt").write_text("a")
    (folder / "there").mkdir(exist_ok=True)
    for out in ("deep/er", "there"):
        assert "too short" in refused(here("train", "one.txt", *WORDS, "--out", out, cwd=folder))
    assert not (folder / "deep").exists()
    assert os.listdir(folder / "there") == []


# What a second look found of the same kind


def test_the_files_of_others_are_not_a_runs(here: Here, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    for name in ("checkpoints/other.pt", "tensorboard/events", "train.bin", ".lock"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("theirs")
    before = sums(out)
    for more in ([], ["--overwrite"]):
        refused(here("train", folder / "text.txt", *WORDS, "--out", out, *more, cwd=tmp_path))
        assert sums(out) == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / LOCK_FILE).symlink_to(out / "train.bin")
    refused(here("train", folder / "text.txt", *WORDS, "--out", "link", cwd=tmp_path))
    assert sums(out) == before


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_before_the_weights_are_published_is_mended_by_a_resume(
    at: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    publish = loop.publish

    def dying(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        publish(*arguments)

    monkeypatch.setattr(loop, "publish", dying)
    config = small(steps=4, eval_interval=4, checkpoint_interval=2 if at == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", [folder / "text.txt"], progress=False)
    monkeypatch.undo()
    last = checkpoints(tmp_path / "run")[4] / "model.safetensors"
    published = tmp_path / "run" / "model.safetensors"
    if at == 1:
        load_run(tmp_path / "run")  # takes the last checkpoint's
    else:
        os.utime(published, ns=(last.stat().st_mtime_ns - 1,) * 2)  # the clock of some file systems is coarse
    resume(tmp_path / "run", progress=False)
    assert published.read_bytes() == last.read_bytes()


@pytest.mark.parametrize("small_disk", [1000], indirect=True)
def test_weights_alone_take_an_earlier_runs_place(small_disk: Path, folder: Path) -> None:
    text, out = [folder / "text.txt"], small_disk / "r"
    train(small(steps=2), out, text, progress=False)
    config = small(preset="tiny", seq_len=8, **{**WIDE, "embedding_dim": 96, "eval_interval": 8})
    done = train(config, out, text, overwrite=True, progress=False)
    assert not (out / ".tinyllm-replaced").exists()
    with pytest.raises(FloatingPointError):
        train(small(steps=9, lr=1e30, grad_clip=1e30, max_skipped_steps=0), out, text, overwrite=True, progress=False)
    for ours, theirs in zip(load_run(out).model.parameters(), done.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_memory_within_the_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/batch/job\n")
    for name, limit in (("", "max"), ("batch", 8_000), ("batch/job", 6_000)):
        group = tmp_path / "v2" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("5000\n")
        (group / "memory.stat").write_text("anon 1000\ninactive_file 2000\nactive_file 500\nslab_reclaimable 500\n")
    assert list(memory._group_memory(tmp_path / "v2", own)) == [memory.Room(4000, 6000), memory.Room(6000, 8000)]
    own.write_text("5:cpu:/job\n4:memory:/job\n")
    group = tmp_path / "v1" / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("8000")
    (group / "memory.usage_in_bytes").write_text("7000")
    (group / "memory.stat").write_text(
        "inactive_file 0\nactive_file 0\ntotal_inactive_file 4000\ntotal_active_file 2000"
    )
    assert list(memory._group_memory(tmp_path / "v1", own)) == [memory.Room(7000, 8000)]
    assert list(memory._group_memory(tmp_path, tmp_path / "none")) == []
