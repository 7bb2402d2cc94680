"""The way from files to tokens: which files are read, what is refused, what is written."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.preparing import write_jsonl
from tinyllm.data import corpus
from tinyllm.data.batches import TokenDataset
from tinyllm.data.corpus import find_files, standard_library, write_shards
from tinyllm.data.prepare import documents
from tinyllm.data.shards import SPLITS, Shards, token_dtype
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, WordTokenizer


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
    assert corpus.notes == (f"Skipped 1 binary file, such as {tree / 'picture.png'}",)


def test_links_to_directories_do_not_loop(tree: Path) -> None:
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "dangling").symlink_to(tree / "nowhere")
    assert len(find_files([tree]).files) == 5


# Reading


def test_reading_normalises_line_ends_and_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\nüñí🙂".encode())
    assert list(find_files([path]).texts(0)) == ["one\ntwo\nthree\nüñí🙂"]


def test_the_order_of_texts_is_that_of_files_shuffled_by_the_seed(tree: Path) -> None:
    (tree / "empty.txt").write_text("no more")
    corpus = find_files([tree])
    for seed in range(5):
        files = list(corpus.files)  # so that trainings are the same as ever
        random.Random(seed).shuffle(files)
        assert list(corpus.texts(seed)) == [path.read_text() for path in files]


# Shards


def shards_of(texts: list[str], tokenizer: Tokenizer, folder: Path, **options: Any) -> Shards:
    """Write the shards of texts, which are JSON lines of one file, so that they keep their order."""
    folder.mkdir(exist_ok=True)
    corpus = find_files([write_jsonl(folder / "a.jsonl", texts)])
    return write_shards(corpus, tokenizer, folder / "out", **{"seed": 0, "seq_len": 8, **options})


def test_the_last_documents_are_for_validation(tmp_path: Path) -> None:
    texts = ["first document", "", "second 🙂\n"] * 30
    tokenizer = BPETokenizer.from_texts(texts, 300)
    shards = shards_of(texts, tokenizer, tmp_path)
    whole = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts if text]
    train, val = ([ids.tolist() for ids in shards.documents(split)] for split in SPLITS)
    assert train + val == whole
    total = sum(map(len, whole))
    assert total == shards.manifest["tokens"] == shards.num_train_tokens + shards.num_val_tokens
    assert abs(shards.num_val_tokens - 0.05 * total) <= max(map(len, whole)) / 2
    assert shards.manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert shards.tokenizer().vocab_size == tokenizer.vocab_size
    shards.verify()


@pytest.mark.parametrize("seed", range(20))
def test_a_large_file_among_a_few_is_not_lost_to_validation(seed: int, tmp_path: Path) -> None:
    for number, length in enumerate((4000, 10, 10)):
        (tmp_path / f"{number}.txt").write_text("a " * length)
    shards = write_shards(
        find_files([tmp_path]), WordTokenizer({"a": 0, "<UNK>": 1}), tmp_path / "out", seed=seed, seq_len=8
    )
    assert 100 <= shards.num_val_tokens <= 402


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_long_documents_in_pieces_give_the_same_tokens(kind: str, tmp_path: Path, monkeypatch) -> None:
    generator = random.Random(0)
    parts = ["def f(x):", "\n", "\n\n", "    ", "\t", "return 'é🙂'", " \n", "\n   \n", "don't", " 12", "\r"]
    text = "".join(generator.choice(parts) for _ in range(4000))
    tokenizer = {"bpe": BPETokenizer, "word": WordTokenizer, "char": CharTokenizer}[kind].from_texts([text])
    monkeypatch.setattr(documents, "_PIECE_CHARACTERS", 100)
    pieces = list(documents.split_text([text]))
    assert len(pieces) > 20
    assert "".join(pieces) == text
    shards = shards_of([text], tokenizer, tmp_path)
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    found = [ids.tolist() for split in SPLITS for ids in shards.documents(split)]
    assert list(itertools.chain(*found)) == tokenizer.encode(text) + end


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_large_vocabularies_come_through(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({**{str(i): i for i in range(70_000)}, "<UNK>": 70_000})
    shards = shards_of([" ".join(map(str, range(70_000)))], tokenizer, tmp_path)
    dataset = TokenDataset(shards.val, tokenizer.vocab_size, 4)
    assert dataset[len(dataset) - 1][1].tolist() == [69_996, 69_997, 69_998, 69_999]


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_empty_corpus(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the corpus is too short: it has 0 tokens"):
        shards_of(texts, WordTokenizer({"a": 0, "<UNK>": 1}), tmp_path)


def test_corpus_shorter_than_a_sequence(tmp_path: Path) -> None:
    tokenizer = WordTokenizer({"a": 0, "<UNK>": 1})
    with pytest.raises(ValueError, match=r"10 tokens.* 2 are.* 8 left.* the 9 of one sequence.*--seq-len 8 \+ 1"):
        shards_of(["a " * 10], tokenizer, tmp_path)
    shards = shards_of(["a " * 11], tokenizer, tmp_path / "2")  # one token more is enough
    assert (shards.num_train_tokens, shards.num_val_tokens) == (9, 2)


def test_tokenizing_shows_progress_if_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = WordTokenizer({"a": 0, "<UNK>": 1})
    (tmp_path / "a.txt").write_text("a " * 500)
    usual = corpus.tqdm
    delays: list[float] = []

    def at_once(**options: Any) -> Any:
        delays.append(options["delay"])
        return usual(**{**options, "delay": 0, "mininterval": 0})

    for bar, progress, shown in ((usual, True, False), (at_once, True, True), (at_once, False, False)):
        monkeypatch.setattr(corpus, "tqdm", bar)
        out = tmp_path / f"out-{shown}-{progress}"
        write_shards(find_files([tmp_path / "a.txt"]), tokenizer, out, seed=0, seq_len=4, progress=progress)
        assert ("tokenizing: 100%" in capsys.readouterr().err) == shown
    assert delays == [2, 2]
