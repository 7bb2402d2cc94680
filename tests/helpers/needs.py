"""Marks for tests that need a part which an installation may lack."""

from importlib.util import find_spec

import pytest

from tinyllm.ops.backends import cpp

needs_extension = pytest.mark.skipif(
    not cpp.loaded, reason=f"the installation has no compiled kernels to test: {cpp.why_not}"
)
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
