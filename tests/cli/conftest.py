from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import TEXT, small
from tinyllm.training.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """text.txt, and a run of eight steps on it."""
    path = tmp_path_factory.mktemp("hands")
    (path / "text.txt").write_text(TEXT)
    train(small(steps=8), path / "run", [path / "text.txt"], progress=False)
    return path
