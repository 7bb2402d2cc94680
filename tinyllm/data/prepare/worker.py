"""A process that tokenizes: `tinyllm.data.prepare` starts it and sends it work, one JSON line each, on its stdin.

It does without torch, which would take seconds and a few hundred megabytes from each of them. When
`tinyllm.data.prepare` dies, its pipes close, and the worker ends, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyllm._internal.files import replacing, write_text
from tinyllm.data.prepare.documents import Document, Part, read_documents, split_text
from tinyllm.data.prepare.inputs import STREAMS, Input, Skipped
from tinyllm.data.prepare.streams import stream_texts
from tinyllm.data.prepare.words import token_encoder
from tinyllm.data.shards import INDEX_DTYPE, TOKENIZER_FILE
from tinyllm.tokenizer import load_tokenizer, train_tokenizer
from tinyllm.tokenizer.formats import load_vocabulary

# Started with the folder that the package lies in: the directory that a user is in may have a folder of that name.
BOOTSTRAP = "import sys; sys.path[0] = sys.argv[1]; from tinyllm.data.prepare.worker import main; main()"

ERRORS: dict[str, type[Exception]] = {"OSError": OSError, "ImportError": ImportError, "ValueError": ValueError}

_BATCH_CHARACTERS = 1 << 16


class ShardFile:
    """A .bin file and its .idx, made when the first token comes and there only when all went well."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], stack: ExitStack) -> None:
        self.directory = directory
        self.name = name
        self.tokens = 0
        self.ends = array("Q")  # of documents, in tokens
        self._dtype = dtype
        self._stack = stack
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def write(self, ids: bytes) -> None:
        """Add ids, as they lie in the file."""
        if not ids:
            return
        if self._file is None:
            path = self._stack.enter_context(replacing(self.directory / f"{self.name}.bin"))
            self._file = self._stack.enter_context(path.open("wb"))
        self._file.write(ids)
        self._digest.update(ids)
        self.tokens += len(ids) // self._dtype.itemsize

    def end_document(self) -> None:
        """End a document here, if it has a token."""
        if self.tokens > (self.ends[-1] if self.ends else 0):
            self.ends.append(self.tokens)

    def finish(self) -> dict[str, Any] | None:
        """Write the index; the shard's entry in the manifest, None if there is no token."""
        if self._file is None:
            return None
        self._file.flush()
        index = np.array(self.ends, dtype=INDEX_DTYPE).tobytes()
        self._stack.enter_context(replacing(self.directory / f"{self.name}.idx")).write_bytes(index)
        return {
            "name": self.name,
            "tokens": self.tokens,
            "documents": len(self.ends),
            "sha256": self._digest.hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }


@contextmanager
def naming_full_disk(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Say where there is no room, which the system does not, and what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk is full: no space left in {directory}; finished shards are kept, so make room and run the "
                f"same command again",
            ) from error
        raise


def write_unit(
    number: int,
    parts: Iterable[Part],
    settings: dict[str, Any],
    encode: Callable[[list[str]], list[bytes]],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Tokenize parts of files into the shards `train-NUMBER` and `val-NUMBER`.

    Args:
        number: of the unit. With the seed it decides which documents are for validation.
        parts: what to read.
        settings: directory, dtype, end_of_text_id, text_column, val_fraction, seed and skip_bad.
        encode: gives the ids of texts, as they lie in a file.
        progress: called with the bytes of text done since the last call.

    Returns:
        What the manifest needs to know: counts, shards, and what was left out.

    Raises:
        ValueError: an input cannot be used, and skip_bad is false.
        OSError: a file cannot be read or written.
    """
    directory, dtype = Path(settings["directory"]), np.dtype(settings["dtype"])
    end_id = settings["end_of_text_id"]
    end = b"" if end_id is None else np.array([end_id], dtype=dtype).tobytes()
    choose = random.Random(f"{settings['seed']}/{number}").random
    skipped = Skipped(settings["skip_bad"])
    total = 0
    batch: list[tuple[str, str, bool]] = []  # a piece, its split, and whether its document ends with it
    with ExitStack() as stack:
        shards = {s: ShardFile(directory, f"{s}-{number:05d}", dtype, stack) for s in ("train", "val")}

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
        for part in parts:
            for document in read_documents(part, settings["text_column"], skipped):
                # A part of a long document is never for validation, which it might fill alone.
                split = "val" if document.whole and choose() < settings["val_fraction"] else "train"
                for piece, last in _with_last(document):
                    batch.append((piece, split, last))
                    size += len(piece)
                    if size >= _BATCH_CHARACTERS:
                        flush()
                        size = 0
        if batch:
            flush()
        entries = {split: shard.finish() for split, shard in shards.items()}
    return {
        "bytes": total,
        **{key: sum(entry[key] for entry in entries.values() if entry) for key in ("documents", "tokens")},
        "shards": entries,
        "skipped_count": skipped.count,
        "skipped": skipped.named,
    }


def _with_last(document: Document) -> Iterator[tuple[str, bool]]:
    """The pieces, and whether a document ends with each."""
    before = None
    for piece in document.pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, document.ends


def sample_texts(samples: list[tuple[Any, int]], size: int, column: str, skip_bad: bool) -> Iterator[str]:
    """Yield text to train a tokenizer on, in pieces.

    Args:
        samples: parts and streams, as JSON objects, and how many bytes to take from the beginning of each. A stream,
            whose length nobody knows, gives more where others gave less.
        size: the most bytes in all, but for the last piece of each.
        column: that of the text.
        skip_bad: whether to pass over what cannot be read.

    Raises:
        ValueError: an input cannot be used, and `skip_bad` is false.
    """
    skipped = Skipped(skip_bad)
    room = size - sum(quota for _, quota in samples)  # that no quota has claimed
    for source, quota in samples:
        left = quota + (max(room, 0) if source["kind"] in STREAMS else 0)
        before = left
        for piece in _source_texts(source, column, skipped):
            yield piece
            left -= len(piece.encode())
            if left <= 0:
                break
        room += quota - (before - left)


def _source_texts(source: dict[str, Any], column: str, skipped: Skipped) -> Iterator[str]:
    if source["kind"] in STREAMS:
        for text in stream_texts(Input(**source), column, skipped):
            yield from split_text([text])
    else:
        for document in read_documents(Part(**source), column, skipped):
            yield from document.pieces


def make_tokenizer(task: dict[str, Any]) -> dict[str, Any]:
    """Train or load a tokenizer, and write it to a file.

    Args:
        task: "to", the file; and either "path", that of any tokenizer, or what to train one with: kind, vocab_size,
            samples, sample_size, text_column and skip_bad.

    Returns:
        Its vocab_size and end_of_text_id.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it is none, or an input cannot be used.
    """
    if "path" in task:
        tokenizer = load_vocabulary(task["path"])
    else:
        texts = sample_texts(task["samples"], task["sample_size"], task["text_column"], task["skip_bad"])
        tokenizer = train_tokenizer(task["kind"], texts, task["vocab_size"])
    tokenizer.save(task["to"])
    return {"vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id}


def main() -> None:
    """Serve tasks from stdin until it closes; one JSON line of progress, result or error at a time on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; one decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    encode = None

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    for line in sys.stdin:
        task = json.loads(line)
        try:
            if task["task"] == "tokenizer":
                with naming_full_disk(Path(task["to"]).parent):
                    answer(done=make_tokenizer(task))
                continue
            settings = task["settings"]
            if encode is None:
                encode = token_encoder(
                    load_tokenizer(Path(settings["directory"], TOKENIZER_FILE)), np.dtype(settings["dtype"])
                )
            parts = [Part(**part) for part in task["parts"]]
            with naming_full_disk(settings["directory"]):
                done = write_unit(task["number"], parts, settings, encode, lambda count: answer(progress=count))
                write_text(task["sidecar"], json.dumps({**done, **task["extra"]}))
            answer(done=done)
        except BrokenPipeError:  # nobody waits any more
            os._exit(1)  # without another try to write what is left
        except tuple(ERRORS.values()) as error:
            answer(error=str(error), kind=next(name for name, kind in ERRORS.items() if isinstance(error, kind)))
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
