"""Load vocabularies in other programs' formats: GPT-2's vocab.json and merges.txt, and tiktoken's."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllm._internal.extras import from_extra
from tinyllm.tokenizer.base import END_OF_TEXT, Tokenizer
from tinyllm.tokenizer.bpe import BPETokenizer
from tinyllm.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from tokenizers.models import Model

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

# Vocabularies of tiktoken's that split words by other rules than GPT-2's.
_OTHER_RULES = ("cl100k", "o200k")


def load_vocabulary(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from whatever file or directory holds one.

    Args:
        path: a tokenizer.json, our own or of the library `tokenizers`; GPT-2's vocab.json (or encoder.json) or
            merges.txt (or vocab.bpe), the other beside it; a `.tiktoken` file such as r50k_base.tiktoken or
            gpt2.tiktoken, which splits words as GPT-2 does; or a directory with one of these.

    Returns:
        The tokenizer. A byte-level vocabulary without `<|endoftext|>` gets it as the id after its last one.

    Raises:
        FileNotFoundError: there is no such file, or none in the directory.
        ValueError: it is not a tokenizer, or one of tiktoken's that splits words by other rules.
    """
    path = Path(path)
    if path.is_dir():
        names = ["tokenizer.json", VOCAB_FILE, "encoder.json", *sorted(file.name for file in path.glob("*.tiktoken"))]
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"there is no tokenizer in {path}: no tokenizer.json, no {VOCAB_FILE} with {MERGES_FILE}, no .tiktoken"
            )
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    if path.suffix == ".tiktoken":
        return _load_tiktoken(path)
    pairs = ((VOCAB_FILE, MERGES_FILE), ("encoder.json", "vocab.bpe"))
    for vocab, merges in pairs:
        if path.name in (vocab, merges):
            return _load_gpt2(path.with_name(vocab), path.with_name(merges))
    return load_tokenizer(path)


def _load_gpt2(vocab: Path, merges: Path) -> BPETokenizer:
    with from_extra("train"):
        from tokenizers import models

    for path in (vocab, merges):
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}; GPT-2's vocabulary is two files, {vocab.name} and {merges.name}"
            )
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise ValueError(f"{vocab} and {merges} are not a vocabulary: {error}") from error
    return _byte_level(model)


def _load_tiktoken(path: Path) -> BPETokenizer:
    """Load a file of which each line is a token in base64 and its rank, which is its id; the ranks give the merges."""
    with from_extra("train"):
        from tokenizers import models

    if path.name.startswith(_OTHER_RULES):
        raise ValueError(f"{path.name} splits words by other rules than GPT-2's; give its tokenizer.json instead")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            encoded, written = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(written)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}, is not a token in base64 and its rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise ValueError(f"{path} is not a whole vocabulary: it needs every byte, and the ranks 0 .. n-1, each once")
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge(token, ranks, rank)
            if len(parts) != 2:
                raise ValueError(f"{path}: the token of rank {rank}, {token!r}, is not two tokens of lower ranks")
            merges.append((spell(parts[0]), spell(parts[1])))
    return _byte_level(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Return the parts into which byte-pair encoding with the merges of ranks below `limit` divides `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _byte_letters() -> list[str]:
    """Return the letter by which GPT-2's files write each byte: itself if it is visible, else one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def _byte_level(model: Model) -> BPETokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(library)
