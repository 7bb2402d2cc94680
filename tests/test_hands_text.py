"""What text is, and what is none, for everyone who types a command.

The numbers count the faults that were found when the command line was tried as a new user would, and with broken
inputs.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preparing import DOCUMENTS, ROOT, as_gz, as_jsonl, as_parquet, as_zst, full_run, run, save_tokenizer, start
from tests.runs import Here
from tinyllm._locks import LOCK_FILE
from tinyllm.data import find_files, write_tokens
from tinyllm.presets import TrainConfig
from tinyllm.shards import open_shards
from tinyllm.tokenizer import WordTokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--preset", "tutorial", "--steps", "1", "--seq-len", "16", "--vocab-size", "300", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    from tinyllm.training import train

    folder = tmp_path_factory.mktemp("trained")
    as_jsonl(folder)
    config = TrainConfig.from_preset("tutorial", steps=1, seq_len=16, vocab_size=300, device="cpu")
    train(config, folder / "run", [folder / "a.jsonl"], progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """What `tinyllm prepare` made, finished."""
    folder = tmp_path_factory.mktemp("prepared")
    return run(as_jsonl(folder), folder / "done", tokenizer=tokenizer).directory


@pytest.fixture
def unfinished(prepared: Path, tmp_path: Path) -> Path:
    """What a `tinyllm prepare` that was killed leaves."""
    out = tmp_path / "unfinished"
    shutil.copytree(prepared, out)
    (out / "manifest.json").unlink()
    return out


def error(done: tuple[int, str, str]) -> str:
    """The one line of a refusal, which a progress bar may come before."""
    status, _, err = done
    assert status == 2, err
    (line,) = [line for line in err.splitlines() if line and not line.startswith("tokenizing: ")]
    assert line.startswith("tinyllm: error: ")
    return line


# A1: nothing is removed before what could be known is


def test_a1_overwrite_keeps_what_it_cannot_replace(prepared: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (tmp_path / "late.txt").write_bytes(b"line\n" * 300 + b"\xff")
    for name in ("nowhere", "late.txt"):
        error(here("prepare", "--data", name, "--out", "out", "--overwrite", "--shard-size", 0.001, cwd=tmp_path))
        open_shards(out).verify()
    error(here("prepare", "--data", "late.txt", "--skip-bad", "--out", "out", "--overwrite", "--vocab-size", 100))
    open_shards(out).verify()


# A3: what tinyllm wrote is no text


def test_a3_what_was_prepared_is_no_text(prepared: Path, unfinished: Path, trained: Path, here: Here) -> None:
    folder = unfinished.parent
    (folder / "my.txt").write_text("my text " * 20)
    shutil.copytree(prepared, folder / "finished")
    shutil.copytree(trained, folder / "runs" / "one")
    (folder / "runs" / "one" / "notes.txt").write_text("beside the weights")
    shutil.copytree(trained, folder / "runs" / "failed")
    (folder / "runs" / "failed" / "metrics.jsonl").unlink()
    corpus = find_files([folder])
    assert [path.name for path in corpus.files] == ["my.txt"]
    assert corpus.notes == (f"Skipped 4 folders of prepared data or of a training, such as {folder / 'finished'}",)
    said: list[str] = []
    out = run(folder, folder / "new", tokenizer=prepared / "tokenizer.json", say=said.append)
    assert said == list(corpus.notes)  # the result is not among them
    assert out.manifest["documents"] == 1

    for command in (["train", "--out", "x"], ["eval", "--run", trained]):
        for name, reason in {
            "unfinished": "unfinished was not finished by `tinyllm prepare`; the same command goes on",
            "runs/one": "runs/one is the folder of a training, not text",
            "runs/failed": "runs/failed is the folder of a training, not text",
        }.items():
            assert reason in error(here(*command, "--data", name, cwd=folder))
        assert "finished was made by `tinyllm prepare`: it holds tokens, not text" in error(
            here(*command, "--data", "my.txt", "finished")
        )
    assert "takes it as its only --data" in error(here("eval", "--run", trained, "--data", "finished"))
    assert "is the folder of a training" in error(here("prepare", "--data", "runs/one", "--out", "y"))
    assert not (folder / "x").exists()
    assert not (folder / "y").exists()


def test_a3_nothing_but_what_tinyllm_wrote(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "one")
    with pytest.raises(ValueError, match=r"no text in .*runs but what `tinyllm` wrote, such as .*runs/one"):
        find_files([tmp_path / "runs"])


def test_a3_folders_of_others_are_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": "mine"}')
    (tmp_path / "manifest.json").write_text('{"format": "web app"}')
    (tmp_path / "metrics.jsonl").write_text('{"text": "x"}')
    assert len(find_files([tmp_path]).files) == 3


def test_a3_the_result_is_not_among_the_data(tmp_path: Path, here: Here) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert "choose another --out" in error(here("prepare", "--data", ".", "--out", ".", cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


# A4: one reader for all commands


@pytest.mark.parametrize("make", [as_jsonl, as_gz, as_zst, as_parquet])
def test_a4_train_and_eval_read_what_prepare_reads(make: Callable[[Path], Path], tmp_path: Path) -> None:
    corpus = find_files([make(tmp_path)])
    assert list(corpus.texts(0)) == DOCUMENTS
    assert corpus.left_out.count == 0


def test_a4_texts_are_shuffled_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\ntwo", newline="")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n\n{"body": ""}\n{"body": "four"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('\ufeff{"body": "five"}\n'.encode()))
    corpus = find_files([tmp_path], text_column="body")
    orders = {tuple(corpus.texts(seed)) for seed in range(20)}
    assert len(orders) == 6
    for order in orders:
        assert sorted(order) == sorted(["one\ntwo", "three", "four", "five"])
        assert order.index("four") == order.index("three") + 1


def test_a4_the_commands(trained: Path, tmp_path: Path, here: Here) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "alpha beta gamma", "id": 1}\n' * 3)
    corpus = json.loads((trained / "config.json").read_text())["data"]
    assert corpus["files"] == 1  # a.jsonl, whose braces it has not learnt:
    assert '{"' not in load_tokenizer(trained / "tokenizer.json").decode(list(range(300)))
    status, out, err = here("eval", "--run", trained, "--data", "a.jsonl", "--text-column", "body", cwd=tmp_path)
    assert status == 0, err
    assert "3 documents, 48 bytes" in out
    assert "line 1, has no 'text'; its names are body, id: --text-column body reads it; --skip-bad leaves" in error(
        here("eval", "--run", trained, "--data", "a.jsonl")
    )
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    status, out, err = here("eval", "--run", trained, "--data", "a.jsonl", "--text-column", "body", "--skip-bad")
    assert status == 0, err
    assert "Left out 1 input, such as a.jsonl, line 4, is not JSON" in out
    assert "3 documents" in out


def test_a4_train_says_what_it_left_out(tmp_path: Path) -> None:
    from tinyllm.training import train

    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes("grüezi".encode("latin-1"))
    (tmp_path / "a.jsonl").write_text('{"body": "alpha beta gamma"}\n' * 50)
    config = TrainConfig.from_preset("tutorial", steps=1, seq_len=16, vocab_size=300, device="cpu")
    said: list[str] = []
    with pytest.raises(ValueError, match=r"latin.txt is not a UTF-8 text file: .*; --skip-bad leaves out"):
        train(config, tmp_path / "x", [tmp_path / "latin.txt"], progress=False)
    assert not (tmp_path / "x").exists()
    options: dict[str, Any] = {"text_column": "body", "skip_bad": True, "progress": False, "say": said.append}
    train(config, tmp_path / "x", [tmp_path], **options)
    assert f"Text: {tmp_path}, 2 files, 1.5 kB" in said
    assert f"Skipped 1 binary file, such as {tmp_path / 'picture.png'}" in said
    assert "Training a bpe tokenizer of up to 300 tokens" in said
    left_out = [line for line in said if line.startswith("Left out 1 input, such as ")]  # though it is read twice
    assert len(left_out) == 1
    assert "latin.txt is not a UTF-8 text file" in left_out[0]


def test_a4_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    corpus = find_files([tmp_path], skip_bad=True)
    with pytest.raises(ValueError, match=r"nothing in .* can be read: .*a.jsonl, line 1, has no 'text'"):
        list(corpus.texts(0))


def test_a4_datasets_are_for_prepare(trained: Path, tmp_path: Path, here: Here) -> None:
    for command in (["train", "--out", "x"], ["eval", "--run", trained]):
        assert "tinyllm prepare --data hf:owner/name --out DIR" in error(
            here(*command, "--data", "hf:owner/name", cwd=tmp_path)
        )


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a4_a_missing_library_is_one_line(
    name: str, trained: Path, tokenizer: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"x")
    prepare = ["prepare", "--out", "y", "--tokenizer", tokenizer]
    for command in (["train", "--out", "x"], ["eval", "--run", trained], prepare):
        assert "pip install 'tinyllm[data]'" in error(here(*command, "--data", name, cwd=tmp_path))


# A directory is the same to all commands


def test_b5_directories_are_the_same_to_all(trained: Path, tmp_path: Path, tokenizer: Path, here: Here) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha beta gamma " * 40)
    (folder / "nul.txt").write_bytes(b"x\0")
    (folder / "x.jsonl").write_bytes(b"x\0")
    (folder / "notes.txt.gz").write_bytes(gzip.compress(b"x"))
    said = "Skipped 3 binary files, such as d/notes.txt.gz"
    for command in (
        ["train", "--out", "x", *QUICK],
        ["eval", "--run", trained],
        ["prepare", "--out", "y", "--workers", 1, "--tokenizer", tokenizer],
    ):
        status, out, err = here(*command, "--data", "d", cwd=tmp_path)
        assert status == 0, err
        assert said in out
    assert open_shards(tmp_path / "y").manifest["skipped"] == [
        "d/notes.txt.gz is compressed, which is read for JSON lines only; decompress it first",
        "d/nul.txt is a binary file: it has a NUL byte in its beginning",
        "d/x.jsonl is a binary file: it has a NUL byte in its beginning",
    ]
    assert "3 inputs left out, named in y/manifest.json:" in out


def test_b5_a_file_and_a_hint_once_in_a_message(trained: Path, tmp_path: Path, here: Here) -> None:
    (tmp_path / "nul.txt").write_bytes(b"x\0")
    (tmp_path / "bad.jsonl").write_bytes(b"{")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"{")
    (tmp_path / "bad.parquet").write_bytes(b"{")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for name in ("nul.txt", "bad.jsonl", "bad.jsonl.gz", "bad.parquet", "bad.txt"):
        for command in (["train", "--out", "x"], ["eval", "--run", trained], ["prepare", "--out", "y"]):
            message = error(here(*command, "--data", name, cwd=tmp_path))
            assert message.count(name) == 1
            assert message.count("--skip-bad leaves out") == 1
            shutil.rmtree(tmp_path / "y", ignore_errors=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a POSIX system")
def test_what_is_neither_a_file_nor_a_directory(trained: Path, tmp_path: Path, here: Here) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        (os.devnull, "is a device; a file or a directory is needed"),
        ("pipe", "is a pipe, which can be read only once"),
    ):
        for command in (["train", "--out", "x"], ["eval", "--run", trained], ["prepare", "--out", "y"]):
            message = error(here(*command, "--data", name, cwd=tmp_path))
            assert f"{name} {reason}" in message


# B4: a failed attempt does not lock out its own correction


def test_b4_the_correction_is_named_and_works(tmp_path: Path, here: Here) -> None:
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


def test_b4_a_tokenizer_of_a_replaced_plan_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_jsonl(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError("interrupted before the first unit")

    with monkeypatch.context() as patch:
        patch.setattr("tinyllm.prepare.run._tokenize", fail)
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
def test_b4_the_columns_that_may_be_meant(line: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1, has no 'text'") as caught:
        list(find_files([tmp_path / "a.jsonl"]).texts(0))
    assert reason in str(caught.value)


# B6: a damaged file is named


def test_b6_a_damaged_plan_is_named(unfinished: Path, tokenizer: Path) -> None:
    data = as_jsonl(unfinished.parent)
    plan = json.loads((unfinished / ".prepare" / "plan.json").read_text())
    changed = [json.dumps({**plan, name: 3}) for name in ("settings", "units", "inputs", "skipped")]
    for content in ("", "{", "[]", "{}", '{"version": 1}', "\xff", *changed):
        (unfinished / ".prepare" / "plan.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"unfinished/.prepare/plan.json is damaged \(.*\); --overwrite starts"):
            run(data, unfinished, tokenizer=tokenizer)
    run(data, unfinished, tokenizer=tokenizer, overwrite=True).verify()


def test_b6_a_damaged_sidecar_is_named(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_jsonl(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError("interrupted before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr("tinyllm.prepare.run.write_manifest", fail)
        with pytest.raises(OSError, match="interrupted"):
            run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04)
    path = tmp_path / "out" / ".prepare" / "unit-00001.json"
    for content in ("", "{", "[]", "{}", '{"tokenizer_sha256": ""}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"unit-00001.json is damaged \(.*\); remove it, and the same command"):
            run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04)
    path.unlink()
    assert full_run(data, tmp_path / "out", tokenizer=tokenizer, shard_size=0.04).resumed == 2


# A2: one owner

# Both processes of a race run this: the work is done in the process itself, as starting others would take seconds.
RACER = """
import sys
from tinyllm import prepare as package
from tinyllm.prepare import pool, run, worker
from tinyllm.prepare.documents import Part
from tinyllm.prepare.words import token_encoder
from tinyllm.tokenizer import load_tokenizer
import json, numpy
from pathlib import Path

class Here:
    def __init__(self, *arguments, **options): pass
    def close(self): pass
    def run(self, task, what, progress):
        if task["task"] == "tokenizer":
            return worker.make_tokenizer(task)
        settings = task["settings"]
        encode = token_encoder(load_tokenizer(Path(settings["directory"], "tokenizer.json")), numpy.dtype("<u2"))
        done = worker.write_unit(task["number"], [Part(**part) for part in task["parts"]], settings, encode, progress)
        worker.write_text(task["sidecar"], json.dumps({**done, **task["extra"]}))
        return done

run.Worker = run.WorkerPool = Here
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
def test_a2_two_processes_race_into_one_folder(tmp_path: Path, tokenizer: Path) -> None:
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
from tinyllm._locks import owned
with owned(sys.argv[1], "prepared"):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a2_a_killed_prepare_gives_way(tmp_path: Path, tokenizer: Path, here: Here) -> None:
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
    from tinyllm.prepare.worker import sample_texts

    def stream(name: str, characters: int) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress((json.dumps({"text": name * 100}) + "\n").encode() * (characters // 100)))
        return {"path": str(path), "kind": "gz"}

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
    from tinyllm.prepare.documents import Part
    from tinyllm.prepare.inputs import Input
    from tinyllm.prepare.run import _samples

    class Plan:
        streams = [Input("hf:one", "hf"), Input("hf:two", "hf")]  # noqa: RUF012

        def __init__(self, size: int) -> None:
            self.units = [[Part("text", "a.txt", 0, size, size)]]

    size = 24 * 10**6
    small, large = (_samples(Plan(text), size) for text in (10_000, 10 * size))  # type: ignore[arg-type]
    assert [quota for _, quota in small] == [10_000, 11_995_000, 11_995_000]
    assert [quota for _, quota in large] == [20 * 10**6, 2 * 10**6, 2 * 10**6]


# D: words, progress, unknown tokens


def test_d_a_short_report_is_in_the_singular(tmp_path: Path, tokenizer: Path, here: Here) -> None:
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 9)
    (tmp_path / "b.png").write_bytes(b"\0")
    status, out, err = here(
        "prepare", "--data", ".", "--out", "out", "--workers", 1, "--tokenizer", tokenizer, cwd=tmp_path
    )
    assert status == 0, err
    assert "1 document, 153 bytes" in out
    assert "1 input left out, named in out/manifest.json:" in out
    assert "1 training shard and 1 validation shard" in here("prepare", "--out", "out", "--check")[1]
    assert find_files([tmp_path]).describe() == f"{tmp_path}, 1 file, 153 bytes"


def test_d_several_paths_are_counted_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("x" * 100)
    assert find_files([tmp_path / name for name in "abc"]).describe() == "3 files, 300 bytes"


def test_d_a_file_that_is_not_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text("plain")
    with pytest.raises(ValueError, match=r"a.jsonl.gz is damaged from its beginning: Not a gzipped file"):
        list(find_files([tmp_path / "a.jsonl.gz"]).texts(0))


def test_d_tokenizing_shows_progress_if_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllm import data

    tokenizer = WordTokenizer({"a": 0, "<UNK>": 1})
    usual = data.tqdm
    delays: list[float] = []

    def at_once(**options: Any) -> Any:
        delays.append(options["delay"])
        return usual(**{**options, "delay": 0, "mininterval": 0})

    for bar, progress, shown in ((usual, True, False), (at_once, True, True), (at_once, False, False)):
        monkeypatch.setattr(data, "tqdm", bar)
        write_tokens(["a a a a "] * 50, tokenizer, tmp_path, seq_len=4, progress=progress, num_bytes=400)
        assert ("tokenizing: 100%" in capsys.readouterr().err) == shown
    assert delays == [2, 2]


def test_d_unknown_tokens_are_counted(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({"a": 0, "<UNK>": 1})
    assert write_tokens(["a b a c a a a a "] * 5, tokenizer, tmp_path, seq_len=4).unknown == 10


def test_d_a_dataset_out_of_reach_is_one_line(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    from tinyllm.prepare.inputs import Input, Skipped
    from tinyllm.prepare.streams import stream_lines

    heard: list[str] = []
    logger = logging.getLogger("huggingface_hub.utils._http")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)

    def unreachable(*arguments: object, **options: object) -> None:
        for _ in range(5):
            logger.warning("[Errno -2] Name or service not known; retrying")
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    try:
        with pytest.raises(OSError, match=r"^hf:owner/name cannot be read: Couldn't reach 'owner/name' on the Hub$"):
            list(stream_lines(Input("hf:owner/name", "hf"), "text", Skipped(False)))
        assert heard == []
        logger.warning("heard again")
        assert heard == ["heard again"]
    finally:
        logger.removeHandler(handler)
