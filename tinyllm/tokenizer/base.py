"""Protocol of a tokenizer, and the checks that all of them make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

UNKNOWN = "<UNK>"


END_OF_TEXT = "<|endoftext|>"


BYTES = 256  # every byte is a token of a byte-level BPE, so that no text is unknown to it
FORMAT_KEY = "tinyllm_tokenizer"


class Tokenizer(Protocol):
    """Protocol that training and generation expect of a tokenizer."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Number of ids: each id is in `0 .. vocab_size - 1`."""

    @property
    def unknown_id(self) -> int | None:
        """Return the id of text outside the vocabulary, or None if there is no such text."""

    @property
    def end_of_text_id(self) -> int | None:
        """Return the id that ends a document, or None."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; `[]` for empty text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `[encode(text) for text in texts]`, in parallel where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Raises ValueError for an id outside `0 .. vocab_size - 1`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file that `load_tokenizer` reads back."""


def read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer file: it is not UTF-8 text ({error.reason})") from error


def each_text(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # iterating over it would make each character a document
        raise TypeError("texts is one str; pass an iterable of documents, such as [text]")
    return texts


def check_str(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r:.60}; it must be a str")


def check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at index {error.start}: it is not valid Unicode"
        ) from error


def bad_id(index: int, vocab_size: int) -> ValueError:
    return ValueError(f"token id {index} is out of range; the tokenizer's ids are 0 .. {vocab_size - 1}")


def check_vocab_size(kind: str, vocab_size: int | None) -> None:
    """Make sure that `vocab_size` tokens are enough for a tokenizer of `kind`. Raises ValueError if they are not."""
    if vocab_size is None:
        return
    if kind == "bpe" and vocab_size < BYTES + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level BPE needs at least {BYTES + 1}: 256 bytes and {END_OF_TEXT}"
        )
    if kind != "bpe" and vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; a {kind} tokenizer needs at least 2: {UNKNOWN} and one {kind}")
