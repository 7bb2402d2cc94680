"""Text that can only be read from its beginning: compressed JSON lines, and datasets streamed from the Hub.

They are read by one process, as lines, and handed to the others in runs of lines.
"""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from tinyllm.data.prepare.documents import (
    Document,
    Part,
    columns_and_remedy,
    missing_library,
    parse_line,
    read_documents,
    split_text,
)
from tinyllm.data.prepare.inputs import Input, OnBad, parse_name, reason_of

_PACKED_BYTES = 1 << 15  # decompressed at once: what comes of it may be many times as long
_LIBRARIES = ("datasets", "fsspec", "huggingface_hub", "httpx", "urllib3")
_TEXT_DTYPES = ("string", "large_string")


def stream_lines(entry: Input, column: str, on_bad: OnBad, skip: int = 0) -> Iterator[bytes]:
    """Yield the JSON lines of a compressed file or a dataset, unchanged, from line number `skip` (from 0) on.

    Args:
        entry: an input of a kind in `STREAMS`.
        column: that of a dataset's text.
        on_bad: called if a file is damaged; what follows the damage is lost.
        skip: lines to pass over. A dataset can do that without reading them all.

    Raises:
        ImportError: a library is missing; says what to install.
        ValueError: a dataset has no such column, or does not exist.
        OSError: the file or the dataset cannot be read.
    """
    number = 0
    if entry.kind == "hf":
        yield from _dataset_lines(entry.path, column, skip)
        return
    try:
        for line in _decompressed(entry):
            number += 1
            if number > skip:
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        where = f"after line {number}" if number else "from its beginning"
        on_bad(entry.path, f"is damaged {where}: {reason_of(error)}")


def read_source(source: Part | Input, column: str, on_bad: OnBad) -> Iterator[Document]:
    """Yield the documents of a part or a stream that are not empty.

    Args:
        source: A part of a file, or an input of a kind in `STREAMS`.
        column: The name of the text.
        on_bad: Called for each text, line or row that cannot be used, which is then passed over.

    Raises:
        As `read_documents` and `stream_lines`.
    """
    if isinstance(source, Part):
        yield from read_documents(source, column, on_bad)
        return
    for number, line in enumerate(stream_lines(source, column, on_bad), 1):
        try:
            text = parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, column)
        except ValueError as error:
            on_bad(f"{source.path}, line {number},", reason_of(error))
        else:
            if text:
                yield Document(split_text([text]))


def _decompressed(entry: Input) -> Iterator[bytes]:
    """Yield the lines of a compressed file. Raises EOFError, ValueError, zlib.error or BadGzipFile if it is damaged."""
    if entry.kind == "gz":
        with gzip.open(entry.path, "rb") as unzipped:
            yield from unzipped
        return
    rest = b""
    for block in _unpacked(entry.path):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _unpacked(path: str) -> Iterator[bytes]:
    """Yield the content of a zstd file, in blocks. Unlike the library's own reader, notice a missing end."""
    try:
        import zstandard
    except ImportError as error:
        raise missing_library("zstandard", path) from error
    library = zstandard.ZstdDecompressor()
    frame = library.decompressobj()
    with open(path, "rb") as file:
        while packed := file.read(_PACKED_BYTES):
            while packed:
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise ValueError(str(error)) from error
                packed = frame.unused_data if frame.eof else b""
                if packed:
                    frame = library.decompressobj()
        if file.tell() and not frame.eof:
            raise EOFError("it ends in the middle of a frame")


def _dataset_lines(name: str, column: str, skip: int) -> Iterator[bytes]:
    dataset, config, split = parse_name(name)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_library("datasets", name) from error
    try:
        with _quiet():
            rows = load_dataset(dataset, config, split=split, streaming=True)
            columns: list[str] | None = rows.column_names
            features = rows.features or {}
    except Exception as error:
        raise _unreadable(name, error) from error
    if columns is not None and column not in columns:
        texts = [key for key, feature in features.items() if getattr(feature, "dtype", None) in _TEXT_DTYPES]
        raise ValueError(f"{name} has no column {column!r}; its columns are {columns_and_remedy(columns, texts)}")
    try:
        for row in rows.skip(skip) if skip else rows:
            yield json.dumps({column: row.get(column)}).encode() + b"\n"
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> OSError:
    """Return the error to raise for one of whatever library fetches or decodes a dataset's files."""
    if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
        return OSError(error.errno, f"{name} cannot be read: {error.strerror}")
    return OSError(f"{name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from logging each of their attempts: what comes of the last one is raised."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
