"""Token shards, the format that `tinyllm prepare` writes, and `tinyllm train` for text; training reads nothing else.

    DIR/manifest.json     what there is; written last, so where it lies the rest is whole
    DIR/tokenizer.json    what the ids mean
    DIR/train-00000.bin   token ids and nothing else: little-endian uint16, uint32 from 65,537 ids on
    DIR/train-00000.idx   little-endian uint64: where each document ends, in tokens from the shard's start
    DIR/val-00000.bin ...
    DIR/.prepare/         what an unfinished preparation needs to go on; once finished, only plan.json stays, from which
                          the same command sees that all is done, and another one that it would replace something

A document that is longer than a shard goes on in the next one of its split: the first shard's index
then ends before its tokens do. Shards are memory-mapped, so opening them costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tinyllm._internal.files import replacing
from tinyllm.tokenizer import Tokenizer, load_tokenizer

FORMAT = "tinyllm-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
WORK_FOLDER = ".prepare"
INDEX_DTYPE = np.dtype("<u8")

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of token ids on disk: uint16 where every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the dtype of a tokenizer's ids in shards, which is little-endian on every machine."""
    return token_dtype(tokenizer.vocab_size).newbyteorder("<")


@dataclass(frozen=True)
class Shards:
    """A directory of token shards, as `open_shards` found it.

    Attributes:
        directory: where they lie.
        manifest: the content of manifest.json.
        train: the .bin files of the training split, in order.
        val: those of the validation split.
        vocab_size: the tokenizer's number of ids.
        num_train_tokens: tokens in all training shards together.
        num_val_tokens: tokens in all validation shards together.
        fingerprint: the SHA-256 of manifest.json. It holds every shard's checksum, so equal fingerprints
            mean equal data.
    """

    directory: Path
    manifest: dict[str, Any]
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    vocab_size: int
    num_train_tokens: int
    num_val_tokens: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the .bin files."""
        return np.dtype(self.manifest["dtype"]).newbyteorder("<")

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the shards.

        Raises:
            FileNotFoundError: tokenizer.json is gone.
            ValueError: it is not the file that the shards were made with, or no tokenizer.
        """
        path = self.directory / TOKENIZER_FILE
        self.check_tokenizer(path)
        return load_tokenizer(path)

    def check_tokenizer(self, path: str | os.PathLike[str]) -> None:
        """Make sure that the ids in the shards mean what the tokenizer file `path` says.

        Args:
            path: a tokenizer.json, such as that of a trained model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it differs from the file that the shards were made with; names both, and their hashes.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no tokenizer file {path}")
        found, expected = file_sha256(path), self.manifest["tokenizer_sha256"]
        if found != expected:
            raise ValueError(
                f"{path} is not the tokenizer of the shards in {self.directory}: its SHA-256 is {found}, "
                f"{self.directory / MANIFEST_FILE} says {expected}"
            )

    def verify(self) -> None:
        """Read every file and compare its checksum with the manifest's.

        Raises:
            OSError: a file cannot be read.
            ValueError: a checksum differs; names the file and both checksums.
        """
        self.check_tokenizer(self.directory / TOKENIZER_FILE)
        for split in SPLITS:
            for shard in self.manifest["shards"][split]:
                for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256")):
                    path = self.directory / (shard["name"] + suffix)
                    found = file_sha256(path)
                    if found != shard[key]:
                        raise ValueError(
                            f"{path} is damaged: its SHA-256 is {found}, the manifest says {shard[key]}; "
                            f"put the file back, or prepare the data again"
                        )

    def documents(self, split: Split) -> Iterator[NDArray[Any]]:
        """Yield the documents of a split, in order: their ids, the end-of-text id included.

        Args:
            split: "train" or "val".

        Returns:
            One array of `dtype` for each document: a view of the mapped file, or a copy where a document
            goes on from one shard to the next.
        """
        begun: list[NDArray[Any]] = []
        for path in self.train if split == "train" else self.val:
            tokens = np.memmap(path, dtype=self.dtype, mode="r")
            start = 0
            for end in np.fromfile(path.with_suffix(".idx"), dtype=INDEX_DTYPE).tolist():
                part = tokens[start:end]
                yield np.concatenate([*begun, part]) if begun else part
                begun = []
                start = end
            if start < len(tokens):
                begun.append(tokens[start:])
        if begun:
            yield np.concatenate(begun)


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


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a directory that `tinyllm prepare` has finished.

    Other programs have manifests too, so it is read.
    """
    try:
        content = json.loads(Path(path, MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def open_shards(path: str | os.PathLike[str]) -> Shards:
    """Open a directory that `tinyllm prepare` made. Sizes are checked, checksums only by `Shards.verify`.

    Args:
        path: the directory.

    Returns:
        What is in it; no token is read.

    Raises:
        FileNotFoundError: the manifest or a file that it lists is missing.
        ValueError: the manifest is damaged, of another program or of another version, or a file's size is not
            what the manifest says; names the file.
    """
    directory = Path(path)
    where = directory / MANIFEST_FILE
    if not where.is_file():
        if (directory / WORK_FOLDER).is_dir():
            raise FileNotFoundError(f"{directory} was not finished by `tinyllm prepare`; the same command goes on")
        raise FileNotFoundError(f"there is no {where}: {directory} holds no prepared data")
    content = where.read_bytes()
    manifest = _parse(content, where)
    itemsize = np.dtype(manifest["dtype"]).itemsize
    if not (directory / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"there is no {directory / TOKENIZER_FILE}; the shards' ids mean nothing without it")
    files: dict[str, list[Path]] = {"train": [], "val": []}
    for split, paths in files.items():
        for shard in manifest["shards"][split]:
            name = shard["name"]
            for suffix, size in ((".bin", shard["tokens"] * itemsize), (".idx", shard["documents"] * 8)):
                file = directory / (name + suffix)
                if not file.is_file():
                    raise FileNotFoundError(f"there is no {file}, which {where} lists")
                if file.stat().st_size != size:
                    raise ValueError(f"{file} has {file.stat().st_size} bytes, not the {size} that {where} says")
            paths.append(directory / (name + ".bin"))
    tokens = {split: sum(shard["tokens"] for shard in manifest["shards"][split]) for split in files}
    return Shards(
        directory,
        manifest,
        tuple(files["train"]),
        tuple(files["val"]),
        manifest["vocab_size"],
        tokens["train"],
        tokens["val"],
        hashlib.sha256(content).hexdigest(),
    )


def _parse(content: bytes, where: Path) -> dict[str, Any]:
    """Return the manifest in `content`, with everything that a reader relies on."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is not a manifest, or is truncated: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not a manifest of `tinyllm prepare`")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{where} is of version {manifest.get('version')!r}; this program reads version {VERSION}")
    try:
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {manifest['dtype']!r}")
        if not isinstance(manifest["vocab_size"], int) or not isinstance(manifest["tokenizer_sha256"], str):
            raise ValueError("vocab_size or tokenizer_sha256 has another type")
        for split in SPLITS:
            if not manifest["shards"][split]:
                raise ValueError(f"it has no {split} shard")
            for shard in manifest["shards"][split]:
                if os.path.basename(shard["name"]) != shard["name"]:
                    raise ValueError(f"the shard {shard['name']!r} lies elsewhere")
                if not all(isinstance(shard[key], int) and shard[key] >= 0 for key in ("tokens", "documents")):
                    raise ValueError(f"the counts of {shard['name']} are no counts")
                if not all(isinstance(shard[key], str) for key in ("sha256", "index_sha256")):
                    raise ValueError(f"the checksums of {shard['name']} are no checksums")
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where} is not a whole manifest: {what}") from error
    return manifest


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
