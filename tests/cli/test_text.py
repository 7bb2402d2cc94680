"""Commands tell text from what is none.

The numbers count the faults that were found when the command line was tried as a new user would, and with broken
inputs.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.preparing import (
    DOCUMENTS,
    as_gz,
    as_jsonl,
    as_parquet,
    as_zst,
    run,
)
from tests.helpers.runs import Here, error
from tinyllm.config.training import TrainConfig
from tinyllm.data.corpus import find_files
from tinyllm.data.shards import open_shards
from tinyllm.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--preset", "tutorial", "--steps", "1", "--seq-len", "16", "--vocab-size", "300", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder."""
    from tinyllm.training.trainer import train

    folder = tmp_path_factory.mktemp("trained")
    as_jsonl(folder)
    config = TrainConfig.from_preset("tutorial", steps=1, seq_len=16, vocab_size=300, device="cpu")
    train(config, folder / "run", [folder / "a.jsonl"], progress=False)
    return folder / "run"


# A1: nothing is removed before what could be known is


def test_overwrite_keeps_what_it_cannot_replace(prepared: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (tmp_path / "late.txt").write_bytes(b"line\n" * 300 + b"\xff")
    for name in ("nowhere", "late.txt"):
        error(here("prepare", "--data", name, "--out", "out", "--overwrite", "--shard-size", 0.001, cwd=tmp_path))
        open_shards(out).verify()
    error(here("prepare", "--data", "late.txt", "--skip-bad", "--out", "out", "--overwrite", "--vocab-size", 100))
    open_shards(out).verify()


# A3: what tinyllm wrote is no text


def test_what_was_prepared_is_no_text(prepared: Path, unfinished: Path, trained: Path, here: Here) -> None:
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


def test_nothing_but_what_tinyllm_wrote(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "one")
    with pytest.raises(ValueError, match=r"no text in .*runs but what `tinyllm` wrote, such as .*runs/one"):
        find_files([tmp_path / "runs"])


def test_folders_of_others_are_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": "mine"}')
    (tmp_path / "manifest.json").write_text('{"format": "web app"}')
    (tmp_path / "metrics.jsonl").write_text('{"text": "x"}')
    assert len(find_files([tmp_path]).files) == 3


def test_the_result_is_not_among_the_data(tmp_path: Path, here: Here) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert "choose another --out" in error(here("prepare", "--data", ".", "--out", ".", cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


# A4: one reader for all commands


@pytest.mark.parametrize("make", [as_jsonl, as_gz, as_zst, as_parquet])
def test_train_and_eval_read_what_prepare_reads(make: Callable[[Path], Path], tmp_path: Path) -> None:
    corpus = find_files([make(tmp_path)])
    assert list(corpus.texts(0)) == DOCUMENTS
    assert corpus.left_out.count == 0


def test_texts_are_shuffled_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\ntwo", newline="")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n\n{"body": ""}\n{"body": "four"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('\ufeff{"body": "five"}\n'.encode()))
    corpus = find_files([tmp_path], text_column="body")
    orders = {tuple(corpus.texts(seed)) for seed in range(20)}
    assert len(orders) == 6
    for order in orders:
        assert sorted(order) == sorted(["one\ntwo", "three", "four", "five"])
        assert order.index("four") == order.index("three") + 1


def test_the_commands(trained: Path, tmp_path: Path, here: Here) -> None:
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


def test_train_says_what_it_left_out(tmp_path: Path) -> None:
    from tinyllm.training.trainer import train

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


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    corpus = find_files([tmp_path], skip_bad=True)
    with pytest.raises(ValueError, match=r"nothing in .* can be read: .*a.jsonl, line 1, has no 'text'"):
        list(corpus.texts(0))


def test_datasets_are_for_prepare(trained: Path, tmp_path: Path, here: Here) -> None:
    for command in (["train", "--out", "x"], ["eval", "--run", trained]):
        assert "tinyllm prepare --data hf:owner/name --out DIR" in error(
            here(*command, "--data", "hf:owner/name", cwd=tmp_path)
        )


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_missing_library_is_one_line(
    name: str, trained: Path, tokenizer: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).write_bytes(b"x")
    prepare = ["prepare", "--out", "y", "--tokenizer", tokenizer]
    for command in (["train", "--out", "x"], ["eval", "--run", trained], prepare):
        assert "the extra tinyllm[data]" in error(here(*command, "--data", name, cwd=tmp_path))


# A directory is the same to all commands


def test_directories_are_the_same_to_all(trained: Path, tmp_path: Path, tokenizer: Path, here: Here) -> None:
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


def test_a_file_and_a_hint_once_in_a_message(trained: Path, tmp_path: Path, here: Here) -> None:
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


def test_d_a_dataset_out_of_reach_is_one_line(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    from tinyllm.data.prepare.inputs import Input, Skipped
    from tinyllm.data.prepare.streams import stream_lines

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
