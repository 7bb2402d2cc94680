"""Tests of `tinyllm.runs.succession`: a new run takes the place of an earlier one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllm._internal.files import REPLACED
from tinyllm.runs.folder import NEW
from tinyllm.runs.succession import giving_up, new_files, recover, settle

FILES = ("config.json", "tokenizer.json", "data/train-00000.bin")
CONFIGS = {name: json.dumps({"name": name, "data": {"prepared": "data"}}) for name in ("old", "new")}


def make_run(folder: Path, name: str, *, checkpoint: bool) -> None:
    folder.mkdir(exist_ok=True)
    for file in FILES:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(CONFIGS[name] if file == "config.json" else name)
    if checkpoint:
        (folder / "checkpoints" / "step-00000008").mkdir(parents=True)
        (folder / "model.safetensors").write_text(name)


def content(folder: Path) -> dict[str, str]:
    """Return the content of each file of a run by its name, without hidden files."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


OLD = {**dict.fromkeys((*FILES, "model.safetensors"), "old"), "config.json": CONFIGS["old"]}
YOUNG = {**dict.fromkeys(FILES, "new"), "config.json": CONFIGS["new"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    make_run(tmp_path / "out", "old", checkpoint=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    OLD["notes.txt"] = YOUNG["notes.txt"] = "mine"
    return tmp_path / "out"


def begin(out: Path) -> None:
    with new_files(out) as folder:
        make_run(folder, "new", checkpoint=False)


def fail(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), giving_up(out):
        raise KeyboardInterrupt


def test_the_earlier_run_stays_until_it_is_settled(out: Path) -> None:
    begin(out)
    assert content(out) == YOUNG
    del OLD["notes.txt"]
    assert content(out / REPLACED) == OLD
    assert (out / REPLACED / "checkpoints" / "step-00000008").is_dir()
    settle(out)
    assert set(os.listdir(out)) == {name.partition("/")[0] for name in YOUNG}


def test_a_new_run_that_cannot_be_made_changes_nothing(out: Path) -> None:
    def make() -> None:
        with new_files(out) as folder:
            make_run(folder, "new", checkpoint=False)
            raise ValueError("the text is too short")

    with pytest.raises(ValueError, match="too short"):
        make()
    assert content(out) == OLD
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.parametrize("before", [True, False])
def test_a_new_run_without_a_checkpoint_gives_way_to_the_earlier_one(before: bool, out: Path) -> None:
    if not before:
        shutil.rmtree(out)
        out.mkdir()
    begin(out)
    (out / "metrics.jsonl").touch()
    fail(out)
    assert content(out) == (OLD if before else {})
    assert (out / "checkpoints" / "step-00000008").is_dir() == before


def test_a_new_run_with_a_checkpoint_stays(out: Path) -> None:
    begin(out)
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    fail(out)
    assert content(out) == YOUNG


def test_of_three_runs_the_one_with_weights_is_kept(out: Path) -> None:
    begin(out)  # and killed
    recover(out)
    begin(out)
    fail(out)
    assert content(out) == OLD


def test_a_folder_data_that_is_not_the_runs_stays(out: Path) -> None:
    shutil.rmtree(out / "data")
    (out / "config.json").write_text(json.dumps({"data": {"prepared": "/elsewhere"}}))
    with new_files(out) as folder:
        make_run(folder, "new", checkpoint=False)
        shutil.rmtree(folder / "data")
        shutil.copyfile(out / "config.json", folder / "config.json")
    (out / "data").mkdir()
    (out / "data" / "notes.txt").write_text("mine")
    fail(out)
    assert content(out)["data/notes.txt"] == "mine"
    assert content(out)["model.safetensors"] == "old"
    (out / "config.json").unlink()  # as a kill of an older version may leave it
    (out / REPLACED).mkdir()
    recover(out)
    assert content(out)["data/notes.txt"] == "mine"


def killed_at(number: int, out: Path) -> bool:
    """Begin a new run, and fail, in a process that dies before its change of this number; return whether it did."""
    child = os.fork()
    if child == 0:
        left = number

        def dying(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return change(*arguments, **options)

            return call

        Path.rename = dying(Path.rename)  # type: ignore[method-assign]
        Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
        begin(out)
        fail(out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_loses_neither_run(out: Path) -> None:
    number = 0
    states = set()
    while killed_at(number, out):
        recover(out)
        recover(out)
        found = content(out)
        assert found in (OLD, YOUNG)
        assert not (out / NEW).exists()
        if found == YOUNG:
            assert {**content(out / REPLACED), "notes.txt": "mine"} == OLD
            fail(out)
        assert content(out) == OLD
        assert (out / "checkpoints" / "step-00000008").is_dir()
        states.add(tuple(found.values()))
        number += 1
    assert number > 15
    assert len(states) == 2
    assert content(out) == OLD
