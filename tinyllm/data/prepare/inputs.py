"""Find the files that are text, and how each is read, for `train`, `eval` and `prepare`.

What is evidently no text is passed over below a directory, and is an error where it is named itself: binary files,
folders that `tinyllm prepare` made or began, and the folders of trainings.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyllm._internal.locks import is_owned
from tinyllm._internal.words import count
from tinyllm.config import saved
from tinyllm.data.shards import WORK_FOLDER, is_prepared

Kind = Literal["text", "jsonl", "parquet", "gz", "zst", "hf"]
STREAMS = ("gz", "zst", "hf")  # the kinds that tinyllm.data.prepare.streams reads
DATASET_PREFIX = "hf:"  # of a Hugging Face dataset's name, in the place of a path

_RUN_FILES = ("config.json", "tokenizer.json", "metrics.jsonl")
_SNIFFED_BYTES = 8192  # as git does: a file with a NUL byte this early is binary
_NAMED = 100  # of what is left out; the rest is only counted

OnBad = Callable[[str, str], None]
"""Called with the place and the reason of an input that cannot be used: raises, or takes note of it."""


class Skipped:
    """A record of what cannot be read: it raises at the first, or, where that is allowed, counts and names it.

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
        self.note(where, why)

    def note(self, where: str, why: str) -> None:
        """Count and name what is left out in any case."""
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{where} {why}")

    def copy(self) -> Skipped:
        """Return one that goes on from this one's count."""
        other = Skipped(self.allowed)
        other.count, other.named = self.count, list(self.named)
        return other


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
class Found:
    """The inputs that were named, and what was passed over.

    Attributes:
        inputs: each once, in an order that does not depend on the machine.
        binary: path and reason of the files below directories that evidently are no text.
        folders: those below directories that `tinyllm` wrote.
    """

    inputs: list[Input]
    binary: list[tuple[str, str]]
    folders: list[str]

    def notes(self) -> list[str]:
        """Return what is to be said of what was passed over, in lines."""
        lines = []
        if self.binary:
            lines.append(f"Skipped {count(len(self.binary), 'binary file')}, such as {self.binary[0][0]}")
        if self.folders:
            what = count(len(self.folders), "folder")
            lines.append(f"Skipped {what} of prepared data or of a training, such as {self.folders[0]}")
        return lines


class _NoTextError(ValueError):
    """A file that evidently is no text."""


def find_inputs(
    data: Sequence[str | os.PathLike[str]], on_bad: OnBad, out: str | os.PathLike[str] | None = None
) -> Found:
    """Find the inputs that `data` names.

    A file counts as it is. A directory contributes every file below it, except hidden ones (a name that starts with a
    dot), `__pycache__`, links to directories, folders that `tinyllm prepare` made or began, the folders of trainings,
    `out`, and binary files: those with a NUL byte in the first 8 KiB, and compressed ones that are no JSON lines. Names
    ending in .jsonl or .ndjson, these or .json compressed as .gz or .zst, and .parquet say what a file is; every other
    one is a text, one document.

    Args:
        data: files, directories, and `hf:NAME[:CONFIG][@SPLIT]`.
        on_bad: called for each file that cannot be read, and each binary one that is named itself.
        out: where the result goes.

    Raises:
        FileNotFoundError: a path does not exist, or is neither a file nor a directory.
        ValueError: a directory that is named itself holds no text but what `tinyllm` wrote; there is no input at all.
        OSError: a directory cannot be read.
    """
    result = None if out is None else os.path.realpath(out)
    found: dict[str, Input] = {}  # by their real paths
    binary: dict[str, tuple[str, str]] = {}
    folders: dict[str, str] = {}
    refused: set[str] = set()
    for given in [os.fspath(name) for name in data]:
        if given.startswith(DATASET_PREFIX):
            parse_name(given)
            found[given] = Input(given, "hf")
            continue
        path = Path(given)
        below = _is_directory(path)
        if below and os.path.realpath(path) == result:
            raise ValueError(f"{path} is both among the data and where the result is to go; choose another --out")
        if below and (why := no_text(path)):
            raise ValueError(f"{path} {why}")
        for file in walk(path, out=result, passed_over=folders) if below else [path]:
            real = os.path.realpath(file)
            if real in found or real in refused:
                continue
            try:
                found[real] = _inspect(file)
                continue
            except _NoTextError as error:
                reason = str(error)
                if below:
                    binary[real] = str(file), reason
                    continue
            except OSError as error:
                reason = reason_of(error)
            refused.add(real)
            on_bad(str(file), reason)
    passed_over = [entry for real, entry in binary.items() if real not in found and real not in refused]
    if not found:
        where = ", ".join(map(str, data)) or "the empty list of paths"
        if passed_over:
            where += f": {passed_over[0][0]} {passed_over[0][1]}"
        elif folders:
            where += f" but what `tinyllm` wrote, such as {next(iter(folders.values()))}"
        raise ValueError(f"no text in {where}")
    return Found(list(found.values()), passed_over, list(folders.values()))


def _is_directory(path: Path) -> bool:
    """Return whether `path` is a directory, and not a file. Raises FileNotFoundError if it is neither."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file or directory {path}") from None
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return stat.S_ISDIR(mode)
    if stat.S_ISFIFO(mode):
        raise FileNotFoundError(f"{path} is a pipe, which can be read only once; write the text to a file")
    kind = "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise FileNotFoundError(f"{path} is {kind}; a file or a directory is needed")


def walk(
    root: Path, excluded: Iterable[str] = (), out: str | None = None, passed_over: dict[str, str] | None = None
) -> Iterator[Path]:
    """Yield every file below `root` in sorted order, without hidden ones and what `tinyllm` wrote.

    Args:
        root: a directory.
        excluded: names of directories to pass over besides.
        out: the real path of another one.
        passed_over: takes the folders that `tinyllm` wrote, by their real paths.
    """
    passed = {"__pycache__", *excluded}

    def fail(error: OSError) -> None:  # os.walk passes over unreadable directories in silence
        raise error

    for directory, folders, names in os.walk(root, onerror=fail):
        real = os.path.realpath(directory)
        if real == out or no_text(Path(directory)):
            folders.clear()
            if real != out and passed_over is not None:
                passed_over.setdefault(real, directory)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in passed)
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path


def no_text(folder: Path) -> str | None:
    """Return why a folder is none of text but one that `tinyllm` wrote; None if it may be of text."""
    if is_prepared(folder):
        return (
            "was made by `tinyllm prepare`: it holds tokens, not text; `tinyllm train` takes it as its only --data, "
            "all else needs the text itself"
        )
    if (folder / WORK_FOLDER).is_dir():
        if is_owned(folder):
            return "is still being prepared by another process"
        return "was not finished by `tinyllm prepare`; the same command goes on"
    return "is the folder of a training, not text" if _is_run(folder) else None


def _is_run(folder: Path) -> bool:
    """Return whether a training wrote `folder`, even one that failed or whose config.json is damaged."""
    if not (folder / saved.CONFIG_FILE).is_file():
        return False
    if all((folder / name).is_file() for name in _RUN_FILES):
        return True
    try:
        saved.read_config(folder)
    except (OSError, ValueError):
        return False
    return True


def _inspect(path: Path) -> Input:
    """Return how to read a file. Raises _NoTextError, or OSError if it cannot be read."""
    kind = _kind(path)
    with path.open("rb") as file:
        if kind in ("text", "jsonl") and b"\0" in file.read(_SNIFFED_BYTES):
            raise _NoTextError("is a binary file: it has a NUL byte in its beginning")
        status = os.fstat(file.fileno())
    return Input(str(path), kind, status.st_size, status.st_mtime_ns)


def _kind(path: Path) -> Kind:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    match suffixes[-1:]:
        case [".jsonl"] | [".ndjson"]:
            return "jsonl"
        case [".parquet"]:
            return "parquet"
        case [".gz"] | [".zst"]:
            if len(suffixes) > 1 and suffixes[-2] not in (".jsonl", ".ndjson", ".json"):
                raise _NoTextError("is compressed, which is read for JSON lines only; decompress it first")
            return "gz" if suffixes[-1] == ".gz" else "zst"
    return "text"


def parse_name(name: str) -> tuple[str, str | None, str]:
    """Return the dataset, its configuration and split, of `hf:NAME[:CONFIG][@SPLIT]`."""
    rest, _, split = name.removeprefix(DATASET_PREFIX).partition("@")
    dataset, _, config = rest.partition(":")
    if not dataset:
        raise ValueError(f"{name!r} names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT")
    return dataset, config or None, split or "train"


def reason_of(error: BaseException) -> str:
    """Return an error's message in one line, to follow the name of what it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return " ".join(str(error).split())
