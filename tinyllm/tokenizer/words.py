"""Tokenizers that have a list of all tokens they know: words as in the article, or characters."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

from tinyllm._internal.files import write_text
from tinyllm.tokenizer.base import (
    FORMAT_KEY,
    UNKNOWN,
    bad_id,
    check_str,
    check_vocab_size,
    each_text,
)

_V = TypeVar("_V", bound="_VocabTokenizer")


class _VocabTokenizer(ABC):
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
        for text in each_text(texts):
            counts.update(cls.split(text))
        counts.pop(UNKNOWN, None)  # the text may name it; it has its own place
        if not counts:
            raise ValueError(f"cannot build a {cls.kind} tokenizer: the corpus is empty")
        kept = counts.most_common(None if vocab_size is None else vocab_size - 1)
        vocab = {token: index for index, (token, _) in enumerate(kept)}
        vocab[UNKNOWN] = len(vocab)
        return cls(vocab)

    @staticmethod
    @abstractmethod
    def split(text: str) -> Iterable[str]:
        """Return the tokens of `text`, known or not."""

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
        check_str(text)
        get, unknown = self.vocab.get, self._unknown_id
        return [get(token, unknown) for token in self.split(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _decode_tokens(self, ids: Iterable[int]) -> Iterator[str]:
        for index in ids:
            if not 0 <= index < len(self._tokens):
                raise bad_id(index, self.vocab_size)
            yield self._tokens[index]

    def save(self, path: str | os.PathLike[str]) -> None:
        content = {FORMAT_KEY: self.kind, "version": 1, "vocab": self.vocab}
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
