"""Promises of docs/versioning.md that no other test holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tinyllm
from tests.docs.test_pages import TEXTS
from tinyllm import ops
from tinyllm.training.checkpoint import _read_state


def test_a_checkpoint_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"version": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of version 99; this program reads version \d+"):
        _read_state(path)


def test_what_is_public_is_in_the_reference() -> None:
    reference = TEXTS["docs/reference.md"]
    modules = {"active_transform"}  # for those who write operators
    for name in {*ops.__all__, *tinyllm.__all__} - modules - {"__version__", "nn", "ops", "optim"}:
        assert f".{name}\n" in reference, name
    assert "::: tinyllm.nn\n" in reference
