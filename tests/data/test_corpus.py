"""From files to tokens: which files count, what is refused, what is written."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from tinyllm.data import corpus
from tinyllm.data.batches import TokenDataset
from tinyllm.data.corpus import find_files, standard_library, write_tokens
from tinyllm.data.shards import token_dtype
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordTokenizer


def names(corpus: corpus.Corpus, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in corpus.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ["b.txt", "a.md", "sub/c", "sub/deep/d.py", ".hidden.txt", ".git/config", "__pycache__/x.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "empty.txt").touch()
    return tmp_path


# Finding


def test_standard_library() -> None:
    corpus = standard_library()
    assert len(corpus.files) > 400
    assert corpus.num_bytes > 5e6
    assert {path.suffix for path in corpus.files} == {".py"}
    folders = {part for path in corpus.files for part in path.parts}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert any(path.name == "argparse.py" for path in corpus.files)
    assert "standard library" in corpus.name


def test_standard_library_without_sources(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no source files"):
        standard_library(tmp_path)


def test_directory_contributes_its_text_files(tree: Path) -> None:
    corpus = find_files([tree])
    assert names(corpus, tree) == ["a.md", "b.txt", "empty.txt", "sub/c", "sub/deep/d.py"]
    assert [path.name for path in corpus.skipped] == ["picture.png"]


def test_files_count_once_and_hidden_ones_when_named(tree: Path) -> None:
    corpus = find_files([tree / "b.txt", str(tree / "sub"), tree / "sub" / ".." / "b.txt", tree / ".hidden.txt"])
    assert [path.name for path in corpus.files] == ["b.txt", "c", "d.py", ".hidden.txt"]


def test_a_named_binary_file_is_not_skipped_but_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"picture.png is a binary file: it has a NUL byte"):
        find_files([tree / "picture.png"])


def test_run_folders_are_left_out(tree: Path) -> None:
    for name in ["config.json", "tokenizer.json", "metrics.jsonl", "inner/notes.txt"]:
        path = tree / "runs" / "tiny-1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert not [name for name in names(find_files([tree]), tree) if name.startswith("runs")]


def test_links_to_directories_do_not_loop(tree: Path) -> None:
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "dangling").symlink_to(tree / "nowhere")
    assert len(find_files([tree]).files) == 5


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or directory .*nowhere"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no text in"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="no text in"):
        find_files([])
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"no text in .*: .*x.bin is a binary file"):
        find_files([tmp_path])


# Reading


def test_reading_normalises_line_ends_and_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\nüñí🙂".encode())
    assert list(find_files([path]).texts(0)) == ["one\ntwo\nthree\nüñí🙂"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("café".encode("latin-1"), "0xe9 at offset 3"),
        (b"\xef\xbb\xbf" + "café".encode("latin-1"), "0xe9 at offset 6"),
        ("text".encode("utf-16"), "NUL byte"),
        (b"good start, then \xff", "offset 17"),
        ("🙂".encode()[:3], "offset 0"),
    ],
)
def test_files_that_are_not_text_are_named(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.dat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"strange.dat") as error:
        list(find_files([path]).texts(0))
    assert reason in str(error.value)


def test_latin1_in_a_directory_is_an_error_not_a_loss(tree: Path) -> None:
    (tree / "old.txt").write_bytes("grüezi".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old.txt"):
        list(find_files([tree]).texts(0))


def test_the_seed_shuffles_documents(tree: Path) -> None:
    corpus = find_files([tree])
    orders = {tuple(corpus.texts(seed)) for seed in range(20)}
    assert len(orders) > 5
    assert list(corpus.texts(3)) == list(corpus.texts(3))
    assert {frozenset(order) for order in orders} == {frozenset(next(iter(orders)))}


def test_the_order_of_texts_is_that_of_files_shuffled_by_the_seed(tree: Path) -> None:
    (tree / "empty.txt").write_text("no more")
    corpus = find_files([tree])
    for seed in range(5):
        files = list(corpus.files)  # so that trainings are the same as ever
        random.Random(seed).shuffle(files)
        assert list(corpus.texts(seed)) == [path.read_text() for path in files]


# Token files


def test_tokens_are_the_documents_with_their_ends(tmp_path: Path) -> None:
    texts = ["first document", "", "second 🙂\n"] * 30
    tokenizer = BPETokenizer.from_texts(texts, 300)
    files = write_tokens(texts, tokenizer, tmp_path, seq_len=8)
    end = tokenizer.end_of_text_id
    expected = [i for text in texts if text for i in [*tokenizer.encode(text), end]]
    train, val = (np.fromfile(path, dtype=np.uint16).tolist() for path in (files.train, files.val))
    assert train + val == expected
    assert len(val) == files.val_tokens == round(0.05 * len(expected))
    assert len(train) == files.train_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "val.bin"]


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_long_documents_in_pieces_give_the_same_tokens(kind: str, tmp_path: Path, monkeypatch) -> None:
    generator = random.Random(0)
    parts = ["def f(x):", "\n", "\n\n", "    ", "\t", "return 'é🙂'", " \n", "\n   \n", "don't", " 12", "\r"]
    text = "".join(generator.choice(parts) for _ in range(4000))
    tokenizer = {"bpe": BPETokenizer, "word": WordTokenizer, "char": CharTokenizer}[kind].from_texts([text])
    whole = tokenizer.encode(text)
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 1 << 10)
    pieces = corpus._pieces(text, 100)
    assert len(pieces) > 20
    assert "".join(pieces) == text
    assert list(itertools.chain.from_iterable(tokenizer.encode_batch(pieces))) == whole
    files = write_tokens([text], tokenizer, tmp_path, seq_len=8)
    end = 0 if tokenizer.end_of_text_id is None else 1
    assert files.train_tokens + files.val_tokens == len(whole) + end


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_large_vocabularies_come_through(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({**{str(i): i for i in range(70_000)}, "<UNK>": 70_000})
    files = write_tokens([" ".join(map(str, range(70_000)))], tokenizer, tmp_path, seq_len=4)
    dataset = TokenDataset(files.val, tokenizer.vocab_size, 4)
    assert dataset[len(dataset) - 1][1].tolist() == [69_996, 69_997, 69_998, 69_999]


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_empty_corpus(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        write_tokens(texts, WordTokenizer({"a": 0, "<UNK>": 1}), tmp_path, seq_len=4)
    assert list(tmp_path.iterdir()) == []


def test_corpus_shorter_than_a_sequence(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({"a": 0, "<UNK>": 1})
    with pytest.raises(ValueError, match=r"10 tokens.* 8 left.* the 9 of one sequence.*--seq-len 8, and 1"):
        write_tokens(["a " * 10], tokenizer, tmp_path, seq_len=8)
    assert list(tmp_path.iterdir()) == []
    files = write_tokens(["a " * 11], tokenizer, tmp_path, seq_len=8)  # one token more is enough
    assert (files.train_tokens, files.val_tokens) == (9, 2)


def test_a_failure_leaves_the_old_files(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({"a": 0, "b": 1, "<UNK>": 2})
    write_tokens(["a b " * 50], tokenizer, tmp_path, seq_len=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def texts():
        yield "b b " * 1000
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_tokens(texts(), tokenizer, tmp_path, seq_len=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
