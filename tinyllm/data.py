"""From files to tokens: find the text, read it, write its tokens to disk. `tinyllm.batches` serves them.

    files -read_text-> documents -tokenizer-> train.bin, val.bin

Every step is a stream, so memory holds one document at a time, whatever the corpus. The token files
are bare arrays of uint16 (uint32 from 65,537 ids on), memory-mapped when read.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from tinyllm._files import replacing
from tinyllm.tokenizer import Tokenizer

TRAIN_FILE = "train.bin"
VAL_FILE = "val.bin"

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_RUN_FILES = {"config.json", "tokenizer.json", "metrics.jsonl"}
_SNIFFED_BYTES = 8192  # as git does: a file with a NUL byte this early is binary
_BATCH_CHARACTERS = 1 << 20  # text tokenized at once: enough to keep every core busy, little memory


@dataclass(frozen=True)
class Corpus:
    """The text files to train on, one document each.

    Attributes:
        name: what to call it in a sentence or a title.
        files: the files, in an order that does not depend on the machine.
        skipped: binary files that lay in the directories and are left out.
    """

    name: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def texts(self, seed: int) -> Iterator[str]:
        """The text of each file, in an order shuffled by `seed`. Raises like `read_text`."""
        files = list(self.files)
        random.Random(seed).shuffle(files)
        return map(read_text, files)


def standard_library(root: Path | None = None) -> Corpus:
    """The source code of Python's own standard library: real text that every machine has.

    All `*.py` files but the tests; about 12 MB in 734 files for Python 3.11.

    Args:
        root: where the library lies; default: where `sysconfig` says.

    Raises:
        FileNotFoundError: the library is installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [path for path in _walk(root, _NOT_THE_LIBRARY) if path.suffix == ".py"]
    if not files:
        raise FileNotFoundError(f"Python's standard library has no source files in {root}; choose other data")
    return Corpus(f"Python {python_version()}'s standard library", tuple(files))


def find_files(paths: Sequence[str | os.PathLike[str]]) -> Corpus:
    """The text files that `paths` name.

    A file counts as it is. A directory contributes every file below it, except hidden ones (a name
    that starts with a dot), `__pycache__`, the run folders of earlier trainings, links to
    directories, and binary files: those with a NUL byte in the first 8 KiB, which are listed in
    `Corpus.skipped`. A file named twice counts once.

    Raises:
        FileNotFoundError: a path does not exist, or is neither a file nor a directory.
        ValueError: no path is given, or there is not one text file.
    """
    files: dict[Path, Path] = {}  # real path -> the path to call it by
    skipped: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_file():
            files.setdefault(path.resolve(), path)
        elif path.is_dir():
            for found in _walk(path):
                (skipped if _is_binary(found) else files).setdefault(found.resolve(), found)
        elif path.exists():
            raise FileNotFoundError(f"{path} is neither a file nor a directory")
        else:
            raise FileNotFoundError(f"there is no file or directory {path}")
    if not files:
        where = ", ".join(map(str, paths)) or "the empty list of paths"
        raise ValueError(f"no text file in {where}" + (f" ({len(skipped)} binary files)" if skipped else ""))
    name = str(paths[0]) if len(paths) == 1 else f"{len(files)} files"
    left_out = tuple(path for real, path in skipped.items() if real not in files)
    return Corpus(name, tuple(files.values()), left_out)


def _walk(root: Path, excluded: Iterable[str] = ()) -> Iterator[Path]:
    """Every file below `root` in sorted order, without hidden and `excluded` ones."""
    passed = {"__pycache__", *excluded}

    def fail(error: OSError) -> None:  # os.walk passes over unreadable directories in silence
        raise error

    for directory, folders, names in os.walk(root, onerror=fail):
        if _RUN_FILES.issubset(names):  # a training in "." must not read what the last one wrote
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in passed)
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED_BYTES)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, its line ends as `\\n`, without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8 text; the message names it and the first bad byte.
        OSError: it cannot be read.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(content: bytes, path: str | os.PathLike[str]) -> str:
    """The text of the bytes of `path`, as `read_text` gives it."""
    nul = content.find(b"\0")  # valid UTF-8, but never in a text: UTF-16 or a binary file
    if nul >= 0:
        raise ValueError(f"{path} is not a text file: it has a NUL byte at offset {nul}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(error.object)  # the decoder has taken a byte order mark off
        raise ValueError(
            f"{path} is not a UTF-8 text file: byte 0x{content[offset]:02x} at offset {offset} ({error.reason})"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of a token file: uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class TokenFiles:
    """Where the tokens lie and how many there are."""

    train: Path
    val: Path
    train_tokens: int
    val_tokens: int


def write_tokens(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    seq_len: int,
    val_fraction: float = 0.05,
) -> TokenFiles:
    """Tokenize documents into `directory`/train.bin and, their last `val_fraction`, val.bin.

    Each document ends with the tokenizer's end-of-text token, if it has one. Both files appear only
    when all went well; files that were there before are then replaced.

    Args:
        texts: the documents, in the order in which they are to lie; read once, as a stream.
        tokenizer: any `Tokenizer`.
        directory: where to write; made if missing.
        seq_len: the sequence length that the training part must be able to serve.
        val_fraction: between 0 and 1; at least 2 tokens are taken, for one prediction.

    Raises:
        ValueError: the texts have no token, or too few for one sequence of `seq_len` and its
            target.
    """
    directory = Path(directory)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        train_path = stack.enter_context(replacing(directory / TRAIN_FILE))
        val_path = stack.enter_context(replacing(directory / VAL_FILE))
        total = 0
        with train_path.open("wb") as file:
            for ids in _encode(texts, tokenizer):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                total += len(ids)
        if total == 0:
            raise ValueError("the corpus is empty: it has no token")
        val_tokens = max(2, round(total * val_fraction))
        train_tokens = total - val_tokens
        if train_tokens < seq_len + 1:
            raise ValueError(
                f"the corpus is too short: of its {total} tokens {val_tokens} are kept for "
                f"validation, and the {max(train_tokens, 0)} left are fewer than seq_len + 1 = "
                f"{seq_len + 1}, a sequence and its target; add text or choose a smaller seq_len"
            )
        with train_path.open("r+b") as file:
            file.seek(train_tokens * dtype.itemsize)
            with val_path.open("wb") as val_file:
                while block := file.read(1 << 24):
                    val_file.write(block)
            file.truncate(train_tokens * dtype.itemsize)
    return TokenFiles(directory / TRAIN_FILE, directory / VAL_FILE, train_tokens, val_tokens)


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of all documents, in runs of about `_BATCH_CHARACTERS` characters."""
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    batch: list[tuple[str, bool]] = []  # a piece of text, and whether a document ends with it
    size = 0

    def flush() -> list[int]:
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        ids = [i for (_, last), run in zip(batch, encoded, strict=True) for i in (run + end if last else run)]
        batch.clear()
        return ids

    for text in texts:
        if not text:
            continue
        pieces = _pieces(text)
        batch += [(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield flush()
            size = 0
    if batch:
        yield flush()


def _pieces(text: str, size: int = _BATCH_CHARACTERS // 8) -> list[str]:
    """Cut a long text so that its pieces tokenize in parallel, to the same ids as the whole.

    A cut is made between a character that is not white space and a line end: no token of GPT-2's
    byte level, no word and no character spans that place.
    """
    pieces = []
    start = 0
    while len(text) - start > size:
        cut = text.find("\n", start + size)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def first_tokens(path: str | os.PathLike[str], vocab_size: int, count: int) -> list[int]:
    """The first `count` tokens of a token file, or all if it has fewer."""
    ids: list[int] = np.fromfile(path, dtype=token_dtype(vocab_size), count=count).tolist()
    return ids
