from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.installations import World
from tests.helpers.preparing import finished, save_tokenizer, unfinish
from tests.helpers.runs import TEXT, small, untrained_run
from tinyllm.training.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Make a folder with text.txt and a run of eight steps on it."""
    path = tmp_path_factory.mktemp("hands")
    (path / "text.txt").write_text(TEXT)
    train(small(steps=8), path / "run", [path / "text.txt"], progress=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return finished(tmp_path_factory.mktemp("prepared"), tokenizer)


@pytest.fixture
def unfinished(prepared: Path, tmp_path: Path) -> Path:
    return unfinish(prepared, tmp_path / "unfinished")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run that was never trained, with two checkpoints; the command line finds it as "run"."""
    return untrained_run(tmp_path / "run", "char")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """Make a machine and an installation in which nothing is wrong, for `tinyllm doctor`."""
    return World(monkeypatch, tmp_path)
