"""Reading prepared data: what is checked, and when."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.data.shards import Shards, is_prepared, open_shards
from tinyllm.tokenizer import CharTokenizer

# Three shards of the training split: a document goes on from the first to the third.
TRAIN = [([0, 1, 2, 0, 1], [3]), ([2, 2], []), ([1, 0, 0], [1, 3])]
VAL = [([0, 2], [2])]


def write(directory: Path, dtype: str = "uint16") -> Path:
    """Write a prepared directory by hand, since the format is what is tested."""
    directory.mkdir()
    tokenizer = directory / "tokenizer.json"
    CharTokenizer({"a": 0, "b": 1, "<UNK>": 2}).save(tokenizer)
    shards: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for split, content in (("train", TRAIN), ("val", VAL)):
        for number, (tokens, ends) in enumerate(content):
            name = f"{split}-{number:05d}"
            parts = {
                ".bin": np.array(tokens, dtype=dtype).astype(np.dtype(dtype).newbyteorder("<")).tobytes(),
                ".idx": np.array(ends, dtype="<u8").tobytes(),
            }
            sums = {}
            for suffix, data in parts.items():
                (directory / (name + suffix)).write_bytes(data)
                sums[suffix] = hashlib.sha256(data).hexdigest()
            shards[split].append(
                {
                    "name": name,
                    "tokens": len(tokens),
                    "documents": len(ends),
                    "sha256": sums[".bin"],
                    "index_sha256": sums[".idx"],
                }
            )
    manifest = {
        "format": "tinyllm-shards",
        "version": 1,
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        "vocab_size": 3,
        "dtype": dtype,
        "end_of_text_id": None,
        "shards": shards,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return write(tmp_path / "prepared")


def change(directory: Path, **entries: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_what_is_found(dtype: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "prepared", dtype)
    shards = open_shards(directory)
    assert isinstance(shards, Shards)
    assert shards.directory == directory
    assert [path.name for path in shards.train] == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]
    assert [path.name for path in shards.val] == ["val-00000.bin"]
    assert (shards.num_train_tokens, shards.num_val_tokens, shards.vocab_size) == (10, 2, 3)
    assert shards.dtype == np.dtype(dtype)
    assert shards.fingerprint == hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    assert shards.tokenizer().encode("ba") == [1, 0]
    shards.verify()


def test_documents_go_over_the_borders_of_shards(prepared: Path) -> None:
    shards = open_shards(str(prepared))
    assert [document.tolist() for document in shards.documents("train")] == [[0, 1, 2], [0, 1, 2, 2, 1], [0, 0]]
    assert [document.tolist() for document in shards.documents("val")] == [[0, 2]]


def test_a_last_document_without_an_end(prepared: Path) -> None:
    index = prepared / "val-00000.idx"
    index.write_bytes(np.array([1], dtype="<u8").tobytes())
    assert [document.tolist() for document in open_shards(prepared).documents("val")] == [[0], [2]]


def test_is_prepared(prepared: Path, tmp_path: Path) -> None:
    assert is_prepared(prepared)
    assert not is_prepared(tmp_path)
    assert not is_prepared(prepared / "manifest.json")
    assert not is_prepared(tmp_path / "nowhere")
    for content in ("{", "[]", '{"name": "a web page"}'):
        (prepared / "manifest.json").write_text(content)
        assert not is_prepared(prepared)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00002.idx", "val-00000.bin", "tokenizer.json"])
def test_a_missing_file(name: str, prepared: Path) -> None:
    (prepared / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        open_shards(prepared)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest.json.*prepare"):
        open_shards(tmp_path)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00002.idx"])
def test_a_truncated_file(name: str, prepared: Path) -> None:
    path = prepared / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, not the \d+"):
        open_shards(prepared)


@pytest.mark.parametrize("name", ["train-00002.bin", "val-00000.idx"])
def test_verify_names_the_damaged_file(name: str, prepared: Path) -> None:
    path = prepared / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    shards = open_shards(prepared)  # its size is right
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256 is .* manifest says"):
        shards.verify()


def test_a_tokenizer_of_others(prepared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    CharTokenizer({"b": 0, "a": 1, "<UNK>": 2}).save(other)
    shards = open_shards(prepared)
    shards.check_tokenizer(prepared / "tokenizer.json")
    with pytest.raises(ValueError, match=r"other.json is not the tokenizer of the shards in .*prepared: its SHA-256"):
        shards.check_tokenizer(other)
    (prepared / "tokenizer.json").write_bytes(other.read_bytes())
    for check in (shards.tokenizer, shards.verify):
        with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer of the shards"):
            check()
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        shards.check_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"format": "other"}, "is not a manifest of"),
        ({"version": 2}, "is of version 2; this program reads version 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"vocab_size": "3"}, "vocab_size"),
        ({"shards": {"train": []}}, "no train shard"),
        ({"shards": {"train": [{"name": "../x", "tokens": 1, "documents": 1}]}}, "lies elsewhere"),
        ({"shards": {"train": [{"name": "x", "tokens": -1, "documents": 1}]}}, "no counts"),
        ({"shards": {"train": [{"name": "x", "tokens": 1, "documents": 1}]}}, "'sha256' is missing"),
        ({"shards": 3}, "not a whole manifest"),
    ],
)
def test_bad_manifests(entries: dict[str, object], reason: str, prepared: Path) -> None:
    change(prepared, **entries)
    with pytest.raises(ValueError, match=reason) as error:
        open_shards(prepared)
    assert "manifest.json" in str(error.value)


def test_a_truncated_manifest(prepared: Path) -> None:
    path = prepared / "manifest.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest, or is truncated"):
        open_shards(prepared)
