"""Preparing data: the tokens are the tokenizer's, whatever the input and the number of workers."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.preparing import (
    DOCUMENTS,
    LIGHT,
    ROOT,
    as_dataset,
    as_gz,
    as_jsonl,
    as_parquet,
    as_texts,
    as_zst,
    content,
    document,
    expected,
    ids,
    run,
    start,
    write_jsonl,
)
from tinyllm import cli
from tinyllm.data import prepare
from tinyllm.data.prepare import workers
from tinyllm.data.prepare.documents import Part
from tinyllm.data.prepare.run import _naming_full_disk
from tinyllm.data.shards import open_shards
from tinyllm.tokenizer import load_tokenizer

# Every kind of input


KINDS = [as_texts, as_jsonl, as_gz, as_zst, as_parquet, as_dataset]


@pytest.mark.parametrize("make", KINDS)
def test_every_input_gives_the_tokenizers_tokens(make: Callable[[Path], Any], tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shards = run(make(source), tmp_path / "out", tokenizer=tokenizer, shard_size=0.02, val_fraction=0.1)
    assert len(shards.train) > 2
    train, val = ids(shards, "train"), ids(shards, "val")
    everything = expected(DOCUMENTS, tokenizer)
    assert sorted(train + val) == sorted(everything)
    assert [one for one in everything if one in train] == train  # in the order of the input
    manifest = shards.manifest
    assert manifest["documents"] == len(DOCUMENTS)
    assert manifest["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert manifest["tokens"] == shards.num_train_tokens + shards.num_val_tokens == sum(map(len, everything))
    assert manifest["dtype"] == "uint16"
    assert manifest["end_of_text_id"] == load_tokenizer(tokenizer).end_of_text_id
    assert 0 < shards.num_val_tokens < 0.2 * manifest["tokens"]
    assert shards.tokenizer().vocab_size == shards.vocab_size == load_tokenizer(tokenizer).vocab_size
    shards.verify()
    assert sorted(path.name for path in (tmp_path / "out" / ".prepare").iterdir()) == ["plan.json"]


def test_one_long_text_is_one_document(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "long.txt"
    text = document(0, 20_000)
    path.write_text(text)
    shards = run(path, tmp_path / "out", tokenizer=tokenizer, shard_size=0.03, val_fraction=0.02)
    assert len(shards.train) > 3
    (train,), (val,) = ids(shards, "train"), ids(shards, "val")
    assert train + val == expected([text], tokenizer)[0]  # its tail is for validation
    assert len(val) == round(0.02 * len(train + val))
    assert shards.manifest["documents"] == 1
    shards.verify()


def test_all_kinds_together(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text(DOCUMENTS[number], newline="")
    write_jsonl(tmp_path / "in" / "x.jsonl", DOCUMENTS[3:6])
    gz = tmp_path / "in" / "y.jsonl.gz"
    gz.write_bytes(gzip.compress(write_jsonl(tmp_path / "lines", DOCUMENTS[6:9]).read_bytes()))
    shards = run(tmp_path / "in", tmp_path / "out", tokenizer=tokenizer, val_fraction=0.3)
    assert sorted(ids(shards, "train") + ids(shards, "val")) == sorted(expected(DOCUMENTS[:9], tokenizer))


@pytest.mark.parametrize("kind", ["word", "char"])
def test_tokenizers_without_an_end_of_text(kind: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "   "])
    shards = run(path, tmp_path / "out", tokenizer=kind, shard_size=0.02)
    loaded = shards.tokenizer()
    assert loaded.kind == kind
    assert shards.manifest["end_of_text_id"] is None
    texts = [loaded.encode(text) for text in [*DOCUMENTS, "   "]]
    assert sorted(ids(shards, "train") + ids(shards, "val")) == sorted(filter(None, texts))


# The result depends on the input and the settings alone


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "b.jsonl", DOCUMENTS[150:])
    as_gz(source).rename(source / "c.jsonl.gz")
    (source / "b").unlink()
    options: dict[str, Any] = {"vocab_size": 350, "shard_size": 0.01, "tokenizer_sample": 0.03}
    one, two = (run(source, tmp_path / str(n), workers=n, **options) for n in (1, 2))
    assert one.manifest["shards"] == two.manifest["shards"]
    assert content(one.directory) == content(two.directory)
    assert one.fingerprint == two.fingerprint
    other = run(source, tmp_path / "seed", seed=1, **options)
    assert sorted(ids(other, "val")) != sorted(ids(one, "val"))


# Splits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_split_is_empty(count: int, seed: int, tmp_path: Path, tokenizer: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:count])
    for fraction in (0.001, 0.9):
        out = tmp_path / str(fraction)
        shards = run(data, out, tokenizer=tokenizer, val_fraction=fraction, seed=seed)
        assert shards.num_train_tokens >= 2
        assert shards.num_val_tokens >= 2
        found = [token for split in ("train", "val") for one in ids(shards, split) for token in one]  # type: ignore[arg-type]
        assert sorted(found) == sorted(token for one in expected(DOCUMENTS[:count], tokenizer) for token in one)
        shards.verify()
        listed = {path.stem for split in (shards.train, shards.val) for path in split}
        assert {path.stem for path in out.glob("*.bin")} == {path.stem for path in out.glob("*.idx")} == listed


def test_too_little_text(tmp_path: Path, tokenizer: Path) -> None:
    for text, reason in (("", "has 0 tokens"), ("x", "has 2 tokens")):
        data = write_jsonl(tmp_path / "a.jsonl", [text])
        with pytest.raises(ValueError, match=f"the corpus is too short: it {reason}"):
            run(data, tmp_path / "out", tokenizer=tokenizer, overwrite=True)


# Bad input


def test_skip_bad(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(DOCUMENTS[0], newline="")
    (folder / "b.png").write_bytes(b"\x89PNG\0")
    (folder / "c.txt").write_bytes(b"good start, then \xff")
    (folder / "d.jsonl").write_text('{"text": "one"}\n{"text"\n{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"c.txt is not a UTF-8 text file: byte 0xff at offset 17"):
        run(folder, tmp_path / "out", tokenizer=tokenizer)
    lines = "".join(f'{{"text": "{number}"}}\n' for number in range(10_000)).encode()
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(lines)[:-4000])
    shards = run(folder, tmp_path / "out", tokenizer=tokenizer, skip_bad=True, overwrite=True, val_fraction=0.2)
    named = shards.manifest["skipped"]
    assert shards.manifest["skipped_count"] == len(named) == 4
    for name, line in zip(("b.png is", "e.jsonl.gz is damaged", "c.txt is", "d.jsonl, line 2, is"), named, strict=True):
        assert name in line
    found = ids(shards, "train") + ids(shards, "val")
    for text in (DOCUMENTS[0], "one", "two"):
        assert expected([text], tokenizer)[0] in found


def test_a_bad_line_of_a_stream_is_named_by_its_file(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "some words"}\n' * 3000 + b"no json\n"))
    with pytest.raises(ValueError, match=r"a.jsonl.gz, line 3001, is not JSON"):
        run(path, tmp_path / "out", tokenizer=tokenizer, shard_size=0.02)


def test_a_dataset_without_the_column(tmp_path: Path, tokenizer: Path) -> None:
    name = as_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"has no column 'body'; its columns are text"):
        run(name, tmp_path / "out", tokenizer=tokenizer, text_column="body")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr("tinyllm.data.shards.replacing", full)
    path, out = as_jsonl(tmp_path), tmp_path / "out"
    part = Part("jsonl", str(path), 0, path.stat().st_size, path.stat().st_size)
    settings: dict[str, Any] = {"text_column": "text", "val_fraction": 0.1, "seed": 0, "skip_bad": False}
    monkeypatch.setattr(workers, "_count", lambda num_bytes: None)
    out.mkdir()
    shutil.copy(tokenizer, out)
    with (
        pytest.raises(OSError, match=r"the disk is full: no space left in .*out; finished shards are kept") as error,
        _naming_full_disk(out),
    ):
        workers.do_unit(7, [part], out / "sidecar", {}, directory=out, **settings)
    assert error.value.errno == errno.ENOSPC


# Workers


@pytest.fixture
def pool() -> Iterator[workers.Workers]:
    with closing(workers.Workers(1)) as started:
        yield started


def test_a_dead_worker_is_named(pool: workers.Workers) -> None:
    pid = pool.run("asking", os.getpid)
    pool.submit("tokenizing a.txt", time.sleep, 60)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"a worker died \(SIGKILL, perhaps .*\) while tokenizing a.txt;"):
        list(pool.results())
    with pytest.raises(ChildProcessError, match=r"a worker died \(SIGKILL, perhaps .*\) while tokenizing b.txt"):
        pool.submit("tokenizing b.txt", os.getpid)


def test_a_worker_imports_no_torch(pool: workers.Workers) -> None:
    loaded = pool.run("looking", eval, "sorted(__import__('sys').modules)")
    assert "tinyllm.data.prepare.workers" in loaded
    assert not {"torch", "lightning_fabric", "datasets", "pyarrow", "matplotlib"} & set(loaded)


def test_the_environment_stays(pool: workers.Workers) -> None:
    before, main = dict(os.environ), sys.modules["__main__"]
    there = pool.run("looking", os.getenv, "TOKENIZERS_PARALLELISM")
    assert (there, dict(os.environ), sys.modules["__main__"]) == ("false", before, main)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_workers_ignore_ctrl_c_and_end_with_their_parent() -> None:
    script = """
import os, signal, time
from tinyllm.data.prepare.workers import Workers
pool = Workers(1)
pool.submit("", os.getpid)  # it has only begun to start
(process,) = pool._context.processes
os.kill(process.pid, signal.SIGINT)
(pid,) = pool.results()
os.kill(pid, signal.SIGINT)
print(pool.run("", os.getpid) == pid, flush=True)
pool.submit("", time.sleep, 60)
time.sleep(60)
"""
    process = start("-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    process.kill()
    _, err = process.communicate(timeout=30)  # comes to an end when the worker has, which could write there, too
    assert "Traceback" not in err


# A program need not know that processes are started: it may be a script without a guard, come from stdin, or lie beside
# files that are called as libraries are.
SCRIPT = """
from tinyllm.data.prepare import prepare
print("once")
prepare(["a.jsonl"], "out", tokenizer="tokenizer.json", workers=2, shard_size=0.02, say=lambda line: None)
"""


@pytest.mark.parametrize("way", ["script", "stdin", "module"])
def test_any_program_may_prepare(way: str, tmp_path: Path, tokenizer: Path) -> None:
    as_jsonl(tmp_path)
    shutil.copy(tokenizer, tmp_path)
    (tmp_path / "program.py").write_text(SCRIPT)
    if way == "script" and sys.version_info >= (3, 11):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "program.py").rename(tmp_path / "elsewhere" / "program.py")
        (tmp_path / "pickle.py").write_text("not a library")
        (tmp_path / "tinyllm").mkdir()
    program = next(tmp_path.rglob("program.py"))
    command = {"script": [program], "stdin": ["-"], "module": ["-m", "program"]}[way]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, input=SCRIPT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert len(open_shards(tmp_path / "out").train) > 3


# Settings


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"tokenizer_sample": float("nan")}, "tokenizer_sample is nan"),
        ({"val_fraction": 0}, "val_fraction is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"vocab_size": 100}, "vocab_size is 100; a byte-level BPE needs at least 257"),
        ({"tokenizer": "nowhere.json"}, "no tokenizer file nowhere.json"),
    ],
)
def test_bad_settings(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=reason):
        run(as_jsonl(tmp_path), tmp_path / "out", **options)


def test_a_size_for_a_tokenizer_that_has_one(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="has its own"):
        run(as_jsonl(tmp_path), tmp_path / "out", tokenizer=tokenizer, vocab_size=500)


# Size


def test_a_vocabulary_larger_than_gpt2s(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(22_000)]
    data = tmp_path / "words.txt"
    data.write_text("\n".join(words + words))
    shards = run(data, tmp_path / "out", vocab_size=50_300)
    assert shards.vocab_size == 50_300
    assert shards.dtype == np.dtype("<u2")
    assert shards.tokenizer().decode(ids(shards, "train")[0]).startswith("\n".join(words[:100]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer: Path) -> None:
    peaks = []
    block = "\n".join(document(seed, 200) for seed in range(1000)) + "\n"
    for megabytes in (8, 32):
        data = tmp_path / f"{megabytes}.txt"
        with data.open("w") as file:
            for _ in range(megabytes * 10**6 // len(block.encode())):
                file.write(block)
        process = start("-c", LIGHT, data, tmp_path / f"{megabytes}", tokenizer, 4)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        numbers, torch = out.splitlines()[-2:]
        peaks.append(json.loads(numbers))  # the parent, the worker
        assert torch == "False"
    for small, large in zip(*peaks, strict=True):
        assert large < small + 10  # MiB
        assert large < 150


def test_a_sample_comes_from_all_over_the_input() -> None:
    from tinyllm.data.prepare.run import _samples

    class Plan:
        units = [[Part("text", f"{u}/{p}", 0, 5 * 10**6, 5 * 10**6) for p in range(4)] for u in range(10)]  # noqa: RUF012
        streams: list[Any] = []  # noqa: RUF012

    for size in (20 * 10**6, 2 * 10**6, 10**5):
        samples = _samples(Plan, size)  # type: ignore[arg-type]
        assert abs(sum(quota for _, quota in samples) - size) < 10
        numbers = [int(source.path.partition("/")[0]) for source, _ in samples]
        assert min(np.diff([-1, *numbers, 10])) >= 0
        assert max(np.diff([-1, *numbers, 10])) <= max(1, 11 * 10**6 // size + 1)
    everything = _samples(Plan, 10**9)  # type: ignore[arg-type]
    assert [quota for _, quota in everything] == [5 * 10**6] * 40


# The command


def test_the_command(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyllm", "prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.app()
        return exit.value.code, *capsys.readouterr()

    data, out = as_jsonl(tmp_path), tmp_path / "out"
    status, said, err = command("--data", data, "--out", out, "--tokenizer", tokenizer, "--workers", 1)
    assert status == 0, err
    assert "300 documents" in said
    assert "bytes a token, uint16)" in said
    assert f"Next: tinyllm train --data {out}" in said
    assert "tokenizing" in err
    assert "B/s" in said
    status, said, _ = command("--out", out, "--check")
    assert status == 0
    assert "out is whole: 1 training shard and" in said
    path = open_shards(out).train[0]
    path.write_bytes(bytes(path.stat().st_size))
    status, _, err = command("--out", out, "--check")
    assert status == 2
    assert err.startswith("tinyllm: error: ")
    assert f"{path} is damaged" in err
    status, _, err = command("--out", out)
    assert (status, err) == (2, "tinyllm: error: --data is missing: name the text to prepare\n")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    status, _, err = command("--data", tmp_path / "a.jsonl.zst", "--out", tmp_path / "2", "--tokenizer", tokenizer)
    assert status == 2
    assert "the extra tinyllm[data]" in err


def test_what_the_package_offers() -> None:
    assert prepare.__all__ == ["Prepared", "prepare"]


def _prepare_two(folder: Path, tokenizer: Path) -> None:
    run(as_texts(folder), folder / "out", tokenizer=tokenizer, workers=2)


def test_daemonic_processes_may_prepare(tmp_path: Path, tokenizer: Path) -> None:
    process = get_context("fork").Process(target=_prepare_two, args=(tmp_path, tokenizer), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert open_shards(tmp_path / "out").train
