"""Byte-level BPE, on the library `tokenizers`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinyllm._internal.extras import from_extra
from tinyllm._internal.files import write_text
from tinyllm.tokenizer.base import (
    END_OF_TEXT,
    bad_id,
    check_str,
    check_utf8,
    check_vocab_size,
    each_text,
)

if TYPE_CHECKING:
    import tokenizers

# What other people's tokenizer.json files call the token that ends a document, most common first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


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
        with from_extra("train"):
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
            for text in each_text(texts):
                characters += len(text)
                yield text

        tokenizer.train_from_iterator(counted(), trainer)
        if characters == 0:
            raise ValueError("cannot train a bpe tokenizer: the corpus is empty")
        return cls(tokenizer)

    @classmethod
    def _from_json(cls, text: str, path: Path) -> BPETokenizer:
        with from_extra("train"):
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
        """Return the ids of `text`. Raises ValueError if it holds lone surrogates, which no UTF-8 text does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:  # the library says "must be str" of a str with surrogates, too
                check_str(text)
                check_utf8(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not whole UTF-8 characters become U+FFFD."""
        ids = list(ids)
        for index in ids:  # the library leaves unknown ids out without a word
            if not 0 <= index < self._vocab_size:
                raise bad_id(index, self._vocab_size)
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json."""
        return dict(json.loads(self._tokenizer.to_str()))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_text(path, self._tokenizer.to_str(pretty=True) + "\n")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"
