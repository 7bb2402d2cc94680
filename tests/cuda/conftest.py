import pytest


@pytest.fixture(autouse=True)
def _on_the_cuda_kernels():
    from tests.cuda.device import why_not  # not above: tinyllm must not be imported before the emulation is built
    from tinyllm import ops

    if why_not is not None:
        pytest.skip(f"the CUDA C++ kernels do not run here: {why_not}")
    with ops.backend("cuda"):
        yield
