"""Text that can only be read from its beginning: compressed JSON lines, and datasets streamed from the Hub.

They are read by one process, as lines, and handed to the others in runs of lines.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator

from tinyllm.prepare.sources import Input, OnBad, missing_library, parse_name, reason_of

_PACKED_BYTES = 1 << 15  # decompressed at once: what comes of it may be many times as long


def stream_lines(entry: Input, column: str, on_bad: OnBad, skip: int = 0) -> Iterator[bytes]:
    """The JSON lines of a compressed file or a dataset, as they are, from line number `skip` (from 0) on.

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
        on_bad(entry.path, f"is damaged after line {number}: {reason_of(error)}")


def _decompressed(entry: Input) -> Iterator[bytes]:
    """The lines of a compressed file. Raises EOFError, ValueError, zlib.error or BadGzipFile if it is damaged."""
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
    """The content of a zstd file, in blocks. Unlike the library's own reader, it notices a missing end."""
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
        rows = load_dataset(dataset, config, split=split, streaming=True)
        if rows.column_names is not None and column not in rows.column_names:
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
        for row in rows.skip(skip) if skip else rows:
            yield json.dumps({column: row.get(column)}).encode() + b"\n"
    except (OSError, ValueError):
        raise
    except Exception as error:  # of whatever library fetches or decodes the files
        raise OSError(f"{name} cannot be read: {type(error).__name__}: {reason_of(error)}") from error
