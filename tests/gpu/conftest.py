import pytest

from tests.gpu.device import why_not
from tinyllm import ops


@pytest.fixture(autouse=True)
def _on_the_triton_kernels():
    if why_not is not None:
        pytest.skip(f"Triton's kernels do not run here: {why_not}")
    with ops.backend("triton"):
        yield
