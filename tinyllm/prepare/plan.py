"""What is to be done in a directory, and what of it has been: written down, so that a later call can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyllm._files import write_text
from tinyllm.prepare.manifest import shard_files
from tinyllm.prepare.sources import STREAMS, Input, OnBad, Part, Skipped, cut_input, find_inputs
from tinyllm.shards import MANIFEST_FILE, TOKENIZER_FILE

WORK_FOLDER = ".prepare"
MEGABYTE = 10**6

_VERSION = 1  # of plan.json


class Plan:
    """What is to be done in a directory, and what of it has been."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out = out
        self.folder = out / WORK_FOLDER
        self.settings: dict[str, Any] = content["settings"]
        self.units = [[Part(**part) for part in parts] for parts in content["units"]]
        self.streams = [entry for entry in (Input(*row) for row in content["inputs"]) if entry.kind in STREAMS]
        self.tokenizer_sha256 = ""  # once there is one
        self.damaged: list[str] = []  # streams that broke off
        self.skipped: tuple[int, list[str]] = tuple(content["skipped"])

    @classmethod
    def make(cls, data: Sequence[Any], out: Path, settings: dict[str, Any], skip_bad: bool, overwrite: bool) -> Plan:
        """The plan in `out`, if it is for the same inputs and settings; else a new one, if there is none.

        Raises ValueError, and names what differs, if there is another one.
        """
        if overwrite:
            _remove_ours(out)
        path = out / WORK_FOLDER / "plan.json"
        skipped = Skipped(skip_bad)
        inputs = find_inputs(data, out, skipped)
        rows = [list(asdict(entry).values()) for entry in inputs]
        if path.is_file():
            content = json.loads(path.read_text())
            _compare(out, content, settings, rows)
            return cls(out, content)
        if strange := next((name for name in (MANIFEST_FILE, TOKENIZER_FILE) if (out / name).exists()), None):
            raise ValueError(f"out {out} holds a {strange}, of something else; choose another directory")
        units = _pack(inputs, int(settings["shard_size"] * MEGABYTE), settings["text_column"], skipped)
        content = {
            "version": _VERSION,
            "settings": settings,
            "inputs": rows,
            "units": [[part.as_json() for part in parts] for parts in units],
            "skipped": [skipped.count, skipped.named],
        }
        write_text(path, json.dumps(content))
        return cls(out, content)

    def sidecar(self, number: int) -> Path:
        return self.folder / f"unit-{number:05d}.json"

    def finished(self, number: int) -> dict[str, Any] | None:
        """What a unit came to, if it is finished and its files are there."""
        path = self.sidecar(number)
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        if content["tokenizer_sha256"] != self.tokenizer_sha256:
            raise ValueError(
                f"{self.out / TOKENIZER_FILE} is not the tokenizer of the shards that are finished: its SHA-256 is "
                f"{self.tokenizer_sha256}, {path} says {content['tokenizer_sha256']}; --overwrite starts anew"
            )
        names = [shard["name"] for shard in content["shards"].values() if shard]
        whole = all((self.out / (name + suffix)).is_file() for name in names for suffix in (".bin", ".idx"))
        return content if whole else None

    def sidecars(self) -> Iterator[dict[str, Any]]:
        """All units, in order."""
        for path in sorted(self.folder.glob("unit-*.json"), key=lambda path: int(path.stem[5:])):
            yield json.loads(path.read_text())

    def clean_up(self) -> None:
        """Remove what only an unfinished preparation needs. The plan stays, to compare the next one with."""
        for path in self.folder.iterdir():
            if path.name != "plan.json":
                path.unlink()


def _remove_ours(out: Path) -> None:
    """Remove everything that `prepare` wrote; the manifest first, because without it nothing else counts."""
    if not (out / WORK_FOLDER).is_dir():
        return
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for path in shard_files(out):
        path.unlink()
    (out / TOKENIZER_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / WORK_FOLDER)


def _compare(out: Path, content: dict[str, Any], settings: dict[str, Any], rows: list[list[Any]]) -> None:
    if content["version"] != _VERSION:
        raise ValueError(f"{out} was prepared by another version of tinyllm; --overwrite starts anew")
    differ = [
        f"{name.replace('_', '-')} was {content['settings'].get(name)!r}, now it is {settings.get(name)!r}"
        for name in {**content["settings"], **settings}
        if content["settings"].get(name) != settings.get(name)
    ]
    before, now = ({row[0]: row for row in lists} for lists in (content["inputs"], rows))
    for path in {**before, **now}:
        if before.get(path) != now.get(path):
            what = "has changed" if path in before and path in now else "is new" if path in now else "is gone"
            differ.append(f"{path} {what}")
    if not differ and before.keys() and list(before) != list(now):
        differ.append("the inputs come in another order")
    if differ:
        more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise ValueError(
            f"{out} holds other prepared data: {differ[0]}{more}; choose another directory, or start anew "
            f"with --overwrite"
        )


def _pack(inputs: Iterable[Input], size: int, column: str, on_bad: OnBad) -> list[list[Part]]:
    """Parts of all inputs that are no streams, in order, small ones together up to `size` bytes."""
    units: list[list[Part]] = []
    room = 0
    for entry in inputs:
        for part in [] if entry.kind in STREAMS else cut_input(entry, max(size, 1), column, on_bad):
            if not units or part.size > room:
                units.append([])
                room = size
            units[-1].append(part)
            room -= part.size
    return units
