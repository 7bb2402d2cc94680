"""Finding, cutting and reading text: which inputs count, and which are refused."""

from __future__ import annotations

import gzip
import json
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from tinyllm.data.prepare import documents
from tinyllm.data.prepare.documents import Part, cut_input, read_documents, split_text
from tinyllm.data.prepare.encode import token_encoder
from tinyllm.data.prepare.inputs import Input, Skipped, find_inputs
from tinyllm.data.prepare.streams import stream_lines
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordTokenizer

PIECES = [
    "def f(x):",
    "\n",
    "\n\n",
    "    ",
    "\t",
    "return 'é🙂'",
    " \n",
    "\n   \n",
    "don't",
    " 12",
    "日本語。\n",
    "x\n",
]
REFUSE = Skipped(False)


def mixed_text(count: int, pieces: list[str] = PIECES, seed: int = 0) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(pieces) for _ in range(count))


def texts(parts: list[Part], column: str = "text", skipped: Skipped = REFUSE) -> list[str]:
    """Return the documents, with the parts of each joined."""
    found = [""]
    for part in parts:
        for document in read_documents(part, column, skipped):
            found[-1] += "".join(document.pieces)
            if document.ends:
                found.append("")
    return found[:-1]


def one(path: Path, size: int = 1 << 30, skipped: Skipped = REFUSE) -> list[Part]:
    (entry,) = find_inputs([path], skipped).inputs
    return cut_input(entry, size, "text", skipped)


# Finding


def test_names_say_what_a_file_is(tmp_path: Path) -> None:
    names = {
        "a.txt": "text",
        "b.py": "text",
        "c.jsonl": "jsonl",
        "d.ndjson": "jsonl",
        "e.jsonl.gz": "gz",
        "f.json.gz": "gz",
        "g.JSONL.ZST": "zst",
        "h.zst": "zst",
        "i.parquet": "parquet",
        "sub/j": "text",
        ".hidden.txt": None,
        "__pycache__/k.txt": None,
    }
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_inputs([tmp_path, "hf:owner/name:config@test"], REFUSE).inputs
    kinds = {entry.path.removeprefix(f"{tmp_path}/"): entry.kind for entry in found}
    assert kinds == {**{name: kind for name, kind in names.items() if kind}, "hf:owner/name:config@test": "hf"}


def test_a_file_counts_once_and_the_result_never(tmp_path: Path) -> None:
    out = tmp_path / "out"
    earlier = tmp_path / "earlier"
    for folder in (out, earlier):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
    (earlier / "manifest.json").write_text('{"format": "tinyllm-shards"}')
    (tmp_path / "a.txt").write_text("text")
    found = find_inputs([tmp_path, tmp_path / "a.txt", str(tmp_path / "out" / ".." / "a.txt")], REFUSE, out).inputs
    assert [entry.path for entry in found] == [str(tmp_path / "a.txt")]
    assert found[0].size == 4
    (tmp_path / ".hidden.txt").write_text("named")
    assert len(find_inputs([tmp_path, tmp_path / ".hidden.txt"], REFUSE, out).inputs) == 2


def test_no_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or directory .*nowhere"):
        find_inputs([tmp_path / "nowhere"], REFUSE)
    for nothing in ([tmp_path], []):
        with pytest.raises(ValueError, match="no text in"):
            find_inputs(nothing, REFUSE)
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"no text in .*: .*x.bin is a binary file"):
        find_inputs([tmp_path], REFUSE)
    with pytest.raises(ValueError, match="names no dataset"):
        find_inputs(["hf:@train"], REFUSE)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", "is a binary file"),
        ("notes.txt.gz", b"x", "decompress it first"),
    ],
)
def test_files_that_evidently_are_no_text(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("text")
    found = find_inputs([tmp_path], REFUSE)
    assert [Path(entry.path).name for entry in found.inputs] == ["good.txt"]
    assert [Path(path).name for path, _ in found.binary] == [name]
    assert reason in found.binary[0][1]
    for named in ([tmp_path / name], [tmp_path, tmp_path / name], [tmp_path / name, tmp_path]):
        with pytest.raises(ValueError, match=rf"{name} .*{reason}.*--skip-bad"):
            find_inputs(named, REFUSE)
    skipped = Skipped(True)
    found = find_inputs([tmp_path, tmp_path / name, tmp_path / name], skipped)
    assert [Path(entry.path).name for entry in found.inputs] == ["good.txt"]
    assert found.binary == []  # it counts once
    assert skipped.count == 1
    assert name in skipped.named[0]
    assert reason in skipped.named[0]


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("text")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(ValueError, match=r"secret.txt cannot be read \(Permission denied\)"):
        find_inputs([tmp_path], REFUSE)


# Cutting


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_long_texts_in_parts_are_the_whole(newline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.txt"
    text = mixed_text(5000)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", newline).encode())
    parts = one(path, 3000)
    assert len(parts) > 5
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert texts(parts) == [text]
    tokenizer = BPETokenizer.from_texts([text], 400)
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 100)
    pieces = [piece for part in parts for document in read_documents(part, "text", REFUSE) for piece in document.pieces]
    assert len(pieces) > 100
    assert list(chain.from_iterable(tokenizer.encode_batch(pieces))) == tokenizer.encode(text)


def test_pieces_without_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 10)
    monkeypatch.setattr(documents, "_LONGEST_PIECE", 40)
    assert list(split_text(["a" * 95])) == ["a" * 40, "a" * 40, "a" * 15]
    assert list(split_text(["日本" * 8, " ", "x" * 30])) == ["日本" * 8, " " + "x" * 30]
    assert list(split_text(["", ""])) == []


@pytest.mark.parametrize("ending", ["\n", ""])
def test_lines_in_parts(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    documents = [mixed_text(20, seed=seed) for seed in range(200)]
    lines = [json.dumps({"text": text, "id": 1}) for text in documents]
    path.write_text("\ufeff" + "\n\n".join(lines) + ending)
    parts = one(path, 1000)
    assert len(parts) > 10
    assert texts(parts) == documents


def test_a_long_binary_file_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    path.write_bytes(b"line\n" * 100_000 + b"\xff\n" + b"line\n" * 10)
    with pytest.raises(ValueError, match=r"late.txt is not a UTF-8 text file: byte 0xff at offset 500000"):
        one(path, 1000)
    skipped = Skipped(True)
    assert one(path, 1000, skipped) == []
    assert skipped.count == 1


# Reading


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"caf\xe9", "byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9 at offset 6"),
        (b"x" * ((1 << 18) - 2) + b"\xf0\x9f\x99", "byte 0xf0 at offset 262142"),  # over the border of two blocks
        (b"x" * 300_000 + b"\0", "NUL byte at offset 300000"),
        ("🙂".encode()[:3], "byte 0xf0 at offset 0"),
    ],
)
def test_texts_that_are_none(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.dat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"strange.dat") as error:
        texts(one(path))
    assert reason in str(error.value)
    skipped = Skipped(True)
    assert texts(one(path), skipped=skipped) == []
    assert skipped.count == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "is not a JSON object but a list"),
        (b'{"body": "x"}', "has no 'text'; its names are body"),
        (b"{}", "has no 'text': it is an empty object"),
        (b'{"text": 3}', "has no text as 'text' but a number;"),
        (b'{"text": null}', "has no text as 'text' but null;"),
        (b'{"text": true}', "has no text as 'text' but true;"),
        (b'{"text": ["x"]}', "has no text as 'text' but a list;"),
        (b'{"text": {}}', "has no text as 'text' but an object;"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 0xff"),
    ],
)
def test_bad_lines_are_named(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 50 + line + b"\n" + good)
    for size in (1 << 30, 100):  # the line's number is that in the file, not in the part
        with pytest.raises(ValueError, match=r"a.jsonl, line 51, ") as error:
            texts(one(path, size))
        assert reason in str(error.value)
        skipped = Skipped(True)
        assert texts(one(path, size), skipped=skipped) == ["good"] * 51
        assert skipped.count == 1


def test_empty_documents_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "x"}\n')
    assert texts(one(tmp_path / "a.jsonl")) == ["x"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    assert texts(one(tmp_path / "b.txt")) == []
    (tmp_path / "c.txt").touch()
    assert one(tmp_path / "c.txt") == []


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    documents = [f"row {number} é" for number in range(1000)]
    parquet.write_table(pyarrow.table({"id": range(1000), "text": documents}), path, row_group_size=100)
    for size, count in ((1 << 30, 1), (1, 10)):
        parts = one(path, size)
        assert len(parts) == count
        assert texts(parts) == documents
    entry = Input(str(path), "parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet has no column 'body'; its columns are id, text: --text-column text reads"
    ):
        cut_input(entry, 1, "body", REFUSE)
    parquet.write_table(pyarrow.table({"text": ["x", None, "y"]}), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2, has no text as 'text' but null;"):
        texts(one(path))
    skipped = Skipped(True)
    assert texts(one(path), skipped=skipped) == ["x", "y"]
    assert skipped.count == 1
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file"):
        one(path)


# Streams


def compressed(path: Path, content: bytes) -> Input:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
        return Input(str(path), "gz", path.stat().st_size)
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    path.write_bytes(pack(content[:100]) + pack(content[100:]))
    return Input(str(path), "zst", path.stat().st_size)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_lines(name: str, tmp_path: Path) -> None:
    lines = [b'{"text": "line %d \xe2\x80\xa8"\r}\r\n' % number for number in range(5000)] + [b"no end"]
    entry = compressed(tmp_path / name, b"".join(lines))
    assert list(stream_lines(entry, "text", REFUSE)) == lines
    assert list(stream_lines(entry, "text", REFUSE, skip=4000)) == lines[4000:]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compression(name: str, damage: str, tmp_path: Path) -> None:
    lines = [b"%d\n" % random.Random(number).getrandbits(64) for number in range(50_000)]
    path = tmp_path / name
    entry = compressed(path, b"".join(lines))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[-200:-100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged after line \d+"):
        list(stream_lines(entry, "text", REFUSE))
    skipped = Skipped(True)
    found = list(stream_lines(entry, "text", skipped))
    assert found[:100] == lines[:100]
    assert skipped.count == 1


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("pyarrow", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for path, kind in (("a.zst", "zst"), ("hf:name", "hf")):
        (tmp_path / path).touch()
        with pytest.raises(ImportError, match=r"which is not installed; the extra tinyllm\[data\]"):
            list(stream_lines(Input(path if kind == "hf" else str(tmp_path / path), kind), "text", REFUSE))
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow"):
        cut_input(Input("a.parquet", "parquet"), 1, "text", REFUSE)


# Words


def test_words_looked_up_are_the_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [
        *"'stredmlv A0_-!²٣’éü日🙂\0\x01\x7f\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\u200b\ufeff\u0301",
        "\n",
        "  ",
        "we'll",
    ]
    training = [mixed_text(3000), " ".join(pieces) * 20]
    tokenizer = BPETokenizer.from_texts(training, 600)
    encode = token_encoder(tokenizer)
    monkeypatch.setattr("tinyllm.data.prepare.encode._MOST_WORDS", 500)  # the table is emptied now and then
    for start in range(0, 6000, 50):
        documents = [mixed_text(1 + seed % 12, pieces, seed) for seed in range(start, start + 50)]
        expected = [np.array(ids, dtype="<u2").tobytes() for ids in tokenizer.encode_batch(documents)]
        assert encode(documents) == expected
    assert encode(["y" * 100] * 2) == [np.array(tokenizer.encode("y" * 100), dtype="<u2").tobytes()] * 2


@pytest.mark.parametrize("cls", [WordTokenizer, CharTokenizer])
def test_other_tokenizers_do_their_own_work(cls: type[WordTokenizer | CharTokenizer]) -> None:
    tokenizer = cls.from_texts(["one two  three\n"])
    encode = token_encoder(tokenizer)
    assert encode(["one two\n", ""]) == [np.array(tokenizer.encode("one two\n"), dtype="<u2").tobytes(), b""]


def test_a_bpe_that_splits_otherwise_does_its_own_work() -> None:
    import tokenizers

    plain = BPETokenizer.from_texts(["some words, some more words"] * 5, 280)
    library = tokenizers.Tokenizer.from_str(plain._tokenizer.to_str())
    library.normalizer = tokenizers.normalizers.Lowercase()
    changed = BPETokenizer(library)
    for tokenizer in (plain, changed):
        ids = np.array(tokenizer.encode("SOME words"), dtype="<u2").tobytes()
        assert token_encoder(tokenizer)(["SOME words"]) == [ids]
