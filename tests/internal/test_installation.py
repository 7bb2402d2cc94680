"""The command that installs tinyllm once more names where it came from, as pip has noted it."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any
from unittest import mock

import pytest

from tinyllm._internal.installation import reinstall


@pytest.mark.parametrize(
    ("direct", "origin"),
    [
        ({}, None),
        (
            {
                "url": "https://example.org/t.git",
                "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "a1"},
            },
            "git+https://example.org/t.git@a1",
        ),
        ({"url": "https://example.org/tinyllm.whl", "archive_info": {}}, "https://example.org/tinyllm.whl"),
        ({"url": "file:///home/a%20b/tinyllm", "dir_info": {"editable": True}}, "-e '/home/a b/tinyllm'"),
        ({"url": "file:///home/ab/tinyllm", "dir_info": {}}, "/home/ab/tinyllm"),
    ],
)
def test_reinstall(direct: dict[str, Any], origin: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mock.Mock(read_text=mock.Mock(return_value=json.dumps(direct)))
    monkeypatch.setattr(metadata, "distribution", mock.Mock(return_value=found))
    start = "pip install --no-cache-dir --force-reinstall --no-deps "
    assert reinstall().startswith(start)
    assert origin is None or reinstall() == start + origin
