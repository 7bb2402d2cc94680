"""Loads the compiled library `_C` once and remembers, when it cannot, why not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType


def build_record() -> dict[str, str]:
    """What the installation wrote about its build: `extension` (built|skipped), `reason`, `compiler`, `torch`."""
    path = Path(__file__).with_name("_build.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"extension": "skipped", "reason": "tinyllm is imported from a source tree that was never installed"}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        # torch must be in the process first: _C finds libtorch's symbols there, and needs no rpath of its own.
        import torch  # noqa: F401

        library = importlib.import_module("tinyllm._C")
    except ImportError as error:
        record = build_record()
        if record["extension"] == "skipped":
            return None, f"the C++ extension was not built: {record['reason']}"
        return None, f"the C++ extension does not load: {error}"
    return library, None


library, why_not = _load()
loaded = library is not None
