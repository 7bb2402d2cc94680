import pytest

from tests.cuda.device import why_not
from tinyllm import ops


@pytest.fixture(autouse=True)
def _on_the_cuda_kernels():
    if why_not is not None:
        pytest.skip(f"the CUDA C++ kernels do not run here: {why_not}")
    with ops.backend("cuda"):
        yield
