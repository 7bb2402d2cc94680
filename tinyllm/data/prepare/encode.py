"""Write documents as token shards, and tokenize a lot of text with a byte-level BPE: every word only once.

A byte-level BPE cuts a text into words by GPT-2's regular expression, and each word's ids depend on the word alone.
Text repeats its words, so a table from words to their ids does most of the work: cut (by Python's `re`), look up,
join. New words go to the library `tokenizers`, in batches. That makes it several times as fast as the library, which
goes through the same steps for every word, and the ids are the same.

The expression's classes of letters and digits are those of Unicode, which differ from version to version and from
library to library. So only ASCII is cut here: from a word that touches another character to the next white space, the
text goes to the library in one, and a text with white space beyond ASCII's goes there altogether.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.data.prepare.documents import Document
from tinyllm.data.shards import SPLITS, ShardFile, Split, shard_dtype
from tinyllm.tokenizer import BPETokenizer, Tokenizer

# GPT-2's expression, for ASCII. No word is matched that might go on in other characters; what touches these is matched
# by the line before the last, up to the next white space.
_OTHER = "\x80-\U0010ffff"
_MARKS = r"\x00-\x08\x0e-\x1b!-/:-@\[-`{-\x7f"
_WORDS = re.compile(
    rf" ?[A-Za-z]+(?![A-Za-z{_OTHER}])"
    r"|'(?:s|t|re|ve|m|ll|d)"
    rf"| ?[{_MARKS}]+(?![{_MARKS}{_OTHER}])"
    rf"| ?[0-9]+(?![0-9{_OTHER}])"
    rf"| ?[^\s{_OTHER}]*[{_OTHER}]\S*"
    r"|\s+(?!\S)|\s+",
)
# White space beyond ASCII's, and the control characters that `re` takes for white space, and others do not.
_OTHER_SPACE = re.compile("[\x1c-\x1f\x85\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f\u2060\u3000\ufeff]")
_MOST_WORDS = 1 << 18  # in the table: about 40 MB
_BATCH_CHARACTERS = 1 << 16
_LONGEST_WORD = 64  # characters; longer ones do not come again


def write_unit(
    number: int,
    documents: Iterable[Document],
    directory: Path,
    tokenizer: Tokenizer,
    encode: Callable[[list[str]], list[bytes]],
    *,
    choose: Callable[[], bool],
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Tokenize documents into the shards `train-NUMBER` and `val-NUMBER`.

    Args:
        number: The number of the unit.
        documents: What to tokenize, read as a stream.
        directory: The folder to write to.
        tokenizer: The tokenizer, whose end-of-text token ends each document.
        encode: The `token_encoder` of that tokenizer.
        choose: Called for each whole document; returns whether it is for validation.
        progress: Called with the bytes of text done since the last call.

    Returns:
        What the manifest needs to know: the bytes, documents and tokens, and the shards.

    Raises:
        ValueError: an input cannot be used.
        OSError: a file cannot be read or written.
    """
    dtype = shard_dtype(tokenizer)
    end = b"" if tokenizer.end_of_text_id is None else np.array([tokenizer.end_of_text_id], dtype=dtype).tobytes()
    total = 0
    batch: list[tuple[str, Split, bool]] = []  # a piece, its split, and whether its document ends with it
    with ExitStack() as stack:
        shards = {split: ShardFile(directory, f"{split}-{number:05d}", dtype, stack) for split in SPLITS}

        def flush() -> None:
            encoded = encode([piece for piece, _, _ in batch])
            for (_, split, ends), ids in zip(batch, encoded, strict=True):
                shards[split].write(ids + end if ends else ids)
                if ends:
                    shards[split].end_document()
            nonlocal total
            num_bytes = sum(len(p) if p.isascii() else len(p.encode()) for p, _, _ in batch)
            total += num_bytes
            progress(num_bytes)
            batch.clear()

        size = 0
        for document in documents:
            # A part of a long document is never for validation, which it might fill alone.
            split: Split = "val" if document.whole and choose() else "train"
            for piece, last in _with_last(document):
                batch.append((piece, split, last))
                size += len(piece)
                if size >= _BATCH_CHARACTERS:
                    flush()
                    size = 0
        if batch:
            flush()
        entries = {split: shard.finish() for split, shard in shards.items()}
    counts = {key: sum(entry[key] for entry in entries.values() if entry) for key in ("documents", "tokens")}
    return {"bytes": total, **counts, "shards": entries}


def _with_last(document: Document) -> Iterator[tuple[str, bool]]:
    """Yield the pieces, and whether a document ends with each."""
    before = None
    for piece in document.pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, document.ends


def token_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[bytes]]:
    """Return a function from texts to their ids, as the bytes that a shard holds.

    Its ids are those of `tokenizer.encode_batch`, and it raises what that raises. With a byte-level BPE that splits
    words as GPT-2 does it is the fast one.
    """
    dtype = shard_dtype(tokenizer)

    def encode(texts: list[str]) -> list[bytes]:
        return [np.array(ids, dtype=dtype).tobytes() for ids in tokenizer.encode_batch(texts)]

    if not (isinstance(tokenizer, BPETokenizer) and _splits_as_gpt2(tokenizer)):
        return encode
    table: dict[str, bytes] = {}

    def encode_words(texts: list[str]) -> list[bytes]:
        simple = [not _OTHER_SPACE.search(text) for text in texts]
        words = [_WORDS.findall(text) if plain else [text] for text, plain in zip(texts, simple, strict=True)]
        new = list(set().union(*words).difference(table))
        if len(table) + len(new) > _MOST_WORDS:
            table.clear()
            new = list(set().union(*words))
        table.update(zip(new, encode(new), strict=True))
        found = [b"".join(map(table.__getitem__, run)) for run in words]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del table[word]
        return found

    return encode_words


def _splits_as_gpt2(tokenizer: BPETokenizer) -> bool:
    """Return whether nothing but GPT-2's regular expression comes between a text and the merges of its words."""
    content = json.loads(tokenizer._tokenizer.to_str())
    splitter = content["pre_tokenizer"] or {}
    return (
        content["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter["add_prefix_space"]
        and splitter["use_regex"]
        and all(token["special"] for token in content["added_tokens"])  # others are found in text
        and content["model"]["type"] == "BPE"
        and not content["model"]["dropout"]
    )
