"""Marks for tests that need a part which an installation may lack."""

import pytest

from tinyllm import _extension

needs_extension = pytest.mark.skipif(
    not _extension.loaded, reason=f"the installation has no compiled kernels to test: {_extension.why_not}"
)
