"""Marks for tests that need a part which an installation may lack."""

import pytest

from tinyllm.ops.backends import cpp

needs_extension = pytest.mark.skipif(
    not cpp.loaded, reason=f"the installation has no compiled kernels to test: {cpp.why_not}"
)
