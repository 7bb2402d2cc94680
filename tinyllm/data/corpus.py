"""Find text, read it, and write its tokens as shards, which `tinyllm.data.batches` serves.

    paths -find_files-> Corpus -documents-> tokenizer -write_shards-> shards

Files are found, read and tokenized as `tinyllm prepare` does, in one process. Every step is a stream, so memory holds
one document at a time, whatever the corpus.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tinyllm._internal.words import count, option, size
from tinyllm.data.prepare.documents import Document, cut_input, decode_blocks
from tinyllm.data.prepare.encode import token_encoder, write_unit
from tinyllm.data.prepare.inputs import DATASET_PREFIX, STREAMS, Input, Skipped, find_inputs, walk
from tinyllm.data.prepare.manifest import write_manifest
from tinyllm.data.prepare.streams import read_source
from tinyllm.data.shards import TOKENIZER_FILE, Shards, open_shards, token_dtype
from tinyllm.tokenizer import Tokenizer

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass
class Corpus:
    """Texts to train on, or to evaluate: of a text file one document, of JSON lines and Parquet one a line or row.

    Attributes:
        name: what to call it in a sentence or a title.
        inputs: the files, and how each is read, in an order that does not depend on the machine.
        text_column: under which name JSON lines and Parquet files hold the text.
        notes: lines that say what was passed over below the directories, binary files and folders that `tinyllm` wrote.
        left_out: what could not be read, and was left out, up to now in the last call of `texts`. Only where that is
            allowed (`left_out.allowed`); `left_out.count` says how much, `left_out.named` gives examples with reasons.
    """

    name: str
    inputs: tuple[Input, ...]
    text_column: str = "text"
    notes: tuple[str, ...] = ()
    left_out: Skipped = field(default_factory=lambda: Skipped(False))

    def __post_init__(self) -> None:
        self._not_found = self.left_out

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the paths of `inputs`."""
        return tuple(Path(entry.path) for entry in self.inputs)

    @property
    def num_bytes(self) -> int:
        """Return the size that the files had when they were found."""
        return sum(entry.size for entry in self.inputs)

    def describe(self) -> str:
        """Return name, number of files and size, in a line."""
        return ", ".join(dict.fromkeys((self.name, count(len(self.inputs), "file"), size(self.num_bytes))))

    def texts(self, seed: int) -> Iterator[str]:
        """Yield the texts of `documents(seed)`."""
        for document in self.documents(seed):
            yield "".join(document.pieces)

    def documents(self, seed: int) -> Iterator[Document]:
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
            whole = [entry] if entry.kind in STREAMS else cut_input(entry, sys.maxsize, self.text_column, self.left_out)
            for source in whole:
                for document in read_source(source, self.text_column, self.left_out):
                    found = True
                    yield document
        if self.left_out.count and not found:
            raise ValueError(f"nothing in {self.name} can be read: {self.left_out.named[0]}")


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
    return Corpus(name, tuple(found.inputs), text_column, tuple(found.notes()), left_out)


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


def write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    seed: int,
    seq_len: int,
    val_fraction: float = 0.05,
    progress: bool = False,
) -> Shards:
    """Tokenize a corpus in this process, into a folder of shards as `tinyllm prepare` makes them.

    No document is chosen for validation by chance, as it may be half of a small corpus: the last ones in the order of
    `seed` are, cut between two of them if there is a place with about `val_fraction` of the tokens behind it.

    Args:
        corpus: What to tokenize, read as a stream.
        tokenizer: Any `Tokenizer`; it is written beside the shards.
        directory: Where to write; made if missing.
        seed: Shuffles the files.
        seq_len: The sequence length that the training part must be able to serve.
        val_fraction: The share of tokens for validation, between 0 and 1; at least 2 tokens, for one prediction.
        progress: Show a progress bar on stderr if it takes more than two seconds.

    Raises:
        ValueError: the text has no token, or too few for one sequence of `seq_len` and its target.
        As `Corpus.texts` besides.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / TOKENIZER_FILE)
    with tqdm(
        total=corpus.num_bytes, desc="tokenizing", unit="B", unit_scale=True, delay=2, leave=False, disable=not progress
    ) as bar:
        documents = corpus.documents(seed)
        encode = token_encoder(tokenizer)
        unit = write_unit(0, documents, directory, tokenizer, encode, choose=lambda: False, progress=bar.update)
    unit.update(skipped_count=corpus.left_out.count, skipped=corpus.left_out.named)
    settings = {"text_column": corpus.text_column, "val_fraction": val_fraction, "seed": seed}
    write_manifest(directory, settings, [unit], (0, []))
    shards = open_shards(directory)
    train, val = shards.num_train_tokens, shards.num_val_tokens
    if train < seq_len + 1:
        raise ValueError(
            f"the corpus is too short: of its {count(train + val, 'token')} {val} are kept for validation, and the "
            f"{train} left are fewer than the {seq_len + 1} of one sequence and its target ({option('seq_len')} "
            f"{seq_len} + 1); add text or choose a smaller {option('seq_len')}"
        )
    return shards


def first_tokens(path: str | os.PathLike[str], vocab_size: int, count: int) -> list[int]:
    """Return the first `count` tokens of a token file, or all if it has fewer."""
    ids: list[int] = np.fromfile(path, dtype=token_dtype(vocab_size), count=count).tolist()
    return ids
