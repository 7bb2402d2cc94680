"""The long checks run when their sources have changed, and are recorded only when they pass."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.building import campaigns

FILES = (
    "csrc/cpu/a.cpp",
    "kernels/b.py",
    "tests/building/gpu_compile.py",
    "tests/building/test_a.py",
    "tests/ops/c.py",
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with some sources, in which nothing has run; `make` only notes what it is asked for."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "Makefile").write_text("%:\n\techo $@ >> made\n\ttest $@ != cpu-sanitize -o ! -f broken\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "campaigns.json").write_text("{}")
    monkeypatch.setattr(campaigns, "ROOT", tmp_path)
    monkeypatch.setattr(campaigns, "RECORD", tmp_path / "campaigns.json")
    monkeypatch.setattr(campaigns.digest, "__defaults__", (tmp_path,))
    return tmp_path


def made(checkout: Path) -> list[str]:
    """Return what `make` was asked for since the last call."""
    path = checkout / "made"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_what_has_passed_is_not_repeated(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main([]) == 0
    assert made(checkout) == [*campaigns.TARGETS]
    assert campaigns.main([]) == 0
    assert made(checkout) == []
    assert "gpu-compile: passed on 20" in capsys.readouterr().out
    assert campaigns.main(["gpu-compile", "--again"]) == 0
    assert made(checkout) == ["gpu-compile"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("csrc/cpu/a.cpp", [*campaigns.TARGETS]),
        ("kernels/b.py", ["gpu-compile"]),
        ("tests/ops/c.py", ["cuda-sanitize"]),
        ("tests/building/gpu_compile.py", [*campaigns.TARGETS]),
        ("tests/building/test_a.py", []),
    ],
)
def test_a_change_has_its_targets_run_again(checkout: Path, changed: str, again: list[str]) -> None:
    assert campaigns.main([]) == 0
    made(checkout)
    (checkout / changed).write_text("something else")
    assert campaigns.main([]) == 0
    assert made(checkout) == again


def test_a_new_file_counts_and_a_failure_is_not_recorded(checkout: Path) -> None:
    assert campaigns.main([]) == 0
    before = json.loads((checkout / "campaigns.json").read_text())
    (checkout / "csrc" / "new.h").write_text("")
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    (checkout / "broken").touch()
    assert campaigns.main(["cpu-sanitize"]) == 1
    assert json.loads((checkout / "campaigns.json").read_text()) == before
    with pytest.raises(SystemExit, match="2"):
        campaigns.main(["gpu"])
