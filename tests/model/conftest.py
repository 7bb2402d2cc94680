from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of what the operator was given: ids of a model, or the input of a block."""
    from tinyllm import _fused  # not above: see tests/conftest.py

    found: list[Tensor] = []
    original = _fused.run_transformer

    def spy(input: Tensor, *args: Any) -> Tensor:
        found.append(input)
        return original(input, *args)

    monkeypatch.setattr(_fused, "run_transformer", spy)
    return found
