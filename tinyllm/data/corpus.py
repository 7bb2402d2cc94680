"""From files to tokens: find the text, read it, write its tokens to disk. `tinyllm.data.batches` serves them.

    paths -find_files-> Corpus -texts-> documents -tokenizer-> train.bin, val.bin

Files are found and read as `tinyllm prepare` does. Every step is a stream, so memory holds one document at a time,
whatever the corpus. The token files are bare arrays of uint16 (uint32 from 65,537 ids on), memory-mapped when read.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tinyllm._internal.files import replacing
from tinyllm._internal.words import count, option, size
from tinyllm.data.prepare.documents import cut_input, decode_blocks, decode_file, read_documents
from tinyllm.data.prepare.inputs import DATASET_PREFIX, STREAMS, Input, OnBad, Skipped, find_inputs, reason_of, walk
from tinyllm.data.prepare.streams import read_source
from tinyllm.data.shards import token_dtype
from tinyllm.runs.folder import TRAIN_FILE, VAL_FILE
from tinyllm.tokenizer import Tokenizer

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BATCH_CHARACTERS = 1 << 20  # text tokenized at once: enough to keep every core busy, little memory


@dataclass
class Corpus:
    """Texts to train on, or to evaluate: of a text file one document, of JSON lines and Parquet one a line or row.

    Attributes:
        name: what to call it in a sentence or a title.
        inputs: the files, and how each is read, in an order that does not depend on the machine.
        skipped: binary files that lay in the directories and are passed over.
        text_column: under which name JSON lines and Parquet files hold the text.
        notes: lines that say what was passed over below the directories, `skipped` and folders that `tinyllm` wrote.
        left_out: what could not be read, and was left out, up to now in the last call of `texts`. Only where that is
            allowed (`left_out.allowed`); `left_out.count` says how much, `left_out.named` gives examples with reasons.
    """

    name: str
    inputs: tuple[Input, ...]
    skipped: tuple[Path, ...] = ()
    text_column: str = "text"
    notes: tuple[str, ...] = ()
    left_out: Skipped = field(default_factory=lambda: Skipped(False))

    def __post_init__(self) -> None:
        self._not_found = self.left_out

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of `inputs`."""
        return tuple(Path(entry.path) for entry in self.inputs)

    @property
    def num_bytes(self) -> int:
        """The size of the files when they were found."""
        return sum(entry.size for entry in self.inputs)

    def describe(self) -> str:
        """Return name, number of files and size, in a line."""
        return ", ".join(dict.fromkeys((self.name, count(len(self.inputs), "file"), size(self.num_bytes))))

    def texts(self, seed: int) -> Iterator[str]:
        """Yield the documents that are not empty, file by file in an order shuffled by `seed`.

        Raises:
            ImportError: a library for some kind of file is missing; says what to install.
            ValueError: a file, a line or a row cannot be read, and `left_out` is not to note it; or nothing else is
                there. The message names the place.
        """
        inputs = list(self.inputs)
        random.Random(seed).shuffle(inputs)
        self.left_out = self._not_found.copy()  # each reading counts anew
        found = False
        for entry in inputs:
            for text in _documents(entry, self.text_column, self.left_out):
                found = True
                yield text
        if self.left_out.count and not found:
            raise ValueError(f"nothing in {self.name} can be read: {self.left_out.named[0]}")


def _documents(entry: Input, column: str, on_bad: OnBad) -> Iterator[str]:
    """Yield the documents of a file that are not empty."""
    if entry.kind == "text":
        try:
            text = "".join(decode_file(entry.path, translate=True))
        except (OSError, ValueError) as error:
            on_bad(entry.path, reason_of(error))
        else:
            yield from [text] if text else []
    elif entry.kind in STREAMS:
        yield from ("".join(document.pieces) for document in read_source(entry, column, on_bad))
    else:
        for part in cut_input(entry, sys.maxsize, column, on_bad):
            for document in read_documents(part, column, on_bad):
                yield "".join(document.pieces)


def standard_library(root: Path | None = None) -> Corpus:
    """Return the source code of Python's own standard library: real text that every machine has.

    All `*.py` files but the tests; about 12 MB in 734 files for Python 3.11.

    Args:
        root: where the library lies; default: where `sysconfig` says.

    Raises:
        FileNotFoundError: the library is installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [path for path in walk(root, _NOT_THE_LIBRARY) if path.suffix == ".py"]
    if not files:
        raise FileNotFoundError(f"Python's standard library has no source files in {root}; choose other data")
    inputs = tuple(Input(str(path), "text", path.stat().st_size) for path in files)
    return Corpus(f"Python {python_version()}'s standard library", inputs)


def find_files(paths: Sequence[str | os.PathLike[str]], *, text_column: str = "text", skip_bad: bool = False) -> Corpus:
    """Return the texts that `paths` name, as `tinyllm.data.prepare.inputs.find_inputs` finds them.

    Args:
        paths: files and directories: text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet.
        text_column: under which name JSON lines and Parquet files hold the text.
        skip_bad: leave out what cannot be read, and note it in `Corpus.left_out`.

    Raises:
        FileNotFoundError: a path does not exist, or is neither a file nor a directory.
        ValueError: a path is a Hugging Face dataset's name, a binary file, or a folder that `tinyllm` wrote; or there
            is no text at all.
    """
    for given in [os.fspath(path) for path in paths]:
        if given.startswith(DATASET_PREFIX):
            raise ValueError(
                f"{given} is a dataset of the Hugging Face Hub, which only `tinyllm prepare` reads: tinyllm prepare "
                f"--data {given} --out DIR, and then tinyllm train --data DIR"
            )
    left_out = Skipped(skip_bad)
    found = find_inputs(paths, left_out)
    name = str(paths[0]) if len(paths) == 1 else count(len(found.inputs), "file")
    skipped = tuple(Path(path) for path, _ in found.binary)
    return Corpus(name, tuple(found.inputs), skipped, text_column, tuple(found.notes()), left_out)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, its line ends as `\\n`, without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8 text; the message names it and the first bad byte.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return decode_text(file, os.fspath(path))


def decode_text(file: BinaryIO, name: str) -> str:
    """Return the text of an open file that messages call `name`, as `read_text` does."""
    try:
        return "".join(decode_blocks(file, translate=True))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


@dataclass(frozen=True)
class TokenFiles:
    """The token files of a corpus.

    Attributes:
        train, val: the files.
        train_tokens, val_tokens: how many tokens each has.
        unknown: tokens that stand for text outside the vocabulary, in both together.
    """

    train: Path
    val: Path
    train_tokens: int
    val_tokens: int
    unknown: int = 0


def write_tokens(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    seq_len: int,
    val_fraction: float = 0.05,
    progress: bool = False,
    num_bytes: int | None = None,
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
        progress: show a progress bar on stderr if it takes more than two seconds.
        num_bytes: about how many bytes the texts have, for the bar to say how long it will take.

    Raises:
        ValueError: the texts have no token, or too few for one sequence of `seq_len` and its
            target.
    """
    directory = Path(directory)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        train_path = stack.enter_context(replacing(directory / TRAIN_FILE))
        val_path = stack.enter_context(replacing(directory / VAL_FILE))
        total = unknown = 0
        bar = stack.enter_context(
            tqdm(
                total=num_bytes,
                desc="tokenizing",
                unit="B",
                unit_scale=True,
                delay=2,
                leave=False,
                disable=not progress,
            )
        )
        with train_path.open("wb") as file:
            for ids in _encode(_counted(texts, bar), tokenizer):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                total += len(ids)
                unknown += 0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id)
        if total == 0:
            raise ValueError("the corpus is empty: it has no token")
        val_tokens = max(2, round(total * val_fraction))
        train_tokens = total - val_tokens
        if train_tokens < seq_len + 1:
            raise ValueError(
                f"the corpus is too short: of its {count(total, 'token')} {val_tokens} are kept for validation, and "
                f"the {max(train_tokens, 0)} left are fewer than the {seq_len + 1} of one sequence and its target "
                f"({option('seq_len')} {seq_len}, and 1); add text or choose a smaller {option('seq_len')}"
            )
        with train_path.open("r+b") as file:
            file.seek(train_tokens * dtype.itemsize)
            with val_path.open("wb") as val_file:
                while block := file.read(1 << 24):
                    val_file.write(block)
            file.truncate(train_tokens * dtype.itemsize)
    return TokenFiles(directory / TRAIN_FILE, directory / VAL_FILE, train_tokens, val_tokens, unknown)


def _counted(texts: Iterable[str], bar: tqdm[None]) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(len(text) if text.isascii() else len(text.encode()))


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
