"""Where text comes from: files, directories, JSON lines, Parquet and Hugging Face datasets, as documents.

    paths -find_inputs-> inputs -cut_input-> parts -read_documents-> documents

A part is what is read at a stretch: a whole file, a byte range of a large one, row groups of a Parquet file. What
can only be read from its beginning (a compressed file, a dataset that is streamed) is a stream of lines instead.
Nothing here holds more than a piece of text, or one line or row, in memory.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tinyllm.data import _SNIFFED_BYTES, _walk
from tinyllm.shards import is_prepared

Kind = Literal["text", "jsonl", "parquet", "gz", "zst", "hf"]
STREAMS = ("gz", "zst", "hf")  # the kinds that tinyllm.prepare.streams reads

_PREFIX = "hf:"  # of a Hugging Face dataset's name, in the place of a path
_BLOCK_BYTES = 1 << 18
_PIECE_CHARACTERS = 1 << 15  # text tokenized at once
_LONGEST_PIECE = 16 * _PIECE_CHARACTERS
_NAMED = 100  # of what is left out; the rest is only counted
_BOM = codecs.BOM_UTF8

# Where a text may be cut so that its parts tokenize to the ids of the whole, best first. No token of GPT-2's byte
# level spans any of these places; those of later vocabularies may join punctuation and a line's end.
_CUTS = tuple(map(re.compile, (r"[^\W_](?=\r?\n)", r"\S(?=\r?\n)", r"\S(?=\s)")))

OnBad = Callable[[str, str], None]
"""Called with the place and the reason of an input that cannot be used: raises, or takes note of it."""


class Skipped:
    """What cannot be read: an error at the first, or, where that is allowed, counted and named.

    Attributes:
        allowed: whether to go on.
        count: inputs left out.
        named: place and reason of the first of them.
    """

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.count = 0
        self.named: list[str] = []

    def __call__(self, where: str, why: str) -> None:
        if not self.allowed:
            raise ValueError(f"{where} {why}; --skip-bad leaves out what cannot be read, and counts it")
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{where} {why}")


@dataclass(frozen=True)
class Input:
    """One file, or one Hugging Face dataset.

    Attributes:
        path: the file, or `hf:NAME[:CONFIG][@SPLIT]`.
        kind: how it is read.
        size: bytes; 0 for a dataset, whose size nobody knows.
        mtime_ns: when the file was last changed.
    """

    path: str
    kind: Kind
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class Part:
    """What one worker reads at a stretch.

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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


# Finding


def find_inputs(data: Sequence[str | os.PathLike[str]], out: Path, on_bad: OnBad) -> list[Input]:
    """The inputs that `data` names, in an order that does not depend on the machine.

    A directory contributes the files below it, as `tinyllm.data.find_files` says, but for `out` and other
    directories that `tinyllm prepare` made. Names ending in .jsonl or .ndjson, these or .json compressed as .gz
    or .zst, and .parquet say what a file is; every other one is a text, one document.

    Args:
        data: files, directories, and `hf:NAME[:CONFIG][@SPLIT]`.
        out: where the result goes.
        on_bad: called for each binary or unreadable file.

    Returns:
        Each input once.

    Raises:
        FileNotFoundError: a path does not exist, or is neither a file nor a directory.
        ValueError: there is no input at all.
        OSError: a directory cannot be read.
    """
    found: dict[str, Input] = {}
    seen: set[str] = set()
    prepared: dict[Path, bool] = {}
    for given in (os.fspath(path) for path in data):
        if given.startswith(_PREFIX):
            parse_name(given)
            found[given] = Input(given, "hf")
            continue
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"there is no file or directory {path}")
        if not path.is_dir() and not path.is_file():
            raise FileNotFoundError(f"{path} is neither a file nor a directory")
        for file in _walk(path) if path.is_dir() else [path]:
            folder = file.parent
            if folder not in prepared:
                prepared[folder] = folder.resolve() == out.resolve() or is_prepared(folder)
            real = os.path.realpath(file)
            if real not in seen and not (prepared[folder] and path.is_dir()):
                seen.add(real)
                if (entry := _inspect(file, on_bad)) is not None:
                    found[real] = entry
    if not found:
        raise ValueError(f"no text in {', '.join(map(str, data)) or 'the empty list of paths'}")
    return list(found.values())


def _inspect(path: Path, on_bad: OnBad) -> Input | None:
    """How to read a file; None, after `on_bad`, if it cannot be."""
    try:
        kind = _kind(path)
        with path.open("rb") as file:
            if kind in ("text", "jsonl") and b"\0" in file.read(_SNIFFED_BYTES):
                on_bad(str(path), "is a binary file: it has a NUL byte in its beginning")
                return None
            status = os.fstat(file.fileno())
    except OSError as error:
        on_bad(str(path), f"cannot be read ({error.strerror})")
    except ValueError as error:
        on_bad(str(path), str(error))
    else:
        return Input(str(path), kind, status.st_size, status.st_mtime_ns)
    return None


def _kind(path: Path) -> Kind:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    match suffixes[-1:]:
        case [".jsonl"] | [".ndjson"]:
            return "jsonl"
        case [".parquet"]:
            return "parquet"
        case [".gz"] | [".zst"]:
            if len(suffixes) > 1 and suffixes[-2] not in (".jsonl", ".ndjson", ".json"):
                raise ValueError("is compressed, which is read for JSON lines only; decompress it first")
            return "gz" if suffixes[-1] == ".gz" else "zst"
    return "text"


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
            for _ in _decoded(entry.path, 0, entry.size):
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
            raise ValueError(f"has no column {column!r}; its columns are {', '.join(names)}")
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
    """The end of the line that `place` lies in."""
    file.seek(place)
    while block := file.read(_BLOCK_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return place + found + 1
        place += len(block)
    return place


def _text_cut(file: io.BufferedReader, place: int) -> int:
    """The next place from `place` on where a text may be cut."""
    file.seek(place)
    block = file.read(_LONGEST_PIECE)
    text = block.lstrip(bytes(range(0x80, 0xC0)))[:_LONGEST_PIECE]  # from a character's first byte on
    skipped = len(block) - len(text)
    characters = text.decode("utf-8", "surrogateescape")
    cut = find_cut(characters, 0, len(characters) - 4)  # the last character may be cut itself
    return place + skipped + len(characters[:cut].encode("utf-8", "surrogateescape"))


def find_cut(text: str, start: int, stop: int) -> int:
    """Where to cut `text` between `start` and `stop`; `stop` if no place there is a good one."""
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
    """The documents of a part that are not empty. Texts are UTF-8; their line ends become `\\n`.

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
        if whole and not sum(map(len, _decoded(part.path, part.start, part.stop))):
            return
    except (OSError, ValueError) as error:
        on_bad(part.path, reason_of(error))
        return
    blocks = _decoded(part.path, part.start, part.stop, translate=True)
    yield Document(split_text(blocks), whole, part.ends)


def _decoded(path: str, start: int, stop: int, translate: bool = False) -> Iterator[str]:
    """The text in a range of bytes. Raises ValueError that says where it is none, and OSError."""
    decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    with open(path, "rb") as file:
        file.seek(start)
        place = start
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
                    f"is not a UTF-8 text file: byte 0x{error.object[error.start]:02x} at offset {offset} "
                    f"({error.reason})"
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
    """The text of a JSON line; "" for an empty line. Raises ValueError that says what is wrong with it."""
    if not line.strip():
        return ""
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: byte 0x{line[error.start]:02x} ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"is not a JSON object but a {type(content).__name__}")
    if column not in content:
        raise ValueError(f"has no {column!r}; its names are {', '.join(content)}")
    return _checked(content[column], column)


def _checked(text: object, column: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"has no text as {column!r} but a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds the lone surrogate {text[error.start]!r}: it is not valid Unicode") from error
    return text


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


# Shared with streams


def parse_name(name: str) -> tuple[str, str | None, str]:
    """The dataset, its configuration and split, of `hf:NAME[:CONFIG][@SPLIT]`."""
    rest, _, split = name.removeprefix(_PREFIX).partition("@")
    dataset, _, config = rest.partition(":")
    if not dataset:
        raise ValueError(f"{name!r} names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT")
    return dataset, config or None, split or "train"


def missing_library(library: str, what: str) -> ImportError:
    return ImportError(f"{what} needs {library}, which is not installed; pip install 'tinyllm[data]' brings it")


def reason_of(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return " ".join(str(error).split())
