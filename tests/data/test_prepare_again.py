"""Preparing data again: after a kill, a failure, or a change, and when nothing has changed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.preparing import (
    DOCUMENTS,
    LIGHT,
    as_dataset,
    as_gz,
    as_jsonl,
    as_zst,
    content,
    document,
    files,
    full_run,
    interrupt_before_the_manifest,
    run,
    sidecars,
    start,
    write_jsonl,
)
from tinyllm._internal.files import REPLACED
from tinyllm.data.prepare.plan import Plan, _move_ours, giving_up, recover
from tinyllm.data.prepare.workers import Workers
from tinyllm.data.shards import open_shards
from tinyllm.tokenizer import BPETokenizer, load_tokenizer


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("sent", "suffix"), [(signal.SIGKILL, ".jsonl"), (signal.SIGKILL, ".jsonl.gz"), (signal.SIGINT, ".jsonl")]
)
def test_a_kill_costs_only_what_was_unfinished(
    sent: signal.Signals, suffix: str, tmp_path: Path, tokenizer: Path
) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [document(seed, 400) for seed in range(2000)]).read_bytes()
    data = tmp_path / f"data{suffix}"
    data.write_bytes(gzip.compress(lines, 1) if suffix.endswith("gz") else lines)
    out = tmp_path / "out"
    if sent == signal.SIGKILL:
        process = start("-c", LIGHT, data, out, tokenizer, 0.4)
    else:
        options = ["--tokenizer", tokenizer, "--shard-size", 0.4, "--workers", 1]
        process = start("-m", "tinyllm", "prepare", "--data", data, "--out", out, *options)
    deadline = time.monotonic() + 60
    while len(sidecars(out)) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in err
        assert "Traceback" not in err
    time.sleep(0.5)  # an orphaned worker ends
    done = sidecars(out)
    assert 3 <= len(done) < 10
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="out was not finished by `tinyllm prepare`; the same command goes on"):
        open_shards(out)
    finished = [
        f"{split}-{name[5:10]}.{kind}" for name in done for split in ("train", "val") for kind in ("bin", "idx")
    ]
    before = {name: entry for name, entry in files(out).items() if name in finished}
    assert len(before) >= 6
    again = full_run(data, out, tokenizer=tokenizer, shard_size=0.4, workers=2)
    assert again.resumed == len(done)
    after = files(out)
    assert {name: after[name] for name in before} == before  # not written again
    whole = run(data, tmp_path / "whole", tokenizer=tokenizer, shard_size=0.4)
    assert content(out) == content(whole.directory)
    again.shards.verify()


@pytest.mark.parametrize("make", [as_jsonl, as_gz, as_zst, as_dataset])
def test_a_failure_costs_only_what_was_unfinished(
    make: Callable[[Path], Any], tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    data = make(source)
    options: dict[str, Any] = {"tokenizer": tokenizer, "shard_size": 0.01}
    usual = Workers.submit

    def fail(self: Workers, what: str, function: Any, *rest: Any) -> None:
        if rest[0] == 3:
            raise OSError("the network is gone")
        usual(self, what, function, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "submit", fail)
        with pytest.raises(OSError, match="the network is gone"):
            run(data, tmp_path / "out", **options)
    assert sorted(sidecars(tmp_path / "out")) == [f"unit-0000{number}.json" for number in range(3)]
    again = full_run(data, tmp_path / "out", **options)
    assert again.resumed == 3
    assert content(tmp_path / "out") == content(run(data, tmp_path / "whole", **options).directory)


def test_a_lost_shard_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    data = as_jsonl(tmp_path)
    interrupt_before_the_manifest(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.02)
    (tmp_path / "out" / "train-00001.bin").unlink()
    again = full_run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.02)
    assert again.resumed == len(again.shards.train) - 1
    again.shards.verify()


def test_the_same_again_is_nothing_to_do(tmp_path: Path, tokenizer: Path) -> None:
    data = as_jsonl(tmp_path)
    run(data, tmp_path / "out", tokenizer=tokenizer)
    before = files(tmp_path / "out")
    said: list[str] = []
    again = full_run(data, tmp_path / "out", tokenizer=tokenizer, say=said.append)
    assert again.num_bytes == 0
    assert files(tmp_path / "out") == before
    assert "is ready" in said[0]


def test_other_settings_or_inputs_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    data = as_jsonl(tmp_path)
    out = tmp_path / "out"
    run(data, out, tokenizer=tokenizer)
    before = content(out)
    with pytest.raises(ValueError, match=r"out holds other prepared data: --val-fraction was 0.01, now it is 0.02; .*"):
        run(data, out, tokenizer=tokenizer, val_fraction=0.02)
    with pytest.raises(ValueError, match="tokenizer was 'given', now it is 'bpe', and 3 more;"):
        run(data, out)
    other = tmp_path / "other.json"
    BPETokenizer.from_texts(DOCUMENTS[100:], load_tokenizer(tokenizer).vocab_size).save(other)
    with pytest.raises(ValueError, match=r"out holds other prepared data: the tokenizer is another one; "):
        run(data, out, tokenizer=other)
    (tmp_path / "new.txt").write_text("new")
    with pytest.raises(ValueError, match=r"new.txt is new"):
        run([data, tmp_path / "new.txt"], out, tokenizer=tokenizer)
    with data.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl has changed"):
        run(data, out, tokenizer=tokenizer)
    assert content(out) == before
    for name in ("notes.txt", "train-set.bin"):
        (out / name).write_text("mine")
    shards = run(data, out, tokenizer=tokenizer, overwrite=True)
    assert shards.manifest["documents"] == len(DOCUMENTS) + 1
    assert [(out / name).read_text() for name in ("notes.txt", "train-set.bin")] == ["mine", "mine"]


def test_other_peoples_files_are_left_alone(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out holds a tokenizer.json, of something else"):
            run(as_jsonl(tmp_path), out, tokenizer=tokenizer, overwrite=overwrite)
    assert (out / "tokenizer.json").read_text() == "mine"
    with pytest.raises(NotADirectoryError, match=r"a.jsonl is a file"):
        run(tmp_path / "a.jsonl", tmp_path / "a.jsonl", tokenizer=tokenizer)


def test_bad_input_leaves_no_directory(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "new" / "out", tokenizer=tokenizer)
    assert not (tmp_path / "new" / "out").exists()


def test_a_tokenizer_exchanged_meanwhile(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_jsonl(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError("interrupted before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr("tinyllm.data.prepare.run.write_manifest", fail)
        with pytest.raises(OSError, match="interrupted"):
            run(data, tmp_path / "out", tokenizer=tokenizer)
    BPETokenizer.from_texts(DOCUMENTS[:100], 400).save(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer of the shards that are finished"):
        run(data, tmp_path / "out", tokenizer=tokenizer)


# Starting anew where data have been finished


def test_finished_data_stay_until_others_are_finished(tmp_path: Path, tokenizer: Path) -> None:
    out, data = tmp_path / "out", as_jsonl(tmp_path)
    run(data, out, tokenizer=tokenizer)
    before = content(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "' + "good " * 100 + '"}\n' + "x\n")
    with pytest.raises(ValueError, match="is not JSON"):
        run(bad, out, tokenizer=tokenizer, overwrite=True)
    assert content(out) == before
    assert not (out / REPLACED).exists()
    run(data, out, tokenizer=tokenizer)  # finds it ready
    with pytest.raises(ValueError, match="is not JSON"):
        run(bad, out, tokenizer=tokenizer, overwrite=True, shard_size=0.0004)  # a part of it is finished
    open_shards(out / REPLACED).verify()
    assert {name: digest for name, digest in content(out / REPLACED).items() if name in before} == before
    write_jsonl(bad, ["good " * 100] * 5)
    run(bad, out, tokenizer=tokenizer, overwrite=True).verify()
    assert not (out / REPLACED).exists()


def dying_renames(number: int) -> None:
    """Have this process die before its rename of that number."""
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        nonlocal number
        number -= 1
        if number < 0:
            os._exit(9)
        return rename(self, target)

    Path.rename = dying  # type: ignore[method-assign]


def test_a_kill_while_data_are_moved_loses_none(tmp_path: Path, tokenizer: Path) -> None:
    out, data = tmp_path / "out", as_jsonl(tmp_path)
    run(data, out, tokenizer=tokenizer)
    before = content(out)
    plan = Plan(out, json.loads((out / ".prepare" / "plan.json").read_text()))
    number = 0
    while True:
        child = os.fork()
        if child == 0:
            dying_renames(number)
            _move_ours(out, out / REPLACED)
            with pytest.raises(KeyboardInterrupt), giving_up(plan):
                raise KeyboardInterrupt
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        recover(out)
        if (out / REPLACED).exists():  # all of it is there: the new data have begun
            open_shards(out / REPLACED).verify()
            with pytest.raises(KeyboardInterrupt), giving_up(plan):
                raise KeyboardInterrupt
        assert content(out) == before
        open_shards(out).verify()
        if not killed:
            break
        number += 1
    assert number >= 12
