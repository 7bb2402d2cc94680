"""The last step of preparing data: both splits have tokens, and the manifest says what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyllm._internal.files import write_text
from tinyllm._internal.words import count
from tinyllm.data.shards import (
    FORMAT,
    INDEX_DTYPE,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    VERSION,
    ShardFile,
    file_sha256,
    shard_dtype,
)
from tinyllm.tokenizer import load_tokenizer

_NAMED = 1000  # inputs left out that the manifest names; the others it only counts
_COPIED_TOKENS = 1 << 20
_SHARD_FILE = re.compile(r"(train-\d{5,}(-head)?|val-\d{5,}(-tail)?)\.(bin|idx)")


def write_manifest(
    out: Path,
    settings: dict[str, Any],
    units: Iterable[dict[str, Any]],
    skipped: tuple[int, list[str]],
) -> None:
    """Write manifest.json for the shards of finished units, and remove shards that it does not list.

    Args:
        out: where everything lies, the tokenizer, too.
        settings: what the shards were made with.
        units: what the workers said of them, in order.
        skipped: how many inputs were left out before, and the names of some.

    Raises:
        ValueError: there are too few tokens for two splits.
        OSError: a file cannot be written.
    """
    tokenizer = load_tokenizer(out / TOKENIZER_FILE)
    dtype = shard_dtype(tokenizer)
    shards: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    skipped_count, names = skipped
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    for unit in units:
        for split, entry in unit["shards"].items():
            if entry:
                shards[split].append(entry)
        for key in totals:
            totals[key] += unit[key]
        skipped_count += unit["skipped_count"]
        names = (names + unit["skipped"])[:_NAMED]
    _balance(out, shards, dtype, settings["val_fraction"])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": file_sha256(out / TOKENIZER_FILE),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "dtype": dtype.name,
        **totals,
        "settings": settings,
        "skipped_count": skipped_count,
        "skipped": names,
        "shards": shards,
    }
    write_text(out / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    listed = {entry["name"] for entries in shards.values() for entry in entries}
    for path in shard_files(out):
        if path.stem not in listed:
            path.unlink()


def shard_files(out: Path) -> list[Path]:
    """Return the files in a directory that have names of shards."""
    return [path for path in out.iterdir() if _SHARD_FILE.fullmatch(path.name)]


def _balance(out: Path, shards: dict[str, list[dict[str, Any]]], dtype: np.dtype[Any], val_fraction: float) -> None:
    """Move the end of the largest training shard to validation where the chosen documents are too few for it.

    It is cut between two documents if there is a place with about as many tokens behind it, else within one. New
    files are made for both parts of that shard, so that a kill here changes nothing.
    """
    train, val = (sum(entry["tokens"] for entry in shards[split]) for split in SPLITS)
    wanted = max(2, round((train + val) * val_fraction))
    if train >= 2 and val >= max(2, wanted / 2):
        return
    if train + val < 4:
        raise ValueError(
            f"the corpus is too short: it has {count(train + val, 'token')}, and training and validation need 2 each, "
            f"for one prediction"
        )
    source = "train" if train >= 2 else "val"  # all may have been chosen, of a few documents
    whole = [entry for entry in shards[source] if _ends_with_document(out, entry)] or shards[source][-1:]
    entry = max(whole, key=lambda entry: int(entry["tokens"]))
    taken = min(wanted - val if source == "train" else wanted, entry["tokens"] - 2)
    if taken < 2:
        raise ValueError(
            f"the corpus is too short: no part of its {count(train + val, 'token')} can be cut for validation"
        )
    ends = np.fromfile(out / f"{entry['name']}.idx", dtype=INDEX_DTYPE)
    size = entry["tokens"]
    cut = size - taken
    between = [int(end) for end in ends if taken / 2 <= size - end <= 2 * taken and end >= 2]
    cut = min(between, key=lambda end: abs(end - cut), default=cut)
    number = entry["name"].partition("-")[2]
    with (out / f"{entry['name']}.bin").open("rb") as file:
        head = _copy(file, cut, out, f"train-{number}-head", [*ends[ends < cut].tolist(), cut], dtype)
        tail = _copy(file, size - cut, out, f"val-{number}-tail", (ends[ends > cut] - cut).tolist(), dtype)
    shards[source].remove(entry)
    shards["train"].append(head)
    shards["val"].append(tail)
    for entries in shards.values():
        entries.sort(key=lambda entry: int(entry["name"].split("-")[1]))


def _ends_with_document(out: Path, entry: dict[str, Any]) -> bool:
    """Return whether the shard's last document ends in it."""
    index = out / f"{entry['name']}.idx"
    last = np.fromfile(index, dtype=INDEX_DTYPE, offset=index.stat().st_size - 8) if entry["documents"] else [0]
    return int(last[0]) == entry["tokens"]


def _copy(file: BinaryIO, count: int, out: Path, name: str, ends: list[int], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Make the next `count` tokens of a shard another one."""
    with ExitStack() as stack:
        shard = ShardFile(out, name, dtype, stack)
        while shard.tokens < count:
            block = file.read(min(_COPIED_TOKENS, count - shard.tokens) * dtype.itemsize)
            if not block:
                raise ValueError(f"{file.name} has lost its end; prepare the data again with --overwrite")
            shard.write(block)
        shard.ends.extend(ends)
        entry = shard.finish()
    assert entry is not None
    return entry
