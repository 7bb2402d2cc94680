import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # it multiplies small tiles with NumPy, slowest on many threads

from tinyllm import _extension

needs_extension = pytest.mark.skipif(
    not _extension.loaded, reason=f"the installation has no compiled kernels to test: {_extension.why_not}"
)


def pytest_collection_modifyitems(items):
    """Everything below tests/ops tests the compiled kernels, except what is marked `any_build`."""
    for item in items:
        if "/ops/" in str(item.path) and item.get_closest_marker("any_build") is None:
            item.add_marker(needs_extension)
