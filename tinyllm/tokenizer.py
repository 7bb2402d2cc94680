"""Text to token ids and back: words as in the article, characters, or byte-level BPE.

| kind   | a token is            | unknown text is    | decode(encode(text)) is text           |
|--------|-----------------------|--------------------|----------------------------------------|
| `word` | a word: `text.split()`| `<UNK>`            | if all words are known, but for spaces |
| `char` | a Unicode character   | `<UNK>`            | if all characters are known            |
| `bpe`  | a run of bytes        | none: bytes are all| always                                 |

All three share the protocol `Tokenizer` and are saved as one `tokenizer.json`, which
`load_tokenizer` tells apart.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from tinyllm._files import write_text

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "<UNK>"
END_OF_TEXT = "<|endoftext|>"

# What other people's tokenizer.json files call the token that ends a document, most common first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

_FORMAT_KEY = "tinyllm_tokenizer"
_BYTES = 256  # every byte is a token of a byte-level BPE, so that no text is unknown to it


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of ids: each id is in `0 .. vocab_size - 1`."""

    @property
    def unknown_id(self) -> int | None:
        """The id that text outside the vocabulary gets, or None if there is no such text."""

    @property
    def end_of_text_id(self) -> int | None:
        """The id that ends a document, or None."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; `[]` for empty text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, in parallel where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Raises ValueError for an id outside `0 .. vocab_size - 1`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file that `load_tokenizer` reads back."""


_V = TypeVar("_V", bound="_VocabTokenizer")


class _VocabTokenizer:
    """A tokenizer that is a dict from token to id with `<UNK>` in it: words and characters."""

    kind: ClassVar[str]

    def __init__(self, vocab: Mapping[str, int]) -> None:
        """`vocab` maps each token to its id: the ids are 0 .. n-1, each once, and `<UNK>` has one.

        Raises:
            TypeError: `vocab` is not a mapping from str to int.
            ValueError: `<UNK>` is missing, or the ids are not 0 .. n-1, each once.
        """
        _check_vocab(vocab)
        self.vocab = dict(vocab)
        self._tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        self._unknown_id = self.vocab[UNKNOWN]

    @classmethod
    def from_texts(cls: type[_V], texts: Iterable[str], vocab_size: int | None = None) -> _V:
        """Build the vocabulary from text: the most frequent token gets id 0, `<UNK>` the last id.

        Tokens of equal count keep the order in which the texts bring them.

        Args:
            texts: the documents; read once.
            vocab_size: the largest vocabulary wanted, `<UNK>` included; None keeps every token.

        Raises:
            ValueError: the texts hold no token, or `vocab_size` is below 2.
        """
        check_vocab_size(cls.kind, vocab_size)
        counts: Counter[str] = Counter()
        for text in _each_text(texts):
            counts.update(cls.split(text))
        counts.pop(UNKNOWN, None)  # the text may name it; it has its own place
        if not counts:
            raise ValueError(f"cannot build a {cls.kind} tokenizer: the corpus is empty")
        kept = counts.most_common(None if vocab_size is None else vocab_size - 1)
        vocab = {token: index for index, (token, _) in enumerate(kept)}
        vocab[UNKNOWN] = len(vocab)
        return cls(vocab)

    @staticmethod
    def split(text: str) -> Iterable[str]:
        """The tokens of `text`, known or not."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def unknown_id(self) -> int:
        return self._unknown_id

    @property
    def end_of_text_id(self) -> None:
        return None

    def encode(self, text: str) -> list[int]:
        _check_str(text)
        get, unknown = self.vocab.get, self._unknown_id
        return [get(token, unknown) for token in self.split(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _decode_tokens(self, ids: Iterable[int]) -> Iterator[str]:
        for index in ids:
            if not 0 <= index < len(self._tokens):
                raise _bad_id(index, self.vocab_size)
            yield self._tokens[index]

    def save(self, path: str | os.PathLike[str]) -> None:
        content = {_FORMAT_KEY: self.kind, "version": 1, "vocab": self.vocab}
        write_text(path, json.dumps(content, ensure_ascii=True, indent=1) + "\n")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class WordTokenizer(_VocabTokenizer):
    """The article's tokenizer: `text.split()`, each word an id, the id of `<UNK>` for the others.

    White space is not kept: `decode` puts one space between words.

    >>> tokenizer = WordTokenizer({"hello": 0, "world": 1, "<UNK>": 2})
    >>> tokenizer.encode("hello there world")
    [0, 2, 1]
    >>> tokenizer.decode([0, 2, 1])
    'hello <UNK> world'
    """

    kind: ClassVar[str] = "word"

    @staticmethod
    def split(text: str) -> list[str]:
        return text.split()

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self._decode_tokens(ids))


class CharTokenizer(_VocabTokenizer):
    """One id for each Unicode character of the text it was built from, `<UNK>` for all others."""

    kind: ClassVar[str] = "char"

    def __init__(self, vocab: Mapping[str, int]) -> None:
        super().__init__(vocab)
        for token in self.vocab:
            if len(token) != 1 and token != UNKNOWN:
                raise ValueError(f"a char tokenizer's tokens are single characters or {UNKNOWN}, not {token!r}")

    @staticmethod
    def split(text: str) -> str:
        return text

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._decode_tokens(ids))


class BPETokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, as GPT-2's, by the library `tokenizers`.

    Wraps a `tokenizers.Tokenizer`, so any `tokenizer.json` of the Hugging Face hub loads: another
    BPE, WordPiece or Unigram. Two things differ from using such a file bare, because a corpus has
    to come through whole: text is only text (a document that spells out `<|endoftext|>` does not
    get the special id, and no start or end tokens are added), and the file's truncation and
    padding are switched off.
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError("the tokenizer's vocabulary is empty")
        # Ids can have holes, and an embedding needs a row up to the last of them.
        self._vocab_size = max(ids.values()) + 1
        self._end_of_text_id = next((ids[name] for name in _END_OF_TEXT_NAMES if name in ids), None)
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown_id = ids.get(unknown) if unknown is not None else None

    @classmethod
    def from_texts(cls, texts: Iterable[str], vocab_size: int = 4096) -> BPETokenizer:
        """Learn the merges of a byte-level BPE from text.

        Args:
            texts: the documents; read once, as a stream.
            vocab_size: the largest vocabulary wanted, at least 257: the 256 bytes and
                `<|endoftext|>`. A small corpus may offer fewer merges; `tokenizer.vocab_size` is
                what came of it.

        Raises:
            ValueError: the texts hold no character, or `vocab_size` is below 257.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        check_vocab_size(cls.kind, vocab_size)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once teaches nothing about other text
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        characters = 0

        def counted() -> Iterator[str]:
            nonlocal characters
            for text in _each_text(texts):
                characters += len(text)
                yield text

        tokenizer.train_from_iterator(counted(), trainer)
        if characters == 0:
            raise ValueError("cannot train a bpe tokenizer: the corpus is empty")
        return cls(tokenizer)

    @classmethod
    def _from_json(cls, text: str, path: Path) -> BPETokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def unknown_id(self) -> int | None:
        return self._unknown_id

    @property
    def end_of_text_id(self) -> int | None:
        return self._end_of_text_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises ValueError if it holds lone surrogates: no UTF-8 text does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:  # the library says "must be str" of a str with surrogates, too
                _check_str(text)
                _check_utf8(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not whole UTF-8 characters come out as U+FFFD."""
        ids = list(ids)
        for index in ids:  # the library leaves unknown ids out without a word
            if not 0 <= index < self._vocab_size:
                raise _bad_id(index, self._vocab_size)
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_text(path, self._tokenizer.to_str(pretty=True) + "\n")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def check_vocab_size(kind: str, vocab_size: int | None) -> None:
    """Make sure that `vocab_size` tokens are enough for a tokenizer of `kind`. Raises ValueError if they are not."""
    if vocab_size is None:
        return
    if kind == "bpe" and vocab_size < _BYTES + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level BPE needs at least {_BYTES + 1}: 256 bytes and {END_OF_TEXT}"
        )
    if kind != "bpe" and vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; a {kind} tokenizer needs at least 2: {UNKNOWN} and one {kind}")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Build a tokenizer of `kind` from texts.

    Args:
        kind: `"word"`, `"char"` or `"bpe"`.
        texts: the documents; read once, as a stream.
        vocab_size: the largest vocabulary wanted; None means every word or character, 4096 for BPE.

    Raises:
        ValueError: `kind` is another one, the texts are empty, or `vocab_size` is too small.
    """
    match kind:
        case "word":
            return WordTokenizer.from_texts(texts, vocab_size)
        case "char":
            return CharTokenizer.from_texts(texts, vocab_size)
        case "bpe":
            return BPETokenizer.from_texts(texts) if vocab_size is None else BPETokenizer.from_texts(texts, vocab_size)
    raise ValueError(f"tokenizer is {kind!r}; allowed are 'word', 'char' and 'bpe'")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a `tokenizer.json`: our word or character tokenizer, or any that `tokenizers` reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or is not a tokenizer.
    """
    path = Path(path)
    text = _read(path)
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer file, or is truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a tokenizer file: its JSON is not an object")
    if _FORMAT_KEY not in content:
        return BPETokenizer._from_json(text, path)
    classes = {cls.kind: cls for cls in (WordTokenizer, CharTokenizer)}
    kind = content[_FORMAT_KEY]
    if not isinstance(kind, str) or kind not in classes or content.get("version") != 1:
        raise ValueError(
            f"{path} holds a tokenizer of kind {kind!r}, version {content.get('version')!r}; "
            f"this program reads version 1 of {' and '.join(map(repr, classes))}"
        )
    try:
        return classes[kind](content.get("vocab", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole {kind} tokenizer: {error}") from error


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer file: it is not UTF-8 text ({error.reason})") from error


def _each_text(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # iterating over it would make each character a document
        raise TypeError("texts is one str; pass an iterable of documents, such as [text]")
    return texts


def _check_vocab(vocab: Mapping[str, int]) -> None:
    if not isinstance(vocab, Mapping):
        raise TypeError(f"vocab is a {type(vocab).__name__}; it must map each token to its id")
    for token, index in vocab.items():
        if not isinstance(token, str) or not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"vocab maps {token!r} to {index!r}; it must map str to int")
    if UNKNOWN not in vocab:
        raise ValueError(f"vocab has no {UNKNOWN!r}, the token for text that it does not know")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"vocab's ids must be 0 .. {len(vocab) - 1}, each once")


def _check_str(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r:.60}; it must be a str")


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at index {error.start}: it is not valid Unicode"
        ) from error


def _bad_id(index: int, vocab_size: int) -> ValueError:
    return ValueError(f"token id {index} is out of range; the tokenizer's ids are 0 .. {vocab_size - 1}")
