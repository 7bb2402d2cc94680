"""Tests of the command prepare, broken inputs among them."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.preparing import (
    DOCUMENTS,
    ROOT,
    as_gz,
    as_jsonl,
    as_zst,
    content,
    full_run,
    interrupt_before_the_manifest,
    run,
    start,
)
from tests.helpers.runs import Here, error
from tinyllm._internal.locks import LOCK_FILE
from tinyllm.data.corpus import find_files
from tinyllm.data.shards import open_shards
from tinyllm.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


# B4: a failed attempt does not lock out its own correction


def test_the_correction_is_named_and_works(tmp_path: Path, here: Here) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in DOCUMENTS))
    options = ["--data", "c.jsonl", "--out", "p", "--workers", 1, "--vocab-size", 300]
    message = error(here("prepare", *options, cwd=tmp_path))
    assert (
        "c.jsonl, line 1, has no 'text'; its names are content: --text-column content reads it; --skip-bad leaves "
        "out what cannot be read, and counts it"
    ) in message
    status, out, err = here("prepare", *options, "--text-column", "content")
    assert status == 0, err
    assert "300 documents" in out


def test_a_tokenizer_of_a_replaced_plan_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_jsonl(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError("interrupted before the first unit")

    with monkeypatch.context() as patch:
        patch.setattr("tinyllm.data.prepare.run._tokenize", fail)
        with pytest.raises(OSError, match="interrupted"):
            run(data, tmp_path / "out", vocab_size=280)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").vocab_size == 280
    shards = run(data, tmp_path / "out", vocab_size=290)
    assert shards.vocab_size == 290
    with pytest.raises(ValueError, match=r"holds other prepared data: --vocab-size was 290, now it is 280; "):
        run(data, tmp_path / "out", vocab_size=280)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"title": "x", "body": "y", "id": 1}, "its names are title, body, id: --text-column NAME says which"),
        ({"id": 1}, "its names are id; none of them is a text"),
        ({"two words": "x"}, "its names are two words: --text-column 'two words' reads it"),
        ({f"c{number}": "x" for number in range(20)}, "c6, c7 and 12 more: --text-column NAME says which"),
    ],
)
def test_the_columns_that_may_be_meant(line: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1, has no 'text'") as caught:
        list(find_files([tmp_path / "a.jsonl"]).texts(0))
    assert reason in str(caught.value)


def test_the_correction_after_a_part_is_done(tmp_path: Path, tokenizer: Path, here: Here) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("alpha beta " * 200)
    (tmp_path / "z.jsonl").write_text(json.dumps({"body": "gamma"}) + "\n")
    options = ["--data", *(f"{number}.txt" for number in range(4)), "z.jsonl", "--out", "p", "--workers", 1]
    options += ["--tokenizer", tokenizer, "--shard-size", 0.003]
    assert "--text-column body reads it" in error(here("prepare", *options, cwd=tmp_path))
    assert list((tmp_path / "p" / ".prepare").glob("unit-*.json"))
    status, out, err = here("prepare", *options, "--text-column", "body")
    assert status == 0, err
    assert "5 documents" in out


def test_shards_without_a_manifest_are_not_given_up(unfinished: Path, tokenizer: Path) -> None:
    other = unfinished.parent / "other.txt"
    other.write_text("alpha beta " * 200)
    before = content(unfinished)
    with pytest.raises(ValueError, match="holds other prepared data"):
        run(other, unfinished, tokenizer=tokenizer)
    assert content(unfinished) == before


# B6: a damaged file is named


def test_a_damaged_plan_is_named(unfinished: Path, tokenizer: Path) -> None:
    data = as_jsonl(unfinished.parent)
    plan = json.loads((unfinished / ".prepare" / "plan.json").read_text())
    changed = [json.dumps({**plan, name: 3}) for name in ("settings", "units", "inputs", "skipped")]
    changed.append(json.dumps({**plan, "settings": [["a", 1]]}))
    for damaged in ("", "{", "[]", "{}", '{"version": 1}', "\xff", *changed):
        (unfinished / ".prepare" / "plan.json").write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match=r"unfinished/.prepare/plan.json is damaged \(.*\); --overwrite starts"):
            run(data, unfinished, tokenizer=tokenizer)
    run(data, unfinished, tokenizer=tokenizer, overwrite=True).verify()


def test_a_damaged_sidecar_is_named(tmp_path: Path, tokenizer: Path) -> None:
    data = as_jsonl(tmp_path)
    interrupt_before_the_manifest(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04)
    path = tmp_path / "out" / ".prepare" / "unit-00001.json"
    for damaged in ("", "{", "[]", "{}", '{"tokenizer_sha256": ""}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"unit-00001.json is damaged \(.*\); remove it, and the same command"):
            run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04)
    path.unlink()
    assert full_run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04).resumed == 2


# A2: one owner

# Both processes of a race run this: the work is done in the process itself, as starting others would take seconds.
RACER = """
import sys
from tinyllm.data import prepare as package
from tinyllm.data.prepare import run, workers

class Here:
    def __init__(self, *arguments, **options): self.done = []
    def close(self): pass
    def run(self, what, function, *arguments): return function(*arguments)
    def submit(self, what, function, *arguments): self.done.append(function(*arguments))
    def results(self, most): return [self.done.pop() for _ in range(len(self.done))]

run.Workers = Here
workers._count = lambda num_bytes: None
print("ready", flush=True)
data, tokenizer = sys.argv[1:]
for line in sys.stdin:
    try:
        options = {"tokenizer": tokenizer, "workers": 1, "shard_size": 0.04, "say": lambda line: None}
        done = package.prepare([data], line.strip(), **options)
        print("made" if done.num_bytes else "found", flush=True)
    except BlockingIOError as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_two_processes_race_into_one_folder(tmp_path: Path, tokenizer: Path) -> None:
    data = as_jsonl(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, data, tokenizer],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2  # type: ignore[union-attr]
        alone = run(data, tmp_path / "alone", tokenizer=tokenizer, shard_size=0.04)
        for number in range(20):
            out = tmp_path / f"race-{number}"
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{out}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers]  # type: ignore[union-attr]
            winner = answers.index("made")
            refused = f"{out} is being prepared by process {racers[winner].pid}"
            assert answers[1 - winner] in (refused, "found")
            shards = open_shards(out)
            shards.verify()
            assert shards.fingerprint == alone.fingerprint
            assert not (out / LOCK_FILE).exists()
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


HOLDER = """
import sys, time
from tinyllm._internal.locks import owned
with owned(sys.argv[1], "prepared"):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a_killed_prepare_gives_way(tmp_path: Path, tokenizer: Path, here: Here) -> None:
    data = as_jsonl(tmp_path)
    process = start("-c", HOLDER, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    assert f"out is being prepared by process {process.pid}" in error(
        here("prepare", "--data", data, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "out" / LOCK_FILE).exists()
    assert run(data, tmp_path / "out", tokenizer=tokenizer).manifest["documents"] == len(DOCUMENTS)
    assert not (tmp_path / "out" / LOCK_FILE).exists()


# D: the tokenizer's sample


@pytest.mark.parametrize("make", [as_gz, as_zst])
def test_d_the_sample_takes_small_streams_whole(make: Callable[[Path], Path], tmp_path: Path) -> None:
    packed, plain = make(tmp_path), as_jsonl(tmp_path)
    lines = b"".join(plain.read_bytes().splitlines(keepends=True)[:50]) * 100
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    assert len(lines) > 40 * (tmp_path / "d.jsonl.gz").stat().st_size  # far longer than its size says
    for one, other in ((plain, packed), (tmp_path / "c.jsonl", tmp_path / "d.jsonl.gz")):
        found = [run(data, tmp_path / f"out-{data.name}", vocab_size=400) for data in (one, other)]
        first, second = ((shards.directory / "tokenizer.json").read_bytes() for shards in found)
        assert first == second


def test_d_samples_of_streams_are_bounded(tmp_path: Path) -> None:
    from tinyllm.data.prepare.inputs import Input
    from tinyllm.data.prepare.workers import sample_texts

    def stream(name: str, characters: int) -> Input:
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress((json.dumps({"text": name * 100}) + "\n").encode() * (characters // 100)))
        return Input(str(path), "gz")

    def taken(quotas: dict[str, int], size: int) -> dict[str, int]:
        samples = [(streams[name], quota) for name, quota in quotas.items()]
        texts = "".join(sample_texts(samples, size, "text", False))
        return {name: texts.count(name) for name in quotas}

    streams = {"a": stream("a", 10_000), "b": stream("b", 10_000)}
    assert taken({"a": 2000, "b": 2000}, 4000) == {"a": 2000, "b": 2000}
    assert taken({"a": 2000, "b": 2000}, 5000) == {"a": 3000, "b": 2000}
    assert taken({"a": 12_000, "b": 2000}, 14_000) == {"a": 10_000, "b": 4000}  # what one lacks the next may have
    assert taken({"a": 1000, "b": 1000}, 100_000) == {"a": 10_000, "b": 10_000}


def test_d_a_small_text_beside_a_dataset_is_sampled() -> None:
    from tinyllm.data.prepare.documents import Part
    from tinyllm.data.prepare.inputs import Input
    from tinyllm.data.prepare.run import _samples

    class Plan:
        streams = [Input("hf:one", "hf"), Input("hf:two", "hf")]  # noqa: RUF012

        def __init__(self, size: int) -> None:
            self.units = [[Part("text", "a.txt", 0, size, size)]]

    size = 24 * 10**6
    small, large = (_samples(Plan(text), size) for text in (10_000, 10 * size))  # type: ignore[arg-type]
    assert [quota for _, quota in small] == [10_000, 11_995_000, 11_995_000]
    assert [quota for _, quota in large] == [20 * 10**6, 2 * 10**6, 2 * 10**6]
