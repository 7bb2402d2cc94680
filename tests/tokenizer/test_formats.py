"""Other programs' vocabularies give the tokens of the tokenizer that they were made from."""

from __future__ import annotations

import base64
import random
import sysconfig
from pathlib import Path

import pytest

from tinyllm.tokenizer import BPETokenizer, CharTokenizer, formats
from tinyllm.tokenizer.formats import load_vocabulary

TEXT = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8") + "Grüße, 日本語 🙂\n" * 5


@pytest.fixture(scope="module")
def original() -> BPETokenizer:
    return BPETokenizer.from_texts([TEXT], 1200)


@pytest.fixture
def gpt2(original: BPETokenizer, tmp_path: Path) -> Path:
    """Write vocab.json and merges.txt as the library does."""
    original._tokenizer.model.save(str(tmp_path))
    return tmp_path


@pytest.fixture
def tiktoken(original: BPETokenizer, tmp_path: Path) -> Path:
    """Write the same tokens in tiktoken's format: without <|endoftext|>, the id 0 of the original."""
    byte_of = {letter: byte for byte, letter in enumerate(formats._byte_letters())}
    ids = original._tokenizer.get_vocab()
    lines = [
        base64.b64encode(bytes(byte_of[letter] for letter in token)) + b" %d\n" % (index - 1)
        for token, index in ids.items()
        if index != original.end_of_text_id
    ]
    random.Random(0).shuffle(lines)  # their order says nothing
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("name", ["", "vocab.json", "merges.txt"])
def test_gpt2_files(name: str, original: BPETokenizer, gpt2: Path) -> None:
    loaded = load_vocabulary(gpt2 / name)
    assert loaded.encode(TEXT) == original.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert (loaded.vocab_size, loaded.end_of_text_id) == (original.vocab_size, original.end_of_text_id)
    assert loaded.encode("<|endoftext|>") == original.encode("<|endoftext|>")  # text is only text


def test_gpt2_files_by_their_first_names(original: BPETokenizer, gpt2: Path) -> None:
    (gpt2 / "vocab.json").rename(gpt2 / "encoder.json")
    (gpt2 / "merges.txt").rename(gpt2 / "vocab.bpe")
    for name in ("", "encoder.json", "vocab.bpe"):
        assert load_vocabulary(gpt2 / name).encode(TEXT) == original.encode(TEXT)


def test_tiktoken(original: BPETokenizer, tiktoken: Path) -> None:
    for path in (tiktoken, tiktoken.parent):
        loaded = load_vocabulary(path)
        assert [index + 1 for index in loaded.encode(TEXT)] == original.encode(TEXT)
        assert loaded.decode(loaded.encode(TEXT)) == TEXT
        assert loaded.vocab_size == original.vocab_size
        assert loaded.end_of_text_id == loaded.vocab_size - 1  # after the last one


def test_the_letters_of_bytes() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(formats._byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert formats._byte_letters()[ord(" ")] == "Ġ"


def test_a_saved_vocabulary_is_the_same(original: BPETokenizer, tiktoken: Path, tmp_path: Path) -> None:
    loaded = load_vocabulary(tiktoken)
    loaded.save(tmp_path / "tokenizer.json")
    again = load_vocabulary(tmp_path / "tokenizer.json")
    assert again.encode(TEXT) == loaded.encode(TEXT)
    assert again.end_of_text_id == loaded.end_of_text_id


def test_our_own_files(tmp_path: Path) -> None:
    CharTokenizer.from_texts(["abc"]).save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_vocabulary(path).encode("cab") == [2, 0, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"IQ== 0\nnot base64! 1\n", "line 2, is not a token in base64"),
        (b"IQ== zero\n", "line 1, is not a token in base64"),
        (b"IQ== 0\n", "needs every byte"),
        (b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)) + b"YWJj 256\n", "rank 256, b'abc'"),
    ],
)
def test_bad_tiktoken_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.tiktoken") as error:
        load_vocabulary(path)
    assert reason in str(error.value)


def test_what_is_missing_or_different(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        load_vocabulary(tmp_path / "nowhere.json")
    (gpt2 / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*merges.txt; GPT-2's vocabulary is two files"):
        load_vocabulary(gpt2)
    (gpt2 / "merges.txt").write_text("#version\na b c d\n")
    with pytest.raises(ValueError, match="are not a vocabulary"):
        load_vocabulary(gpt2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_vocabulary(tmp_path / "empty")
    (tmp_path / "cl100k_base.tiktoken").touch()
    with pytest.raises(ValueError, match="by other rules than GPT-2's"):
        load_vocabulary(tmp_path / "cl100k_base.tiktoken")
