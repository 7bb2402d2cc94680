"""Tokenizers: round trips, unknown text, files, and what they refuse."""

from __future__ import annotations

import json

import pytest

from tinyllm.reference import tokenize
from tinyllm.tokenizer import (
    END_OF_TEXT,
    UNKNOWN,
    BPETokenizer,
    CharTokenizer,
    WordTokenizer,
    load_tokenizer,
    train_tokenizer,
)

ARTICLE_VOCAB = {"hello": 0, "world": 1, "how": 2, "are": 3, "you": 4, "<UNK>": 5}
ARTICLE_TEXTS = ["hello world how are you", "how are you hello world"]
CODE = "def add(a, b):\n    return a + b\n\n\nclass Adder:\n\tpass\n" * 20
ODD_TEXTS = [
    "",
    " ",
    "\n\n  \t\n",
    "naïve café, Привет, 你好",
    "🙂👩‍👩‍👧‍👦🇨🇭 e\u0301",
    "\u0000\u0001\u007f\u2028",
    "trailing space ",
    f"text that spells out {END_OF_TEXT} and {UNKNOWN}",
    "a" * 1000,
]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.from_texts([CODE], vocab_size=300)


# Round trips


@pytest.mark.parametrize("text", [*ODD_TEXTS, CODE])
def test_bpe_brings_back_any_text(bpe: BPETokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bool(ids) == bool(text)
    assert all(0 <= index < bpe.vocab_size for index in ids)


@pytest.mark.parametrize("text", [*ODD_TEXTS, CODE])
def test_char_brings_back_text_of_known_characters(text: str) -> None:
    tokenizer = CharTokenizer.from_texts([*ODD_TEXTS, CODE])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.unknown_id not in ids
    assert tokenizer.decode(ids) == text


def test_word_brings_back_words_and_not_white_space() -> None:
    tokenizer = WordTokenizer.from_texts(ARTICLE_TEXTS)
    assert tokenizer.decode(tokenizer.encode("  you\n are\thello ")) == "you are hello"
    assert tokenizer.encode("") == [] == tokenizer.encode(" \n")
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_encode_batch_is_encode_of_each(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [CODE])
    texts = ["", "def f():", "return a", CODE]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


# The article's tokenizer


def test_word_is_the_articles_tokenize() -> None:
    tokenizer = WordTokenizer(ARTICLE_VOCAB)
    for text in [*ARTICLE_TEXTS, "hello there world", "", " how  ARE\nyou <UNK>"]:
        assert tokenizer.encode(text) == tokenize(text, ARTICLE_VOCAB)
    assert tokenizer.vocab_size == 6
    assert tokenizer.unknown_id == 5
    assert tokenizer.decode([0, 5, 1]) == "hello <UNK> world"


def test_word_built_from_the_articles_text_is_the_articles_vocabulary() -> None:
    assert WordTokenizer.from_texts(ARTICLE_TEXTS).vocab == ARTICLE_VOCAB


def test_vocab_ids_may_be_in_any_order() -> None:
    tokenizer = WordTokenizer({"<UNK>": 0, "b": 2, "a": 1})
    assert tokenizer.encode("a b c") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0]) == "a b <UNK>"


def test_vocab_size_keeps_the_most_frequent() -> None:
    tokenizer = WordTokenizer.from_texts(["rare often often", "often medium medium"], vocab_size=3)
    assert tokenizer.vocab == {"often": 0, "medium": 1, UNKNOWN: 2}
    assert tokenizer.encode("rare often") == [2, 0]
    assert CharTokenizer.from_texts(["aaab"], vocab_size=2).vocab == {"a": 0, UNKNOWN: 1}


# Unknown text and special tokens


def test_char_of_unknown_characters() -> None:
    tokenizer = CharTokenizer.from_texts(["abc"])
    assert tokenizer.encode("aXb") == [0, tokenizer.unknown_id, 1]
    assert tokenizer.decode(tokenizer.encode("aX")) == "a<UNK>"


def test_bpe_keeps_the_end_of_text_id_out_of_text(bpe: BPETokenizer) -> None:
    assert bpe.end_of_text_id is not None
    assert bpe.end_of_text_id not in bpe.encode(f"a{END_OF_TEXT}b")
    assert bpe.decode([bpe.end_of_text_id]) == END_OF_TEXT
    assert bpe.unknown_id is None


def test_bpe_learns_merges_up_to_vocab_size(bpe: BPETokenizer) -> None:
    assert BPETokenizer.from_texts([CODE], vocab_size=270).vocab_size == 270
    assert 270 < bpe.vocab_size < 300  # all merges that the text offers
    assert len(bpe.encode(CODE)) < len(CODE) / 1.5
    assert BPETokenizer.from_texts(["ab"], vocab_size=5000).vocab_size == 257  # nothing to merge


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_training_is_deterministic_and_takes_a_stream(kind: str) -> None:
    first = train_tokenizer(kind, iter([CODE, "other text"]))
    second = train_tokenizer(kind, (text for text in [CODE, "other text"]))
    assert first.encode(CODE) == second.encode(CODE)
    assert first.vocab_size == second.vocab_size


# Files


@pytest.mark.parametrize(("kind", "cls"), [("word", WordTokenizer), ("char", CharTokenizer), ("bpe", BPETokenizer)])
def test_save_and_load(kind, cls, tmp_path) -> None:
    tokenizer = train_tokenizer(kind, [*ODD_TEXTS, CODE], 400)
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert type(loaded) is cls
    assert loaded.kind == kind
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.unknown_id == tokenizer.unknown_id
    assert loaded.end_of_text_id == tokenizer.end_of_text_id
    for text in [*ODD_TEXTS, CODE]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]  # nothing left over


def test_char_keeps_lone_surrogates_through_a_file(tmp_path) -> None:
    CharTokenizer.from_texts(["a\udc80"]).save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").encode("\udc80a") == [1, 0]


def test_loads_another_librarys_file_and_lets_text_through_whole(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    other = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 7}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 7)])
    other.enable_truncation(2)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))

    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, BPETokenizer)
    assert loaded.encode("a b a c") == [1, 2, 1, 0]  # not cut to 2, not padded, no </s>
    assert loaded.unknown_id == 0
    assert loaded.end_of_text_id == 7
    assert loaded.vocab_size == 8  # the ids have holes; an embedding needs all 8 rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "truncated"),
        ("hello", "not a tokenizer file"),
        ("[1, 2]", "not an object"),
        ("{}", "not a tokenizer file"),
        ('{"version": "1.0", "model": {"type": "BPE"}}', "not a tokenizer file"),
        ('{"tinyllm_tokenizer": "sentence", "version": 1}', "'sentence'"),
        ('{"tinyllm_tokenizer": "word", "version": 2, "vocab": {"<UNK>": 0}}', "version 2"),
        ('{"tinyllm_tokenizer": "word", "version": 1}', "not a whole word tokenizer"),
        ('{"tinyllm_tokenizer": "word", "version": 1, "vocab": {"a": 0}}', "<UNK>"),
        ('{"tinyllm_tokenizer": "word", "version": 1, "vocab": {"a": "x", "<UNK>": 0}}', "'x'"),
        ('{"tinyllm_tokenizer": "char", "version": 1, "vocab": {"ab": 0, "<UNK>": 1}}', "'ab'"),
    ],
)
def test_foreign_files_are_refused_by_name(content: str, reason: str, tmp_path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"foreign.json") as error:
        load_tokenizer(path)
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_truncated_files_are_refused_by_name(kind: str, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(kind, [CODE], 300).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer file, or is truncated"):
        load_tokenizer(path)


def test_missing_and_binary_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.json"):
        load_tokenizer(tmp_path / "binary.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tokenizer.json"
    WordTokenizer(ARTICLE_VOCAB).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        WordTokenizer({"<UNK>": 0}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


# Refusals


@pytest.mark.parametrize(
    ("vocab", "error", "reason"),
    [
        ({}, ValueError, "<UNK>"),
        ({"hello": 0}, ValueError, "<UNK>"),
        ({"hello": 1, "<UNK>": 2}, ValueError, "0 .. 1"),
        ({"hello": 0, "<UNK>": 0}, ValueError, "each once"),
        ({"hello": "0", "<UNK>": 1}, TypeError, "'hello'"),
        ({"hello": True, "<UNK>": 0}, TypeError, "'hello'"),
        (["hello", "<UNK>"], TypeError, "list"),
    ],
)
def test_bad_vocabularies(vocab, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        WordTokenizer(vocab)


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_corpus(kind: str, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        train_tokenizer(kind, texts)


def test_corpus_without_words() -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        train_tokenizer("word", [" \n\t "])


@pytest.mark.parametrize(("kind", "size", "least"), [("word", 1, "2"), ("char", 0, "2"), ("bpe", 256, "257")])
def test_too_small_vocab_size(kind: str, size: int, least: str) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size is {size}.*at least {least}"):
        train_tokenizer(kind, [CODE], size)


def test_unknown_kind_and_a_bare_string() -> None:
    with pytest.raises(ValueError, match=r"'byte'.*'word', 'char' and 'bpe'"):
        train_tokenizer("byte", [CODE])
    for kind in ("word", "char", "bpe"):
        with pytest.raises(TypeError, match="iterable of documents"):
            train_tokenizer(kind, "one string")


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_ids_out_of_range(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [CODE], 300)
    for index in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(ValueError, match=rf"{index} is out of range.* 0 .. {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, index])


def test_bpe_refuses_what_is_not_unicode(bpe: BPETokenizer) -> None:
    with pytest.raises(ValueError, match=r"surrogate.*index 2"):
        bpe.encode("ab\udc80")
    with pytest.raises(TypeError):
        bpe.encode(b"bytes")  # type: ignore[arg-type]


def test_files_are_ascii_json_that_a_person_can_read(tmp_path) -> None:
    WordTokenizer(ARTICLE_VOCAB).save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text("ascii"))["vocab"] == ARTICLE_VOCAB
