"""Train a tokenizer of any kind, and load one from its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyllm.tokenizer.base import (
    FORMAT_KEY,
    Tokenizer,
    read,
)
from tinyllm.tokenizer.bpe import BPETokenizer
from tinyllm.tokenizer.words import CharTokenizer, WordTokenizer


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
    text = read(path)
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer file, or is truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a tokenizer file: its JSON is not an object")
    if FORMAT_KEY not in content:
        return BPETokenizer._from_json(text, path)
    classes = {cls.kind: cls for cls in (WordTokenizer, CharTokenizer)}
    kind = content[FORMAT_KEY]
    if not isinstance(kind, str) or kind not in classes or content.get("version") != 1:
        raise ValueError(
            f"{path} holds a tokenizer of kind {kind!r}, version {content.get('version')!r}; "
            f"this program reads version 1 of {' and '.join(map(repr, classes))}"
        )
    try:
        return classes[kind](content.get("vocab", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole {kind} tokenizer: {error}") from error
