"""Readers of files as documents, at a stretch or in parts: texts, JSON lines and Parquet.

    inputs -cut_input-> parts -read_documents-> documents

A part is what is read at a stretch: a whole file, a byte range of a large one, row groups of a Parquet file. What
can only be read from its beginning (a compressed file, a dataset that is streamed) is a stream of lines instead, see
`tinyllm.data.prepare.streams`. Nothing here holds more than a piece of text, or one line or row, in memory.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from tinyllm.data.prepare.inputs import Input, Kind, OnBad, reason_of

_BLOCK_BYTES = 1 << 18
_PIECE_CHARACTERS = 1 << 15  # text tokenized at once
_LONGEST_PIECE = 16 * _PIECE_CHARACTERS
_NAMES = 8  # of columns that a message lists
_BOM = codecs.BOM_UTF8

# Where a text may be cut so that its parts tokenize to the ids of the whole, best first. No token of GPT-2's byte
# level spans any of these places; those of later vocabularies may join punctuation and a line's end.
_CUTS = tuple(map(re.compile, (r"[^\W_](?=\r?\n)", r"\S(?=\r?\n)", r"\S(?=\s)")))


@dataclass(frozen=True)
class Part:
    """Part of an input that one worker reads at a stretch.

    Attributes:
        kind: "text", "jsonl" or "parquet".
        path: the file.
        start, stop: the bytes, of a Parquet file the row groups, that are read.
        size: bytes of text, about.
        begins, ends: whether a text's document begins and ends in this part.
        name: what to call the file in messages, if not by its path.
        line: the number of the first line before `start`, if known.
    """

    kind: Kind
    path: str
    start: int
    stop: int
    size: int
    begins: bool = True
    ends: bool = True
    name: str = ""
    line: int | None = None


@dataclass(frozen=True)
class Document:
    """A document, or the part of one that lies in a part of a file.

    Attributes:
        pieces: its text, in pieces that tokenize to the ids of the whole.
        whole: whether the document begins and ends here.
        ends: whether it ends here.
    """

    pieces: Iterable[str]
    whole: bool = True
    ends: bool = True


# Cutting


def cut_input(entry: Input, size: int, column: str, on_bad: OnBad) -> list[Part]:
    """Cut a file into parts of about `size` bytes. An empty list for an empty file.

    A large text is read through once, so that a file that is not text is refused, or left out, as a whole.

    Args:
        entry: of a kind that is no stream.
        size: bytes, at least 1.
        column: that of the text, in a Parquet file.
        on_bad: called if the file cannot be used.

    Raises:
        ImportError: a library for the file's kind is missing; says what to install.
    """
    try:
        if entry.kind == "parquet":
            return _cut_parquet(entry, size, column)
        count = -(-entry.size // size)
        if count > 1 and entry.kind == "text":
            for _ in decode_file(entry.path, 0, entry.size, translate=False):
                pass
        find = _text_cut if entry.kind == "text" else _line_cut
        with open(entry.path, "rb") as file:
            cuts = [find(file, entry.size * index // count) for index in range(1, count)]
    except (OSError, ValueError) as error:
        on_bad(entry.path, reason_of(error))
        return []
    borders = sorted({0, *(cut for cut in cuts if cut < entry.size), entry.size})
    return [
        Part(entry.kind, entry.path, start, stop, stop - start, begins=start == 0, ends=stop == entry.size)
        for start, stop in pairwise(borders)
    ]


def _cut_parquet(entry: Input, size: int, column: str) -> list[Part]:
    with _parquet(entry.path) as file:
        names = file.schema_arrow.names
        if column not in names:
            texts = [field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string")]
            raise ValueError(f"has no column {column!r}; its columns are {columns_and_remedy(names, texts)}")
        parts: list[Part] = []
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            chunks = map(group.column, range(group.num_columns))
            num_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
            if parts and parts[-1].size + num_bytes <= size:
                last = parts.pop()
                parts.append(Part("parquet", entry.path, last.start, index + 1, last.size + num_bytes))
            else:
                parts.append(Part("parquet", entry.path, index, index + 1, num_bytes))
    return parts


def _line_cut(file: io.BufferedReader, place: int) -> int:
    """Return the end of the line that `place` lies in."""
    file.seek(place)
    while block := file.read(_BLOCK_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return place + found + 1
        place += len(block)
    return place


def _text_cut(file: io.BufferedReader, place: int) -> int:
    """Return the next place from `place` on where a text may be cut."""
    file.seek(place)
    block = file.read(_LONGEST_PIECE)
    text = block.lstrip(bytes(range(0x80, 0xC0)))[:_LONGEST_PIECE]  # from a character's first byte on
    skipped = len(block) - len(text)
    characters = text.decode("utf-8", "surrogateescape")
    cut = find_cut(characters, 0, len(characters) - 4)  # the last character may be cut itself
    return place + skipped + len(characters[:cut].encode("utf-8", "surrogateescape"))


def find_cut(text: str, start: int, stop: int) -> int:
    """Return the place between `start` and `stop` at which to cut `text`; `stop` if there is no good one."""
    for pattern in _CUTS:
        if match := pattern.search(text, start, stop):
            return match.end()
    return stop


def split_text(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text that comes in blocks into pieces that tokenize to the ids of the whole.

    Only a run of half a million characters without any white space is cut where no good place is.
    """
    text = ""
    for block in blocks:
        text += block
        start, window = 0, 2 * _PIECE_CHARACTERS
        while len(text) - start > window:
            cut = find_cut(text, start + _PIECE_CHARACTERS, start + window)
            if cut == start + window and window < _LONGEST_PIECE:
                window *= 2
                continue
            yield text[start:cut]
            start, window = cut, 2 * _PIECE_CHARACTERS
        text = text[start:]
    if text:
        yield text


# Reading


def read_documents(part: Part, column: str, on_bad: OnBad) -> Iterator[Document]:
    """Yield the documents of a part that are not empty. Texts are UTF-8; their line ends become `\\n`.

    Args:
        part: what to read.
        column: the name under which JSON lines and Parquet rows hold the text.
        on_bad: called for each text, line or row that cannot be used, and then passed over.

    Raises:
        ImportError: a library is missing; says what to install.
    """
    match part.kind:
        case "text":
            yield from _read_text(part, on_bad)
        case "jsonl":
            yield from _read_lines(part, column, on_bad)
        case "parquet":
            yield from _read_rows(part, column, on_bad)


def _read_text(part: Part, on_bad: OnBad) -> Iterator[Document]:
    whole = part.begins and part.ends
    try:  # read twice, so that nothing of a bad file is used before that is known: tokenizing takes far longer
        if whole and not sum(map(len, decode_file(part.path, part.start, part.stop, translate=False))):
            return
    except (OSError, ValueError) as error:
        on_bad(part.path, reason_of(error))
        return
    blocks = decode_file(part.path, part.start, part.stop, translate=True)
    yield Document(split_text(blocks), whole, part.ends)


def decode_file(path: str, start: int = 0, stop: int = sys.maxsize, *, translate: bool) -> Iterator[str]:
    """Yield the text in a range of a file's bytes, as `decode_blocks` does; the range may go beyond the end."""
    with open(path, "rb") as file:
        file.seek(start)
        yield from decode_blocks(file, start, stop, translate=translate)


def decode_blocks(file: BinaryIO, place: int = 0, stop: int = sys.maxsize, *, translate: bool) -> Iterator[str]:
    """Yield the text in the bytes of a file, which are UTF-8, in blocks and without a byte order mark.

    Args:
        file: an open one.
        place: where in it to begin, and where it is.
        stop: where to end.
        translate: make line ends `\\n`.

    Raises:
        ValueError: it is no text; says where, without the file's name.
        OSError: the file cannot be read.
    """
    decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    while True:
        block = file.read(min(_BLOCK_BYTES, stop - place))
        if (nul := block.find(b"\0")) >= 0:  # valid UTF-8, but never in a text: UTF-16 or a binary file
            raise ValueError(f"is not a text file: it has a NUL byte at offset {place + nul}")
        content = block.removeprefix(_BOM) if place == 0 else block
        before = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not block)
        except UnicodeDecodeError as error:
            offset = place + len(block) - len(content) - before + error.start
            raise ValueError(
                f"is not a UTF-8 text file: byte 0x{error.object[error.start]:02x} at offset {offset} ({error.reason})"
            ) from error
        yield newlines.decode(text, final=not block) if translate else text
        if not block:
            return
        place += len(block)


def _read_lines(part: Part, column: str, on_bad: OnBad) -> Iterator[Document]:
    name = part.name or part.path
    first = part.line
    with open(part.path, "rb") as file:
        file.seek(part.start)
        place, number = part.start, 0
        while place < part.stop and (line := file.readline()):
            try:
                text = parse_line(line.removeprefix(_BOM) if place == 0 else line, column)
            except ValueError as error:
                if first is None:  # counted only when it is asked for
                    first = _count_lines(part.path, part.start)
                on_bad(f"{name}, line {first + number + 1},", reason_of(error))
                text = ""
            place += len(line)
            number += 1
            if text:
                yield Document(split_text([text]))


def parse_line(line: bytes, column: str) -> str:
    """Return the text of a JSON line; "" for an empty line. Raises ValueError that says what is wrong with it."""
    if not line.strip():
        return ""
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: byte 0x{line[error.start]:02x} ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"is not a JSON object but {_json_word(content)}")
    if not content:
        raise ValueError(f"has no {column!r}: it is an empty object")
    if column not in content:
        texts = [name for name, value in content.items() if isinstance(value, str)]
        raise ValueError(f"has no {column!r}; its names are {columns_and_remedy(list(content), texts)}")
    return _checked(content[column], column)


def _checked(text: object, column: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"has no text as {column!r} but {_json_word(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds the lone surrogate {text[error.start]!r}: it is not valid Unicode") from error
    return text


def columns_and_remedy(names: Sequence[str], texts: Sequence[str]) -> str:
    """Return the names in which a column was looked for in vain, and how to choose one of `texts`, which hold text."""
    listed = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    if len(texts) == 1:
        return f"{listed}: --text-column {shlex.quote(texts[0])} reads it"
    return f"{listed}: --text-column NAME says which" if texts else f"{listed}; none of them is a text"


def _json_word(value: object) -> str:
    """Return what JSON calls a value that is not text."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    words = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object", bytes: "bytes"}
    return words.get(type(value), "something else")


def _count_lines(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(_BLOCK_BYTES, stop))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _read_rows(part: Part, column: str, on_bad: OnBad) -> Iterator[Document]:
    groups = range(part.start, part.stop)
    with _parquet(part.path) as file:
        row = sum(file.metadata.row_group(index).num_rows for index in range(part.start))
        batches = file.iter_batches(batch_size=64, row_groups=groups, columns=[column], use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:  # pyarrow's own errors are among these
                on_bad(part.path, f"is damaged after row {row}: {reason_of(error)}")
                return
            if batch is None:
                return
            for value in batch.column(0):
                row += 1
                try:
                    text = _checked(value.as_py(), column)
                except ValueError as error:
                    on_bad(f"{part.path}, row {row},", reason_of(error))
                else:
                    if text:
                        yield Document(split_text([text]))


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_library("pyarrow", path) from error
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)  # a row group is not read at once
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"is not a Parquet file: {reason_of(error)}") from error
    with file:
        yield file


def missing_library(library: str, what: str) -> ImportError:
    return ImportError(f"{what} needs {library}, which is not installed; the extra tinyllm[data] brings it")
