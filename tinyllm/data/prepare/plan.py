"""The plan of a preparation: what is to be done in a directory and what has been, written down for a later call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyllm._internal.files import REPLACED, write_text
from tinyllm._internal.words import option
from tinyllm.data.prepare.documents import Part, cut_input
from tinyllm.data.prepare.inputs import STREAMS, Input, OnBad, Skipped, find_inputs
from tinyllm.data.prepare.manifest import shard_files
from tinyllm.data.shards import MANIFEST_FILE, TOKENIZER_FILE, WORK_FOLDER

MEGABYTE = 10**6

_VERSION = 1  # of plan.json


class Plan:
    """Plan of a preparation: what is to be done in a directory, and what has been."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out = out
        self.folder = out / WORK_FOLDER
        self.settings: dict[str, Any] = dict(content["settings"])
        self.units = [[Part(**part) for part in parts] for parts in content["units"]]
        self.streams = [entry for entry in (Input(*row) for row in content["inputs"]) if entry.kind in STREAMS]
        self.tokenizer_sha256 = ""  # once there is one
        self.damaged: list[str] = []  # streams that broke off
        count, named = content["skipped"]
        self.skipped: tuple[int, list[str]] = count, named
        self.notes: list[str] = []  # what this call has passed over

    @classmethod
    def make(cls, data: Sequence[Any], out: Path, settings: dict[str, Any], skip_bad: bool, overwrite: bool) -> Plan:
        """Return the plan in `out`, if it is for the same inputs and settings; else a new one.

        A new one replaces a plan of which nothing has been done, or which failed: the settings may have been what was
        wrong. With `overwrite` it replaces any, and what was done, once the inputs are found.

        Raises:
            ValueError: there is another plan, of which something has been done (names what differs), or a damaged one.
        """
        path = out / WORK_FOLDER / "plan.json"
        skipped = Skipped(skip_bad)
        found = find_inputs(data, skipped, out)
        rows = [list(asdict(entry).values()) for entry in found.inputs]
        if path.is_file() and not overwrite:
            plan, content = _read_plan(path, out)
            plan.notes = found.notes()
            differ = _differences(content, settings, rows)
            if not differ:
                return plan
            if (out / MANIFEST_FILE).exists() or (plan.has_begun() and not plan.failed.exists()):
                more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
                raise ValueError(
                    f"{out} holds other prepared data: {differ[0]}{more}; choose another directory, or start anew "
                    f"with --overwrite"
                )
        elif not (overwrite and path.parent.is_dir()):
            for name in (MANIFEST_FILE, TOKENIZER_FILE):
                if (out / name).exists():
                    raise ValueError(f"out {out} holds a {name}, of something else; choose another directory")
        for where, why in found.binary:
            skipped.note(where, why)
        units = _pack(found.inputs, int(settings["shard_size"] * MEGABYTE), settings["text_column"], skipped)
        content = {
            "version": _VERSION,
            "settings": settings,
            "inputs": rows,
            "units": [[asdict(part) for part in parts] for parts in units],
            "skipped": [skipped.count, skipped.named],
        }
        if (out / MANIFEST_FILE).exists():
            _move_ours(out, out / REPLACED)
        else:
            _remove_ours(out)
        write_text(path, json.dumps(content))
        plan = cls(out, content)
        plan.notes = found.notes()
        return plan

    @property
    def failed(self) -> Path:
        """Return the mark of a plan whose inputs or settings were wrong, as far as its last call has come."""
        return self.folder / "failed"

    def has_begun(self) -> bool:
        """Return whether any unit is finished, or a shard is there."""
        return any(self.folder.glob("unit-*.json")) or bool(shard_files(self.out))

    def sidecar(self, number: int) -> Path:
        return self.folder / f"unit-{number:05d}.json"

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return the result of a unit, if it is finished and its files are there."""
        path = self.sidecar(number)
        if not path.is_file():
            return None
        content = _read_sidecar(path)
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
            yield _read_sidecar(path)

    def clean_up(self) -> None:
        """Remove what only an unfinished preparation needs, and the data that these have replaced.

        The plan stays, to compare the next one with.
        """
        for path in self.folder.iterdir():
            if path.name != "plan.json":
                path.unlink()
        shutil.rmtree(self.out / REPLACED, ignore_errors=True)


@contextmanager
def giving_up(plan: Plan) -> Iterator[None]:
    """Put data that were moved aside back if the block fails before any of the new ones are finished."""
    plan.failed.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError):
            plan.failed.touch()
        if (plan.out / REPLACED).is_dir() and not any(plan.folder.glob("unit-*.json")):
            _remove_ours(plan.out)
            _move_ours(plan.out / REPLACED, plan.out)
        raise


def recover(out: Path) -> None:
    """Mend what a kill left of data that were being moved aside, or back, or that are replaced by finished ones."""
    replaced = out / REPLACED
    if not replaced.is_dir():
        return
    if not (replaced / MANIFEST_FILE).exists():  # some of them lie there still, or already
        _move_ours(replaced, out)
    elif (out / MANIFEST_FILE).exists():
        shutil.rmtree(replaced)


def _move_ours(source: Path, target: Path) -> None:
    """Move what `prepare` wrote: away with the manifest last, and back with it first, by which `recover` knows."""
    back = source.name == REPLACED
    target.mkdir(exist_ok=True)
    names = [*(path.name for path in shard_files(source)), TOKENIZER_FILE, WORK_FOLDER]
    for name in [MANIFEST_FILE, *names] if back else [*names, MANIFEST_FILE]:
        if (source / name).exists():
            (source / name).rename(target / name)
    if back:
        source.rmdir()


def _remove_ours(out: Path) -> None:
    """Remove everything that `prepare` wrote; the manifest first, because without it nothing else counts."""
    if not (out / WORK_FOLDER).is_dir():
        return
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for path in shard_files(out):
        path.unlink()
    (out / TOKENIZER_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / WORK_FOLDER)


def _read_plan(path: Path, out: Path) -> tuple[Plan, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        plan = Plan(out, content) if content["version"] == _VERSION else None
        content["settings"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({_damage(error)}); --overwrite starts anew") from error
    if plan is None:
        raise ValueError(f"{out} was prepared by another version of tinyllm; --overwrite starts anew")
    return plan, content


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        for name in ("documents", "tokens", "bytes", "skipped_count", "skipped", "tokenizer_sha256"):
            content[name]
        for entry in content["shards"].values():
            if entry:
                entry["name"], entry["tokens"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({_damage(error)}); remove it, and the same command does that part again"
        ) from error
    return dict(content)


def _damage(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return str(error) if isinstance(error, ValueError) else "it has another form"


def _differences(content: dict[str, Any], settings: dict[str, Any], rows: list[list[Any]]) -> list[str]:
    """Return what is not as it was in a plan, in words."""
    differ = []
    for name in {**content["settings"], **settings}:
        before, now = content["settings"].get(name), settings.get(name)
        if before == now:
            continue
        if name == "tokenizer_sha256":
            differ.append("the tokenizer is another one")
        else:
            differ.append(f"{option(name)} was {_shown(before)}, now it is {_shown(now)}")
    before, now = ({row[0]: row for row in lists} for lists in (content["inputs"], rows))
    for path in {**before, **now}:
        if before.get(path) != now.get(path):
            what = "has changed" if path in before and path in now else "is new" if path in now else "is gone"
            differ.append(f"{path} {what}")
    if not differ and before.keys() and list(before) != list(now):
        differ.append("the inputs come in another order")
    return differ


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _pack(inputs: Iterable[Input], size: int, column: str, on_bad: OnBad) -> list[list[Part]]:
    """Return parts of all inputs that are not streams, in order, small ones together up to `size` bytes."""
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
